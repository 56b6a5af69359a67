"""The data room: text -> tokenizer -> packed records on disk -> batches for training."""
