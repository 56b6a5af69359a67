"""Encoding on several cores: no more of the input is taken than the promised number of batches."""

import concurrent.futures

import pytest
from prepared import DOCUMENTS

from mobilellm_jax.data import encoding
from mobilellm_jax.data.documents import Document
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

NUM_WORKERS = 2


@pytest.fixture
def tokenizer(tmp_path):
    return train_tokenizer(DOCUMENTS, 310, tmp_path / "tokenizer.model")


class PoolHere:
    """A pool whose work is done at once, in this process."""

    def __init__(self, num_workers, context, start, arguments):
        self._encoder = encoding.Encoder(*arguments)

    def submit(self, function, items):
        future = concurrent.futures.Future()
        future.set_result(self._encoder(items))
        return future

    def shutdown(self, **_):
        pass


def test_at_most_two_batches_for_each_worker_and_one_are_in_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", PoolHere)
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 1)  # each document is a batch
    taken, ahead, given = 0, [], []

    def documents():
        nonlocal taken
        for line, text in enumerate(DOCUMENTS, 1):
            taken += 1
            yield Document(text, None, None, "a.txt", line)

    settings = {"bos": True, "eos": False, "num_workers": NUM_WORKERS}
    for document, tokens, num_bytes in encoding.encode_in_order(documents(), tokenizer, **settings):
        assert tokens.tolist() == tokenizer.encode(document.text, bos=True)
        assert num_bytes == len(document.text.encode())
        ahead.append(taken - len(given))
        given.append(document.text)
    assert given == DOCUMENTS
    assert max(ahead) == 2 * NUM_WORKERS + 1
