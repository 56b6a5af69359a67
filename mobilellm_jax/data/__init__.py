"""Data: text to packed records on disk to batches for training."""
