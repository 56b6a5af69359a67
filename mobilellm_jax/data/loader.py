"""Prepared datasets to batches; the order of the records is a pure function of seed and position.

There is no iterator state: whoever knows the step knows the batch, on any number of hosts, so a
run resumes by naming its step. Batches are made by background threads (grain), a few steps ahead.
"""

import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import math
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from array_record.python import array_record_module
from grain.experimental import index_shuffle

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.records import Record, checksum_seed, decode_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.tokenizer import Tokenizer, text_bytes

Batch = dict[str, np.ndarray]
_MAX_RECORDS = 1 << 40
# grain's index_shuffle works on at least this many; fewer take it up to a millisecond per call.
_SMALL = 1 << 16


class RecordSource:
    """Random access to the records of one split; safe to use from several threads.

    A damaged or missing shard raises UserError with the file, the record's number in it and, where
    ArrayRecord tells it, the byte. Nothing is silent: ArrayRecord hashes its chunks, each record
    has a checksum that knows its place, and the header knows the size of every shard.
    """

    def __init__(self, dataset: Dataset, split: str):
        self.directory = Path(dataset.directory)
        self.split = split
        self.header = dataset.header
        self.tokenizer = dataset.tokenizer
        if split not in self.header.splits:
            raise UserError(
                f"{dataset.directory}: no {split!r:.100} split, only "
                f"{', '.join(map(repr, self.header.splits))}; prepare it with --valid_fraction, "
                "--valid_input or --split_field"
            )
        self._shards = self.header.splits[split].shards
        self._stops = list(itertools.accumulate(shard.num_records for shard in self._shards))
        self._readers: list[array_record_module.ArrayRecordReader | None]
        self._readers = [None] * len(self._shards)
        _allow_open_files(len(self._shards))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Batch:
        """The arrays of one row, [T] each, as in ``train_batches``."""
        return _row(self.record(index), across_documents=True)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        return [self[index] for index in indices]

    def record(self, index: int) -> Record:
        """The record as it was written."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._stops, index)
        shard = self._shards[number]
        position = index - self._stops[number] + shard.num_records
        try:
            data = self._reader(number).read([position])[0]
            return decode_record(
                data,
                sequence_length=self.header.sequence_length,
                vocab_size=self.header.vocab_size,
                seed=checksum_seed(self.header.tokenizer_sha256, self.split, index),
                format_version=self.header.format_version,
            )
        except (RuntimeError, IndexError, UserError) as error:
            if os.strerror(errno.EMFILE) in str(error):
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise UserError(
                    f"{self.directory}: its {len(self._shards):,} shards stay open once read, but "
                    f"this process may have {limit:,} files open; raise its hard limit (ulimit -Hn)"
                ) from error
            raise UserError(
                f"{self.directory / shard.file}: record {position} (of {self.split}: {index}) "
                f"{error}; the shard is damaged: copy it again, or prepare the dataset again"
            ) from error

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if self._readers[number] is None:
                self._readers[number] = array_record_module.ArrayRecordReader(
                    str(self.directory / self._shards[number].file),
                    "readahead_buffer_size:0,max_parallelism:0",  # for random access
                    file_reader_buffer_size=1 << 15,
                )
            return self._readers[number]


def _allow_open_files(more: int) -> None:
    """Raises the soft limit, often 1024, as far as the hard one lets it.

    Opening a shard reads the place of each of its records, so none is closed to be opened again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS: less than its "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_split(directory: str | Path, split: str) -> RecordSource:
    """The records of ``split`` ('train' or 'valid') of a prepared dataset.

    Raises UserError if the folder is not a complete dataset with that split.
    """
    return RecordSource(Dataset.open(directory), split)


