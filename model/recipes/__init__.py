"""Data, model and schedule of each shipped model, one short file each."""
