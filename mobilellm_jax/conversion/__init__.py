"""Models in and out: Hugging Face folders and tokenizer files, without torch or transformers."""
