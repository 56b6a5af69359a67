"""Speed of training and decoding, against PyTorch in the same run: `python -m benchmarks.speed`."""
