"""The questions that every runtime of a converted model answers."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Runtime(Protocol):
    """A converted model, loaded by the software that runs it on a phone.

    Attributes:
      name: of the software, with its version.
      context_length: most tokens that prompt and continuation may have together.
      has_tokenizer: whether there is a tokenizer that `encode` can use.
    """

    name: str
    context_length: int
    has_tokenizer: bool

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[T, V]`, the logits after each of the T tokens, read one at a time by the cache."""

    def last_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[V]`, the logits after the last token of a prompt that is read at once."""

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The continuation by the likeliest token, cached, without a stop at EOS."""

    def stops_at(self, token: int) -> bool:
        """Whether an answer ends with this token."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by the runtime's own tokenizer, without BOS and EOS."""
