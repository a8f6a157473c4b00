"""Classification: many short inputs, each through the engine once. Start reading at classifier.py."""
