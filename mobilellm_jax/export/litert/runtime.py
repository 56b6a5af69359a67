"""Runs a `.litertlm` file by LiteRT-LM, and by LiteRT where LiteRT-LM does not tell enough.

LiteRT-LM's Python interface gives no logits and takes no token ids. Its scores of a given text
leave out the last token of the prompt (0.18.1), so they are not used.
"""

import functools
import importlib.metadata
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.extras import import_extra

_HIDDEN = -1e30  # added to attention scores; finite, or a row without tokens would be NaN


class LiteRtLmRuntime:
    """A `.litertlm` file on the CPU in fp32; a `mobilellm_jax.export.runtime.Runtime`.

    `encode` and `greedy_text` ask LiteRT-LM's `Engine`, the one that runs on phones. `logits`,
    `last_logits` and `greedy` run the model in the file as that does, its prefill and decode
    signatures with a cache, by LiteRT's `Interpreter`. LiteRT-LM's messages are not printed, in
    the whole process.
    """

    has_tokenizer = True  # or LiteRT-LM would not load the file

    def __init__(self, path: Path):
        """Reads the head of the file, the rest when it is needed.

        Raises:
          UserError: it is no such file, or lacks its end. LiteRT-LM reads it without suspicion, a
            damaged head can end the process: compare checksums before.
        """
        self._lm = import_extra("litert_lm", "litert")
        self._lm.set_min_log_severity(self._lm.LogSeverity.SILENT)
        self._path = path
        try:
            with self._lm.ModelInfo(str(path)) as info:
                self.context_length = info.max_context_tokens
        except (FileNotFoundError, RuntimeError) as error:
            raise UserError(
                f"{path}: no .litertlm file ({error}); convert the model again"
            ) from error
        versions = [importlib.metadata.version(name) for name in ("litert-lm", "ai-edge-litert")]
        self.name = "LiteRT-LM {} (logits and ids: LiteRT {})".format(*versions)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[T, V]`, the logits after each of the T tokens, read one at a time by the cache."""
        self._check_length(len(tokens))
        return np.stack([self._model.decode(token, i) for i, token in enumerate(tokens)])

    def last_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 `[V]`, the logits after the last token of a prompt.

        As LiteRT-LM does: all but the last token are read in chunks by the prefill signature, which
        gives no logits, and the last one by the decode signature.
        """
        self._check_length(len(tokens))
        self._model.prefill(tokens[:-1])
        return self._model.decode(tokens[-1], len(tokens) - 1)

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The continuation by the likeliest token, cached, without a stop at EOS."""
        self._check_length(len(tokens) + num_tokens)
        chosen: list[int] = []
        logits = self.last_logits(tokens)
        while len(chosen) < num_tokens:
            chosen.append(int(logits.argmax()))
            if len(chosen) < num_tokens:
                logits = self._model.decode(chosen[-1], len(tokens) + len(chosen) - 1)
        return chosen

    def greedy_text(self, prompt: str, num_tokens: int) -> str:
        """The Engine's own greedy continuation of `prompt`, to which it adds BOS.

        It ends before EOS and at the end of the context. As sentencepiece does with the ids of the
        continuation alone, the Engine leaves out a space in front of it.

        Raises:
          UserError: the prompt does not fit in the context.
        """
        sampler = self._lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
        with self._engine.create_session(
            apply_prompt_template=False, sampler_config=sampler, max_output_tokens=num_tokens
        ) as opened:
            try:
                opened.run_prefill([prompt])
            except RuntimeError as error:
                raise UserError(
                    f"{self._path}: LiteRT-LM cannot read the prompt of {len(prompt)} characters "
                    f"({error}); its context is {self.context_length} tokens"
                ) from error
            return opened.run_decode().texts[0]

    def stops_at(self, token: int) -> bool:
        """Whether the Engine has the token among those that it stops at."""
        return [token] in self._engine.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` by the Engine's tokenizer, without BOS and EOS.

        Raises:
          UserError: the text cannot be handed over: it has a NUL, at which the Python interface
            would cut it off, or half of a surrogate pair, which is no text in UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text cannot be encoded as UTF-8 ({error})") from error
        if "\0" in text:
            raise UserError("the text has a NUL character, which ends a text for LiteRT-LM")
        return self._engine.tokenize(text)

    @functools.cached_property
    def _engine(self):
        try:
            return self._lm.Engine(
                str(self._path),
                backend=self._lm.Backend.CPU(thread_count=os.cpu_count()),
                cache_dir=":nocache",  # or it writes all weights again, next to the file
                activation_data_type=self._lm.ActivationDataType.FLOAT32,
            )
        except RuntimeError as error:
            raise UserError(f"{self._path}: {error}; convert it again") from error

    @functools.cached_property
    def _model(self) -> "_CachedModel":
        return _CachedModel(_model_section(self._path))

    def _check_length(self, length: int) -> None:
        assert length > 0
        if length > self.context_length:
            raise UserError(
                f"{self._path}: {length} tokens do not fit in the context of {self.context_length};"
                " use fewer, or a longer context"
            )


