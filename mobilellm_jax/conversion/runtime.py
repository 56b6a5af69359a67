"""What every runtime that executes a converted model is asked for, and how one is asked for."""

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

from mobilellm_jax.errors import UserError

# They warn, when they are imported, of kernels for GPUs and of their own deprecations.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


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

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by the runtime's own tokenizer, without BOS and EOS."""


def import_extra(name: str, extra: str) -> ModuleType:
    """Module `name`; UserError with the command that installs it if it is not there."""
    # torch's threads wait for each other at every operation. By default they spin, and where the
    # cores are busy with anything else, decoding takes thirty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for logger in _NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} is not installed: pip install 'mobilellm_jax[{extra}]' (in a checkout: "
            f"pip install -e '.[{extra}]')"
        ) from error
