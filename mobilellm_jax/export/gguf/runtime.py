"""Runs a GGUF file by llama.cpp itself, through its C interface in llama-cpp-python.

The comparison with JAX wants fp32 keys and values and no flash attention, which rounds to fp16 even
where they are fp32. An app has fp16 and flash attention unless it asks for something else.
"""

import ctypes
import functools
import os
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.extras import import_extra

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR, which llama-cpp-python 0.3.36 takes for a debug message
_errors: deque[str] = deque(maxlen=10)


class LlamaCppRuntime:
    """A GGUF file in llama.cpp on the CPU; a `mobilellm_jax.export.runtime.Runtime`.

    Two runs give the same bits. llama.cpp's messages are not printed, in the whole process.
    """

    has_tokenizer = True  # or llama.cpp would not load the file

    def __init__(self, path: Path, context_length: int):
        """Maps the file; UserError with llama.cpp's reason if it cannot load it."""
        self._llama = llama = _quiet_llama_cpp()[0]
        self.name = f"llama.cpp (llama-cpp-python {llama.__version__})"
        self.context_length = context_length
        self._path = path
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; pass the path of a .gguf file")
        _errors.clear()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise UserError(f"{path}: llama.cpp cannot load it ({_reason()}); convert it again")
        release_model = weakref.finalize(self, llama.llama_model_free, model)
        context = llama.llama_init_from_model(model, self._context_params())
        if not context:
            raise UserError(
                f"{path}: llama.cpp cannot run it with a context of {context_length} tokens "
                f"({_reason()}); use a shorter one"
            )
        release_model.detach()
        weakref.finalize(self, _release, llama, context, model)
        self._context = context
        self._memory = llama.llama_get_memory(context)
        self._vocab = llama.llama_model_get_vocab(model)
        self._vocab_size = llama.llama_vocab_n_tokens(self._vocab)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[T, V]`, the logits after each of the T tokens, read one at a time by the cache."""
        self._forget()
        rows = [self._read([token]) for token in tokens]
        return np.stack(rows) if rows else np.empty((0, self._vocab_size), np.float32)

    def last_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[V]`, the logits after the last token of a prompt that is read at once."""
        self._forget()
        return self._read(tokens)

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The continuation by the likeliest token, cached, without a stop at EOS."""
        self._check_length(len(tokens) + num_tokens)
        chosen: list[int] = []
        logits = self.last_logits(tokens)
        while len(chosen) < num_tokens:
            chosen.append(int(logits.argmax()))
            if len(chosen) < num_tokens:
                logits = self._read(chosen[-1:])
        return chosen

    def stops_at(self, token: int) -> bool:
        """Whether llama.cpp takes the token for an end of generation."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by llama.cpp's tokenizer, without BOS and EOS.

        Special tokens are not looked for: a literal "<s>" is text, as in sentencepiece, and as an
        app should read what its user types.

        Raises:
          UserError: the text has half of a surrogate pair, which is no text in UTF-8.
        """
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text cannot be encoded as UTF-8 ({error})") from error
        room = 3 * (len(encoded) + 1)  # at worst the three bytes of the sign for a space each
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(
            self._vocab, encoded, len(encoded), ids, room, False, False
        )
        assert count >= 0, count
        return ids[:count]

    def _context_params(self):
        params = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = self.context_length
        # Its threads wait for each other in busy loops: one too many is several times slower.
        params.n_threads = params.n_threads_batch = max(1, (os.cpu_count() or 1) // 2)
        params.type_k = params.type_v = self._llama.GGML_TYPE_F32
        params.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._memory, True)
        self._num_read = 0

    def _read(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens behind those that it has read; the logits after the last one, `[V]`."""
        self._check_length(self._num_read + len(tokens))
        assert len(tokens) and all(0 <= token < self._vocab_size for token in tokens)
        ids = (self._llama.llama_token * len(tokens))(*tokens)
        _errors.clear()
        if code := self._llama.llama_decode(
            self._context, self._llama.llama_batch_get_one(ids, len(tokens))
        ):
            raise UserError(f"{self._path}: llama.cpp failed with code {code} ({_reason()})")
        self._num_read += len(tokens)
        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def _check_length(self, length: int) -> None:
        if length > self.context_length:
            raise UserError(
                f"{self._path}: {length} tokens do not fit in the context of {self.context_length};"
                " use fewer, or a longer context"
            )


@functools.cache
def _quiet_llama_cpp() -> tuple[ModuleType, Any]:
    """The library, and the function that it gives its messages to, which must live as long.

    Errors are kept for our own messages, everything else is dropped.
    """
    llama = import_extra("llama_cpp", "gguf")

    @llama.llama_log_callback
    def keep_errors(level: int, text: bytes, _):
        if level == _LOG_ERROR:
            _errors.append(text.decode(errors="replace").strip())

    llama.llama_log_set(keep_errors, ctypes.c_void_p(0))
    llama.llama_backend_init()
    return llama, keep_errors


def _release(llama: ModuleType, context, model) -> None:
    llama.llama_free(context)
    llama.llama_model_free(model)


def _reason() -> str:
    return "; ".join(_errors) or "it gives no reason"
