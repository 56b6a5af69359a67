"""Training objectives: from a batch and parameters to a loss and its gradient."""
