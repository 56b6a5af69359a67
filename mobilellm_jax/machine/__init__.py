"""A process and its machine: other processes of the run, signals, hardware, caches, extras."""
