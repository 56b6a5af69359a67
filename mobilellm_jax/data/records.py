"""Datasets on disk: fixed-length token records and the header of a prepared dataset.

A record has sequence_length + 1 tokens: the inputs are all but the last, the targets all but the
first. In a dataset of text, consecutive records overlap by one token, so every token of the stream
but the first is predicted exactly once.

Bytes of a record, little-endian: crc32 (uint32) of all that follows, num_valid (uint32), num_starts
(uint32), tokens (uint16 or uint32, padded with 0 beyond num_valid), starts (uint32 each: positions
in the record at which a document begins); in format 2 also the loss mask, a bit for each token from
the lowest bit of the first byte on: 1 where the token is learnt when it is the target. Format 1 has
no mask: every token is learnt. The checksum also covers the tokenizer, the split and the number of
the record, so a shard in the wrong place does not pass either.
"""

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.storage.hashing import sha256_file
from mobilellm_jax.storage.paths import local_path

PLAIN_FORMAT, MASKED_FORMAT = 1, 2
HEADER_FILE = "dataset.json"
SPLITS = ("train", "valid")
_PREFIX = struct.Struct("<III")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
      tokens: int32 [T + 1].
      num_valid: of the tokens, from the first on; the others are padding.
      starts: int32 [num_starts], positions at which documents begin.
      loss_mask: bool [T + 1], False for tokens that are not learnt; None learns all.
    """

    tokens: np.ndarray
    num_valid: int
    starts: np.ndarray
    loss_mask: np.ndarray | None = None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def checksum_seed(tokenizer_sha256: str, split: str, index: int) -> int:
    """Binds a record to its tokenizer, its split and its number in that split."""
    return zlib.crc32(f"{tokenizer_sha256}/{split}/{index}".encode())


def encode_record(
    tokens: np.ndarray,
    starts: np.ndarray,
    *,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    loss_mask: np.ndarray | None = None,
) -> bytes:
    """Bytes of a record of ``len(tokens)`` <= sequence_length + 1 valid tokens.

    With a ``loss_mask``, bool [len(tokens)], it is a record of format 2.
    """
    num_valid = len(tokens)
    assert 0 < num_valid <= sequence_length + 1
    padded = np.zeros(sequence_length + 1, token_dtype(vocab_size))
    padded[:num_valid] = tokens
    starts = np.asarray(starts, "<u4")
    body = struct.pack("<II", num_valid, len(starts)) + padded.tobytes() + starts.tobytes()
    if loss_mask is not None:
        assert len(loss_mask) == num_valid
        padded_mask = np.zeros(sequence_length + 1, bool)
        padded_mask[:num_valid] = loss_mask
        body += np.packbits(padded_mask, bitorder="little").tobytes()
    return struct.pack("<I", zlib.crc32(body, seed)) + body


def decode_record(
    data: bytes,
    *,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    format_version: int = PLAIN_FORMAT,
) -> Record:
    """Inverse of ``encode_record``; its UserError tells what is wrong, not where."""
    dtype = token_dtype(vocab_size)
    tokens_stop = _PREFIX.size + (sequence_length + 1) * dtype.itemsize
    if len(data) < tokens_stop:
        raise UserError(f"has {len(data)} bytes, fewer than the {tokens_stop} of its tokens")
    crc, num_valid, num_starts = _PREFIX.unpack_from(data)
    if zlib.crc32(memoryview(data)[4:], seed) != crc:
        raise UserError(
            "has a wrong checksum: it is damaged, or belongs to another place or dataset"
        )
    mask_start = tokens_stop + 4 * num_starts
    mask_bytes = -(-(sequence_length + 1) // 8) if format_version == MASKED_FORMAT else 0
    if len(data) != mask_start + mask_bytes or not 0 < num_valid <= sequence_length + 1:
        raise UserError(
            f"has {len(data)} bytes, {num_valid} valid tokens and {num_starts} document starts, "
            f"which do not agree with sequence_length {sequence_length}"
        )
    tokens = np.frombuffer(data, dtype, sequence_length + 1, _PREFIX.size).astype(np.int32)
    if tokens.max() >= vocab_size or tokens.min() < 0:
        raise UserError(f"has token id {tokens.max()}, outside of [0, {vocab_size})")
    starts = np.frombuffer(data, "<u4", num_starts, tokens_stop).astype(np.int32)
    loss_mask = None
    if mask_bytes:
        bits = np.frombuffer(data, np.uint8, mask_bytes, mask_start)
        loss_mask = np.unpackbits(bits, count=sequence_length + 1, bitorder="little").astype(bool)
    return Record(tokens, num_valid, starts, loss_mask)


@dataclasses.dataclass(frozen=True)
class Shard:
    file: str
    num_records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """num_tokens counts predicted targets; num_bytes the UTF-8 bytes of the documents' text."""

    num_records: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """An input of prepare; ``bytes`` and ``sha256`` are those of the file on disk."""

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetHeader:
    """Everything about a prepared dataset; its file exists only if the dataset is complete."""

    sequence_length: int
    vocab_size: int
    tokenizer_sha256: str
    bos: bool
    eos: bool
    splits: dict[str, Split]
    sources: tuple[SourceFile, ...]
    settings: dict[str, Any]
    created_by: str
    format_version: int = PLAIN_FORMAT

    def save(self, directory: str | Path) -> None:
        """Writes ``dataset.json``, the last file of a dataset, durably."""
        values = dataclasses.asdict(self) | {"token_dtype": token_dtype(self.vocab_size).name}
        content = json.dumps(values | {"header_sha256": _json_sha256(values)}, indent=1)
        write_file(local_path(directory) / HEADER_FILE, content.encode())

    @classmethod
    def load(cls, directory: str | Path) -> "DatasetHeader":
        """Reads and checks the header, and that the shards it lists are there and have their size.

        Raises UserError for a folder that is no finished dataset, a malformed header, an unknown
        format version, and a missing or resized shard.
        """
        directory = local_path(directory)
        path = directory / HEADER_FILE
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{directory}: not a finished dataset ({HEADER_FILE}: {error.strerror}); make one "
                "with the prepare command"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not valid JSON ({error}); prepare the dataset again"
            ) from error
        header = _parse_header(path, values)
        header._check_shards(directory)
        return header

    def verify_shards(self, directory: str | Path) -> None:
        """Reads every shard and compares its SHA-256; UserError names the first damaged one."""
        for split in self.splits.values():
            for shard in split.shards:
                path = local_path(directory) / shard.file
                if (found := sha256_file(path)) != shard.sha256:
                    raise UserError(
                        f"{path}: sha256 {found[:12]}..., but {HEADER_FILE} says "
                        f"{shard.sha256[:12]}...; the shard is damaged: prepare the dataset again"
                    )

    def _check_shards(self, directory: Path) -> None:
        for split in self.splits.values():
            for shard in split.shards:
                path = directory / shard.file
                try:
                    size = path.stat().st_size
                except OSError as error:
                    raise UserError(
                        f"{path}: cannot read this shard ({error.strerror}); put it back, or "
                        "prepare the dataset again"
                    ) from error
                if size != shard.bytes:
                    raise UserError(
                        f"{path}: {size} bytes, but {HEADER_FILE} says {shard.bytes}; the shard "
                        "is truncated or damaged: copy it again, or prepare the dataset again"
                    )