@dataclasses.dataclass(frozen=True)
class RecordOrder:
    """Which record of which dataset stands at each position of a training run.

    Calling it costs O(1) time and memory, and it keeps no state. Each dataset is shuffled anew in
    each of its epochs, in which every record appears exactly once. A mixture interleaves the
    datasets as evenly as their weights allow, each with its own epochs.
    """

    num_records: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __call__(self, position: int) -> tuple[int, int]:
        """(number of the dataset, number of the record in it) at ``position`` >= 0."""
        dataset, count = divmod(self._choice[position], _MAX_RECORDS)
        num_records = self.num_records[dataset]
        epoch, index = divmod(count, num_records)
        key = f"{self.seed}/{dataset}/{epoch}".encode()
        # Hashed, as neighbouring seeds would otherwise share orders between epochs and datasets.
        epoch_seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest())
        if num_records <= _SMALL:
            return dataset, int(_permutation(num_records, epoch_seed)[index])
        # In grain 0.2.18 index_shuffle is no permutation where max_index is 4^8, 4^9 or 4^10 (seen;
        # larger powers of 4 not tried). So: an odd max_index, and again while out of range.
        while True:
            index = index_shuffle(index, max_index=num_records | 1, seed=epoch_seed, rounds=4)
            if index < num_records:
                return dataset, index

    @functools.cached_property
    def _choice(self) -> grain.MapDataset:
        """At each position dataset * _MAX_RECORDS + how many of it came before."""
        counters = [
            grain.MapDataset.range(dataset * _MAX_RECORDS, (dataset + 1) * _MAX_RECORDS)
            for dataset in range(len(self.num_records))
        ]
        return grain.MapDataset.mix(counters, self.weights)


@functools.lru_cache(maxsize=16)
def _permutation(length: int, seed: int) -> np.ndarray:
    """The legacy generator, as NumPy promises that only its numbers never change."""
    return np.random.RandomState(seed).permutation(length).astype(np.uint16)


