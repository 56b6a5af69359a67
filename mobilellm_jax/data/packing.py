"""Packing a stream of tokens into records, and records into ArrayRecord shards."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from mobilellm_jax.data.records import Shard, Split, checksum_seed, encode_record, token_dtype
from mobilellm_jax.storage.hashing import sha256_file

_SHARD_BYTES = 256 << 20


class SplitWriter:
    """Writes one split: packs documents into records of sequence_length + 1 tokens.

    OSError for a full disk; ArrayRecord reports one only when a shard is closed, which is one
    reason to keep shards small.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        sequence_length: int,
        vocab_size: int,
        tokenizer_sha256: str,
        records_per_shard: int | None = None,
    ):
        record_bytes = (sequence_length + 1) * token_dtype(vocab_size).itemsize
        self._directory = directory
        self._split = split
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._tokenizer_sha256 = tokenizer_sha256
        self._records_per_shard = records_per_shard or max(1, _SHARD_BYTES // record_bytes)
        self._tokens = np.zeros(0, np.int32)  # the stream from the next record's first token on
        self._starts: list[int] = []  # positions in it at which documents begin
        self._writer = None
        self._records_in_shard = 0
        self._shards: list[Shard] = []
        self.num_records = 0
        self.num_tokens = 0
        self._num_documents = 0
        self._num_bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int, first: bool) -> None:
        """Appends a document, or a further block of one where ``first`` is false, to the stream."""
        if first:
            self._num_documents += 1
            self._starts.append(len(self._tokens))
        self._num_bytes += num_bytes
        self._tokens = np.concatenate([self._tokens, tokens])
        length = self._sequence_length
        while len(self._tokens) > length:
            self._write(
                self._tokens[: length + 1], [start for start in self._starts if start <= length]
            )
            self._tokens = self._tokens[length:]
            self._starts = [start - length for start in self._starts if start >= length]

    def add_record(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        num_bytes: int,
        loss_mask: np.ndarray | None = None,
    ) -> None:
        """Writes an already packed sequence as a record of its own.

        With a ``loss_mask`` (see ``Record``) it is of format 2, as all records of a dataset must be
        then.
        """
        self._num_documents += 1
        self._num_bytes += num_bytes
        self._write(tokens, starts, loss_mask)

    def close(self) -> Split:
        """Writes what is left, padded, and returns the facts for the header."""
        if len(self._tokens) > 1:  # the first token of a record is not predicted
            self._write(self._tokens, self._starts)
        self._tokens, self._starts = self._tokens[:0], []
        self._close_shard()
        return Split(
            self.num_records,
            self.num_tokens,
            self._num_documents,
            self._num_bytes,
            tuple(self._shards),
        )

    def _write(
        self,
        tokens: np.ndarray,
        starts: list[int] | np.ndarray,
        loss_mask: np.ndarray | None = None,
    ) -> None:
        data = encode_record(
            tokens,
            starts,
            sequence_length=self._sequence_length,
            vocab_size=self._vocab_size,
            seed=checksum_seed(self._tokenizer_sha256, self._split, self.num_records),
            loss_mask=loss_mask,
        )
        with _disk_errors(self._path):
            if self._writer is None:
                # One record per group is ArrayRecord's setting for random access; tokens hardly
                # compress.
                options = "group_size:1,uncompressed"
                self._writer = array_record_module.ArrayRecordWriter(str(self._path), options)
            self._writer.write(data)
        self.num_records += 1
        self.num_tokens += len(tokens) - 1
        self._records_in_shard += 1
        if self._records_in_shard == self._records_per_shard:
            self._close_shard()

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self._shards):05d}.array_record"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        path, count = self._path, self._records_in_shard
        with _disk_errors(path):
            self._writer.close()
            sha256 = sha256_file(path, sync=True)
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        if found != count:
            raise OSError(errno.EIO, f"{found} of {count} records arrived on the disk", str(path))
        self._shards.append(Shard(path.name, count, path.stat().st_size, sha256))
        self._writer, self._records_in_shard = None, 0


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """ArrayRecord's RuntimeErrors as the OSErrors that they stand for."""
    try:
        yield
    except RuntimeError as error:
        full = "No space left" in str(error) or "quota" in str(error)
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, f"{os.strerror(code)} ({error})", str(path)) from error