class _CachedModel:
    """The signatures "prefill_<length>" and "decode" over one cache of keys and values."""

    def __init__(self, model_bytes: bytes):
        litert = import_extra("ai_edge_litert.interpreter", "litert")
        interpreter = litert.Interpreter(model_content=model_bytes, num_threads=os.cpu_count())
        (prefill,) = (name for name in interpreter.get_signature_list() if name != "decode")
        self._prefill = interpreter.get_signature_runner(prefill)
        self._decode = interpreter.get_signature_runner("decode")
        shapes = {k: v["shape"] for k, v in self._prefill.get_input_details().items()}
        _, _, self._prefill_length, self._cache_length = shapes["mask"]
        # What is hidden still has to be finite.
        self._cache = {
            name: np.zeros(shape, np.float32)
            for name, shape in shapes.items()
            if name.startswith("kv_cache")
        }

    def prefill(self, tokens: Sequence[int]) -> None:
        """Reads tokens from position 0 on, in chunks of the signature's length."""
        for start in range(0, len(tokens), self._prefill_length):
            chunk_T = np.zeros(self._prefill_length, np.int32)
            given = tokens[start : start + self._prefill_length]
            chunk_T[: len(given)] = given
            self._run(self._prefill, chunk_T, start)

    def decode(self, token: int, position: int) -> np.ndarray:
        """fp32 `[V]`, the logits after a token at a position, all before which were read."""
        return self._run(self._decode, np.array([token], np.int32), position)["logits"][0, 0]

    def _run(self, signature: Any, tokens_T: np.ndarray, start: int) -> dict[str, np.ndarray]:
        """The outputs that are not the cache, which is kept."""
        positions_T = np.arange(start, start + len(tokens_T), dtype=np.int32)
        hidden_TS = np.arange(self._cache_length) > positions_T[:, None]
        mask_TS = np.where(hidden_TS, np.float32(_HIDDEN), np.float32(0))
        outputs = signature(
            tokens=tokens_T[None],
            input_pos=positions_T,
            mask=mask_TS[None, None],
            **self._cache,
        )
        self._cache = {name: outputs.pop(name) for name in self._cache}
        return outputs


def _model_section(path: Path) -> bytes:
    """The .tflite model in a .litertlm file; UserError if there is not all of it."""
    peek = import_extra("litert_lm_builder.litertlm_peek", "litert")
    schema = import_extra("litert_lm_builder.litertlm_header_schema_py_generated", "litert")
    sections = peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    for section in map(sections.Objects, range(sections.ObjectsLength())):
        if section.DataType() == schema.AnySectionDataType.TFLiteModel:
            size = section.EndOffset() - section.BeginOffset()
            with open(path, "rb") as file:
                file.seek(section.BeginOffset())
                content = file.read(size)
            if len(content) == size:
                return content
    raise UserError(f"{path}: has no complete model in it; convert it again")
