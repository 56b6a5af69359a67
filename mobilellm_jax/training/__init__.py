"""Training: config, data, step and the loop around it."""