def train_batches(
    datasets: Sequence[tuple[Dataset, float]],
    *,
    seed: int,
    global_batch_size: int,
    sequence_length: int,
    across_documents: bool = True,
    start_step: int = 0,
    num_steps: int | None = None,
    rows: Sequence[int] | None = None,
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Batches of steps start_step, ..., num_steps - 1 (None: without end) of a training run.

    The global batch of step s has the records at positions [s * B, (s + 1) * B) of the order. It
    depends on nothing but (datasets, seed, global_batch_size, step).

    Args:
      datasets: (dataset, weight) pairs; the weights are relative shares of the records.
      seed: decides the order.
      global_batch_size: B, records per step over all processes.
      sequence_length: T; must be that of the datasets.
      across_documents: whether the last token of a document is to predict the first of the next
        one; if not, that target has the weight 0.
      num_steps: the step at which the run ends, whatever ``start_step`` is.
      rows: which of the B rows to make, in this order, as each process loads those of its own
        devices; None makes all.
      num_threads, prefetch: background threads, and batches made ahead.

    Yields:
      Dicts of arrays [len(rows), T]: inputs, targets and segment_ids (number of the document within
      its record, from 1; 0 is padding), all int32, and loss_weights, float32, 0 for padding
      and whatever else is not learnt.

    Raises:
      UserError: datasets that are damaged or do not go together, at once; a damaged record, when
        its batch is due.
    """
    sources = [RecordSource(dataset, "train") for dataset, _ in datasets]
    check_mixture(sources, [weight for _, weight in datasets], sequence_length)
    order = RecordOrder(
        tuple(map(len, sources)), tuple(float(weight) for _, weight in datasets), seed
    )
    rows = range(global_batch_size) if rows is None else rows

    def batch_of(step: int) -> Batch:
        places = [order(step * global_batch_size + int(row)) for row in rows]
        records = [sources[dataset].record(index) for dataset, index in places]
        return _stack([_row(record, across_documents) for record in records])

    stop = sys.maxsize if num_steps is None else num_steps
    return _prefetched(range(start_step, stop), batch_of, num_threads, prefetch)


def eval_batches(
    source: RecordSource,
    *,
    batch_size: int,
    max_records: int | None = None,
    across_documents: bool = True,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every record of a split once, in the order of the text; arguments as of ``train_batches``.

    Beside the arrays of ``train_batches`` a batch has text_weights, float32 [len(rows), T]: the
    loss_weights, but 0 for control tokens (BOS, EOS, ...), which stand for no text; and
    target_bytes, int32: the UTF-8 bytes that each target adds to the text of its document.

    The number of batches is the same in every process; rows that the last one lacks are padding
    (loss_weights 0). ``max_records`` limits the evaluation to the first records.
    """
    num_records = len(source) if max_records is None else min(max_records, len(source))
    rows = range(batch_size) if rows is None else rows
    no_tokens = np.zeros(source.header.sequence_length + 1, np.int32)
    padding = Record(no_tokens, 0, np.zeros(0, np.int32))

    def batch_of(number: int) -> Batch:
        indices = [number * batch_size + int(row) for row in rows]
        records = [source.record(i) if i < num_records else padding for i in indices]
        return _stack([_eval_row(r, across_documents, source.tokenizer) for r in records])

    numbers = range(math.ceil(num_records / batch_size))
    return _prefetched(numbers, batch_of, num_threads=2, prefetch=4)


def _row(record: Record, across_documents: bool) -> Batch:
    """Inputs, targets, loss weights and segment ids of one record, [T] each."""
    sequence_length = len(record.tokens) - 1
    position = np.arange(sequence_length)
    begins = _begins(record)[:-1]
    begins[0] = True  # what a record begins with, from its middle or not, is its first segment
    return {
        "inputs": record.tokens[:-1],
        "targets": record.tokens[1:],
        "loss_weights": _learnt_targets(record, across_documents).astype(np.float32),
        "segment_ids": np.where(position < record.num_valid, np.cumsum(begins), 0).astype(np.int32),
    }


def _eval_row(record: Record, across_documents: bool, tokenizer: Tokenizer) -> Batch:
    """A row with what only evaluation asks for: text_weights and target_bytes, [T] each."""
    row = _row(record, across_documents)
    is_text = tokenizer.token_bytes[row["targets"]] > 0
    return row | {
        "text_weights": row["loss_weights"] * is_text,
        "target_bytes": text_bytes(tokenizer, record.tokens, _begins(record))[1:],
    }


def _begins(record: Record) -> np.ndarray:
    """Marks the first token of each document, bool [T + 1]."""
    begins = np.zeros(len(record.tokens), bool)
    begins[record.starts[record.starts < len(begins)]] = True
    return begins


def _learnt_targets(record: Record, across_documents: bool) -> np.ndarray:
    """Whether the loss counts each target, bool [T]: no padding, and in the mask."""
    is_learnt = np.arange(1, len(record.tokens)) < record.num_valid
    if not across_documents:
        is_learnt &= ~_begins(record)[1:]
    return is_learnt if record.loss_mask is None else is_learnt & record.loss_mask[1:]


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _prefetched(
    numbers: range, batch_of: Callable[[int], Batch], num_threads: int, prefetch: int
) -> Iterator[Batch]:
    """Calls ``batch_of`` in background threads; its errors are raised where the batch is due."""
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(batch_of)
    options = grain.ReadOptions(num_threads, max(prefetch, num_threads))
    return iter(batches.to_iter_dataset(options))


def check_mixture(sources: list[RecordSource], weights: list[float], sequence_length: int) -> None:
    """Raises UserError unless the datasets can be mixed: one tokenizer, one length, weights > 0."""
    if not sources:
        raise UserError("no dataset to train on; name at least one")
    first = sources[0]
    for source, weight in zip(sources, weights, strict=True):
        if not 0 < weight < math.inf:
            raise UserError(f"{source.directory}: its weight {weight} must be more than 0")
        if source.header.tokenizer_sha256 != first.header.tokenizer_sha256:
            raise UserError(
                f"{first.directory} and {source.directory}: made with different tokenizers "
                f"({first.header.tokenizer_sha256[:12]}, {source.header.tokenizer_sha256[:12]}); "
                "prepare both with the same --tokenizer"
            )
        if source.header.sequence_length != first.header.sequence_length:
            raise UserError(
                f"{first.directory} and {source.directory}: sequence_length "
                f"{first.header.sequence_length} and {source.header.sequence_length} do not mix; "
                "prepare both with the same --sequence_length"
            )
        if source.header.sequence_length != sequence_length:
            raise UserError(
                f"{source.directory}: sequence_length {source.header.sequence_length}, but the "
                f"run's is {sequence_length}; change the run's, or prepare the dataset again"
            )
