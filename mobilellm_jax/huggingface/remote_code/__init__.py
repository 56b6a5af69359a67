"""PyTorch code that ships in compact Hugging Face folders: the model as a plain module."""
