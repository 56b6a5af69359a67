"""LiteRT-LM: `.litertlm` files and their engine."""
