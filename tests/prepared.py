"""Text to prepare, and what became of it, for the tests of the data room."""

import json
import random

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.data.prepare import prepare

WORDS = ("the", "cat", "and", "dog", "sat", "on a", "mat", "while", "rain", "12 34", "é", "漢")


def make_documents(count, seed=0):
    rng = random.Random(seed)
    return [
        "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(rng.randrange(1, 9)))
        for _ in range(count)
    ]


DOCUMENTS = make_documents(60)


def write_lines(path, texts=DOCUMENTS, **fields):
    lines = (json.dumps({"text": text, **fields}) for text in texts)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run_prepare(inputs, output, **settings):
    settings = {"sequence_length": 32, "num_workers": 1, "progress": False} | settings
    return prepare(inputs, output, **settings)


def stream(folder, split="train"):
    """All tokens of a split in order, put together from its overlapping records."""
    source = open_split(folder, split)
    records = [source.record(i) for i in range(len(source))]
    tokens = records[0].tokens[:1].tolist()
    for record in records:
        assert record.tokens[0] == tokens[-1]
        tokens += record.tokens[1 : record.num_valid].tolist()
    return tokens


def texts(folder, split="train"):
    """The documents of a split, decoded one by one from BOS to BOS."""
    tokenizer = Dataset.open(folder).tokenizer
    found, document = [], []
    for token in [*stream(folder, split)[1:], tokenizer.bos_id]:
        if token == tokenizer.bos_id:
            found.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    return found


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
