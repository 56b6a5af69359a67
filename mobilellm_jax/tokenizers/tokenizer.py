"""The protocol of a tokenizer: all that other rooms know of one."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mobilellm_jax.errors import UserError


class Tokenizer(Protocol):
    """Text to token ids and back. Can be pickled, for processes that encode.

    Attributes:
      files: file name -> content of all that the tokenizer is, as folders hold it.
      sha256: identifies the tokenizer.
      vocab_size: ids are 0 to vocab_size - 1.
      bos_id, eos_id, pad_id: None where the tokenizer has no such token.
      token_bytes: int32 `[vocab_size]`, the UTF-8 bytes that each id adds to a text; 0 for control
        tokens (BOS, EOS, ...) and for no others: they stand for no text.
      first_bytes: the same for the first token of a text.
    """

    files: Mapping[str, bytes]
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    token_bytes: np.ndarray
    first_bytes: np.ndarray

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the document marks asked for."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` as the next block of a longer text, which was cut at a line end."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids (BOS, EOS) leave nothing behind."""


def text_bytes(tokenizer: Tokenizer, tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each of a row of tokens adds to the text of its document, int32 `[N]`.

    Each is counted by itself, so the sum does not depend on where a row was cut, be it in the
    middle of a character.

    Args:
      tokens: ids, int `[N]`.
      begins: bool `[N]`, where documents begin; BOS may stand there, in front of the text.
    """
    is_mark = begins & (tokenizer.token_bytes[tokens] == 0)
    is_first = begins | np.concatenate([[False], is_mark[:-1]])
    return np.where(is_first, tokenizer.first_bytes[tokens], tokenizer.token_bytes[tokens])


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raises UserError for ids without an embedding; a vocabulary padded beyond them is fine.

    Args:
      vocab_size: of the model.
      name: the file that the message names.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} pieces, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
