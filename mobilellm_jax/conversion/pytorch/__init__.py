"""PyTorch: the model as a plain module, and its weights."""
