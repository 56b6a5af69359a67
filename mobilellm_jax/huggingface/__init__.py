"""Hugging Face folders: written and read without torch."""
