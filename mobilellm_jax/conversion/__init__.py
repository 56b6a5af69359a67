"""Models in and out: other frameworks, files for phones, and the proof that they are the same."""
