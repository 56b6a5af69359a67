"""Text to token ids and back: SentencePiece, as LLaMA and MobileLLM use it.

The ids are exactly those of plain ``sentencepiece`` with the same model file, so a tokenizer that
is trained here works wherever a LLaMA tokenizer does (Hugging Face, llama.cpp, ExecuTorch).
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.storage.untrusted import refuse_lfs_pointer

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # SentencePiece's sign for a space
MAX_SAMPLE_BYTES = 20_000_000
# SentencePiece silently skips training sentences that are longer than its max_sentence_length, or
# that have its sign for what is unknown (trainer_interface.cc, LoadSentences).
_MAX_LINE_BYTES = 4192
_UNKNOWN_SIGN = "\u2585"


class SentencePieceTokenizer:
    """A SentencePiece model and its bytes. Implements `tokenizers.tokenizer.Tokenizer`.

    Every text survives ``decode(encode(text))`` when the model has byte fallback, with the one
    exception that SentencePiece itself makes: U+2581, its own sign for a space, becomes a space.
    """

    def __init__(self, model_bytes: bytes, name: str = "tokenizer"):
        """``name`` is the file that error messages mention; raises UserError for a bad model."""
        if not isinstance(model_bytes, bytes):
            raise UserError(
                f"{name}: give the content of tokenizer.model, bytes, not a "
                f"{type(model_bytes).__name__}: Path(FILE).read_bytes()"
            )
        refuse_lfs_pointer(name, model_bytes)
        problem = f"{name}: not a SentencePiece model ({len(model_bytes)} bytes)"
        fix = "; pass a tokenizer.model file, or train one with --vocab_size"
        if not model_bytes:  # SentencePiece accepts an empty model and fails on first use
            raise UserError(problem + fix)
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(problem + fix) from error
        if processor.vocab_size() == 0:
            raise UserError(problem + fix)
        self.model_bytes = model_bytes
        self.files = {MODEL_FILE: model_bytes}
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._processor = processor

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model_bytes,)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Reads a ``tokenizer.model`` file; UserError if it is missing or something else."""
        if local_path(path).is_char_device():  # /dev/zero has no end
            raise UserError(f"{path}: is a device, not a SentencePiece tokenizer.model file")
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the tokenizer ({error.strerror}); pass the path of a "
                "SentencePiece tokenizer.model file, or train one with --vocab_size"
            ) from error
        return cls(model_bytes, str(path))

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        return _id_or_none(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _id_or_none(self._processor.eos_id())

    @property
    def pad_id(self) -> int | None:
        return _id_or_none(self._processor.pad_id())

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``, with the document marks asked for; asserts that the model has them."""
        assert not bos or self.bos_id is not None, "this tokenizer has no BOS"
        assert not eos or self.eos_id is not None, "this tokenizer has no EOS"
        return self._processor.encode(text, add_bos=bos, add_eos=eos)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of ``text`` as the next block of a longer text, which was cut at a line end.

        SentencePiece puts a space in front of whatever it encodes, which is wrong in the middle of
        a document. A newline stands in for the line end before the cut and is taken off again.
        """
        ids = self._processor.encode("\n" + text)
        newline = self._newline_ids
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control ids (BOS, EOS) leave nothing behind.

        Raises UserError for an id outside of [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside of this tokenizer's [0, {self.vocab_size}); did the "
                    "ids come from another tokenizer?"
                )
        return self._processor.decode(ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id adds to a text, int32 [vocab_size]; 0 for control pieces only.

        A byte piece is one byte, though it decodes to U+FFFD where it stands alone. Unknown pieces
        count as what decoding puts in their place.
        """
        processor = self._processor

        def num_bytes(i: int) -> int:
            if processor.is_unknown(i):
                return len(processor.decode([i]).encode())
            if processor.is_control(i):
                return 0
            is_byte = processor.is_byte(i)
            return 1 if is_byte else len(processor.id_to_piece(i).replace(_SPACE, " ").encode())

        return np.array([num_bytes(i) for i in range(self.vocab_size)], np.int32)

    @functools.cached_property
    def first_bytes(self) -> np.ndarray:
        """The same for the first id of a text, without the space that SentencePiece put there."""
        processor = self._processor
        texts = processor.decode([[i] for i in range(self.vocab_size)])
        sizes = [1 if processor.is_byte(i) else len(t.encode()) for i, t in enumerate(texts)]
        return np.array(sizes, np.int32)

    @functools.cached_property
    def _newline_ids(self) -> list[int]:
        return self._processor.encode("\n")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    output_path: str | Path,
    *,
    max_sample_bytes: int = MAX_SAMPLE_BYTES,
) -> SentencePieceTokenizer:
    """Trains a LLaMA-like BPE tokenizer on the first ``max_sample_bytes`` of ``documents``.

    LLaMA's settings: BPE with byte fallback, text left as it is (identity normalisation, no space
    removed, runs of spaces may become pieces), digits split, a space put before the text, unk 0,
    BOS 1, EOS 2, no padding id. A newline is one piece, the byte <0x0A>, as in LLaMA.
    Deterministic: the same documents give the same bytes. U+2585, which SentencePiece keeps for
    itself, is left out of the text; the tokenizer has its bytes.

    Raises:
      UserError: no text, or a ``vocab_size`` that is too small or too large for the text; the
        message has the nearest possible value.
      Exception: whatever ``documents`` raises.
    """
    output_path = local_path(output_path)
    model = io.BytesIO()
    # All of them first: what they or a signal raise in a callback of C++ would be lost.
    lines = list(_training_lines(documents, max_sample_bytes))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            split_digits=True,
            max_sentence_length=_MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _training_error(error, vocab_size) from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(output_path))
    write_file(output_path, tokenizer.model_bytes)
    return tokenizer


def _training_lines(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of the documents, without what would make SentencePiece drop them."""
    num_bytes = 0
    for document in documents:
        for line in document.replace(_UNKNOWN_SIGN, "").split("\n"):
            # A character has at most 4 bytes.
            for start in range(0, len(line), _MAX_LINE_BYTES // 4):
                piece = line[start : start + _MAX_LINE_BYTES // 4]
                num_bytes += len(piece.encode()) + 1
                yield piece
        if num_bytes >= max_bytes:
            return


def _training_error(error: Exception, vocab_size: int) -> UserError:
    """SentencePiece's message, said with the fix."""
    message = str(error)
    if limit := re.search(r"set it to a value <= (\d+)", message):
        return UserError(
            f"--vocab_size {vocab_size} is too large for this text; the largest possible value is "
            f"{limit[1]} (or give more text)"
        )
    if limit := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes, 3 marks and the characters of "
            f"this text already need {limit[2]}; use a larger value"
        )
    if "sentences_.empty()" in message or "empty" in message:
        return UserError(
            "no text to train a tokenizer on: every document is empty, or is token_ids, which need "
            "the --tokenizer that they were made with"
        )
    return UserError(f"cannot train a tokenizer with --vocab_size {vocab_size}: {message}")


def _id_or_none(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
