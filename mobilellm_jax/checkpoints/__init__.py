"""Checkpoints of training, and one way to read a model from wherever it is."""
