"""ExecuTorch: `.pte` programs and their runner."""
