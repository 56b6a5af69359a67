"""Models for other runtimes, and the proof that they are the same."""
