"""Tokenizers as files: beside datasets, checkpoints and exported models."""

from pathlib import Path

from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

TOKENIZER_FILES = (MODEL_FILE,)  # names that a folder's tokenizer may have


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer file, today a SentencePiece `tokenizer.model`.

    Raises:
      UserError: the file is missing or something else.
    """
    return SentencePieceTokenizer.load(path)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a folder; None if it has none.

    Raises:
      UserError: a file that is damaged or cannot be read.
    """
    path = folder / MODEL_FILE
    return load_tokenizer(path) if path.exists() else None


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's files into a folder, each whole or not at all."""
    for name, content in tokenizer.files.items():
        write_file(folder / name, content)
