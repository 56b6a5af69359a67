"""Encoding documents on all cores, with results in the order of the input.

A module of its own so that the worker processes import nothing but NumPy and SentencePiece.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from mobilellm_jax.data.documents import BLOCK_BYTES, Document
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.tokenizer import Tokenizer, text_bytes

# What a worker gets of a document: text, token_ids, first, last.
_Item = tuple[str | None, list[int] | None, bool, bool]
# What it gives back: all tokens, then for each item its number of tokens and of UTF-8 bytes.
_Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]
_HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Encoder:
    """Documents to tokens, with BOS in front of a document's first block and EOS after its last."""

    def __init__(self, tokenizer: Tokenizer, bos: bool, eos: bool):
        self._tokenizer = tokenizer
        self._bos = bos
        self._eos = eos

    def __call__(self, items: list[_Item]) -> _Encoded:
        tokens, counts, sizes = [], [], []
        for text, token_ids, first, last in items:
            if text is None:
                ids = np.asarray(token_ids, np.int32)
                begins = ids == self._tokenizer.bos_id
                num_bytes = text_bytes(self._tokenizer, ids, begins).sum()
            else:
                ids = np.asarray(self._encode(text, first, last), np.int32)
                num_bytes = len(text.encode())
            tokens.append(ids)
            counts.append(len(ids))
            sizes.append(num_bytes)
        return np.concatenate(tokens), np.asarray(counts), np.asarray(sizes)

    def _encode(self, text: str, first: bool, last: bool) -> list[int]:
        if first:
            return self._tokenizer.encode(text, bos=self._bos, eos=self._eos and last)
        ids = self._tokenizer.encode_continuation(text)
        return [*ids, self._tokenizer.eos_id] if self._eos and last else ids


def encode_in_order(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    bos: bool,
    eos: bool,
    num_workers: int,
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yields (document, tokens int32, UTF-8 bytes) in the order of ``documents``.

    At most 2 * num_workers + 1 batches of about BLOCK_BYTES of text are in memory. With one worker
    the calling process does the work. Raises UserError if a worker process dies; it never waits for
    a dead one.
    """
    encoder, batches = Encoder(tokenizer, bos, eos), _batches(documents)
    if num_workers == 1:
        for batch in batches:
            yield from _unpack(batch, encoder(_items(batch)))
        return
    # Before there are workers to leave behind: it may import, where a signal unwinds nothing.
    first = list(itertools.islice(batches, 1))
    in_flight = collections.deque()
    with _signals_held():
        pool = ProcessPoolExecutor(
            num_workers,
            multiprocessing.get_context("spawn"),  # a fork would inherit the locks of JAX's threads
            _start_worker,
            (tokenizer, bos, eos),
        )
    try:
        for batch in itertools.chain(first, batches):
            items = _items(batch)
            with _signals_held():  # a task starts a worker where there are not yet enough
                in_flight.append((batch, pool.submit(_encode_in_worker, items)))
            if len(in_flight) > 2 * num_workers:
                done, future = in_flight.popleft()
                yield from _unpack(done, future.result())
        while in_flight:
            done, future = in_flight.popleft()
            yield from _unpack(done, future.result())
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died while encoding; most likely the system ended it for lack of "
            f"memory: use fewer than --workers {num_workers} (a script that calls prepare() "
            'must do so under `if __name__ == "__main__":`)'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the end; in workers that start meanwhile, for good.

    A worker that loses its parent half started, or is interrupted then, ends with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    caught = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in _HELD_SIGNALS
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)  # which workers inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) if document.text else 4 * len(document.token_ids or ())
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _items(batch: list[Document]) -> list[_Item]:
    return [(doc.text, doc.token_ids, doc.first, doc.last) for doc in batch]


def _unpack(batch: list[Document], encoded: _Encoded) -> Iterator[tuple[Document, np.ndarray, int]]:
    tokens, counts, sizes = encoded
    parts = np.split(tokens, np.cumsum(counts)[:-1])
    yield from zip(batch, parts, sizes.tolist(), strict=True)


_worker_encoder: Encoder


def _start_worker(tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops the pool
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_SIGNALS)  # the pool may have to end us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(tokenizer, bos, eos)


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, and the pool's own queue never tells the workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(items: list[_Item]) -> _Encoded:
    return _worker_encoder(items)