def _parse_header(path: Path, values: Any) -> DatasetHeader:
    """A header from untrusted JSON: every key, type and range is checked."""

    def fail(problem: str) -> UserError:
        return UserError(f"{path}: {problem}; the header is damaged: prepare the dataset again")

    if not isinstance(values, dict):
        raise fail(f"holds {type(values).__name__}, not an object")
    if values.get("format_version") not in (PLAIN_FORMAT, MASKED_FORMAT):
        raise UserError(
            f"{path}: format_version is {values.get('format_version')!r}, this version reads "
            f"{PLAIN_FORMAT} and {MASKED_FORMAT}; prepare the dataset again, or use the version "
            "that made it"
        )
    values = dict(values)
    if values.pop("header_sha256", None) != _json_sha256(values):
        raise fail("its checksum does not agree with its content")
    try:
        dtype = values.pop("token_dtype")
        splits = {
            name: _checked(Split, split | {"shards": _list_of(Shard, split["shards"])})
            for name, split in values.pop("splits").items()
        }
        sources = _list_of(SourceFile, values.pop("sources"))
        header = _checked(DatasetHeader, values | {"splits": splits, "sources": sources})
    except (KeyError, TypeError, AttributeError) as error:
        raise fail(f"missing or malformed entry ({error})") from error
    if header.sequence_length < 1 or header.vocab_size < 1:
        raise fail(f"sequence_length {header.sequence_length}, vocab_size {header.vocab_size}")
    if dtype != token_dtype(header.vocab_size).name:
        raise fail(f"token_dtype {dtype!r} does not go with vocab_size {header.vocab_size}")
    if not splits or not set(splits) <= set(SPLITS):
        raise fail(f"splits {sorted(splits)}, expected some of {SPLITS}")
    for name, split in splits.items():
        files = [shard.file for shard in split.shards]
        if not all(re.fullmatch(rf"{name}-\d{{5}}\.array_record", file) for file in files):
            raise fail(f"unexpected shard names in split {name!r}")
        counts = [shard.num_records for shard in split.shards]
        if sum(counts) != split.num_records or min(counts, default=0) < 1:
            raise fail(f"shards of split {name!r} hold {counts}, not {split.num_records} records")
    return header


def _json_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _list_of(kind: type, values: Any) -> tuple:
    return tuple(_checked(kind, value) for value in values)


def _checked(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from a dict with exactly its keys and the types of its annotations."""
    names = {field.name: field.type for field in dataclasses.fields(kind)}
    if set(values) != set(names):
        raise KeyError(f"{kind.__name__}: {sorted(set(values) ^ set(names))}")
    for name, value in values.items():
        wanted = getattr(names[name], "__origin__", names[name])
        if type(value) is not wanted or wanted is int and value < 0:
            raise TypeError(f"{kind.__name__}.{name} is {value!r}")
    return kind(**values)
