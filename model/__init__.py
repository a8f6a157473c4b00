"""Trains, exports and verifies the models that `service` serves.

One file a stage, in the order they run: `config` and `transformer` are the model; `importers` fill it with published
weights; `data` and `tokenization` make batches; `train` and `evaluate` fit and score; `export` and `verify` turn a
checkpoint into a bundle; `recipes` say which data, config and schedule make each shipped model. LOG.md tells what was
tried.
"""
