"""Perplexity: the official protocol and prepared splits, against plain computations."""

import dataclasses
import itertools
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import reference
from model_cases import random_params, tiny
from prepared import DOCUMENTS, run_prepare, stream, write_lines

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.perplexity import (
    dataset_perplexity,
    official_perplexity,
    official_text,
)
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.model_bundle import ModelBundle, Provenance
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer

RTOL = 1e-5
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "text" / "wikitext2"
LLAMA = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "llama2_tokenizer.model"


def losses_of(config, params, tokens_BT):
    logits = reference.forward(config, params, np.asarray(tokens_BT)[:, :-1])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, np.asarray(tokens_BT)[:, 1:, None], -1)[..., 0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    lines = write_lines(folder / "text.jsonl", DOCUMENTS[:20])
    run_prepare([lines], folder / "data", vocab_size=300, valid_fraction=0.3, sequence_length=24)
    return folder / "data"


@pytest.fixture(scope="module")
def model(dataset):
    config = tiny("immediate", 2, vocab_size=300)
    tokenizer = Dataset.open(dataset).tokenizer
    return ModelBundle(config=config, params=random_params(config), tokenizer=tokenizer)


def test_split_loss_predicts_every_token_but_the_first_once(dataset, model):
    tokens = stream(dataset, "valid")
    result = dataset_perplexity(
        model, Dataset.open(dataset), "valid", batch_size=4, max_records=None, execution=Execution()
    )
    assert result.num_tokens == len(tokens) - 1
    total = sum(
        losses_of(model.config, model.params, [tokens[i : i + 25]]).sum()
        for i in range(0, len(tokens) - 1, 24)
    )
    np.testing.assert_allclose(result.loss, total / result.num_tokens, rtol=RTOL)
    np.testing.assert_allclose(result.perplexity, math.exp(total / result.num_tokens), rtol=RTOL)
    num_bytes = Dataset.open(dataset).header.splits["valid"].num_bytes
    assert num_bytes > 0
    np.testing.assert_allclose(result.bits_per_byte, total / math.log(2) / num_bytes, rtol=RTOL)


def test_batch_size_does_not_change_the_result(dataset, model):
    results = [
        dataset_perplexity(
            model,
            Dataset.open(dataset),
            "valid",
            batch_size=size,
            max_records=3,
            execution=Execution(),
        )
        for size in (1, 2, 8)
    ]
    assert {result.num_tokens for result in results} == {72}
    np.testing.assert_allclose([r.loss for r in results], results[0].loss, rtol=RTOL)
    # A part of the split has its share of the bytes of all.
    whole = Dataset.open(dataset).header.splits["valid"]
    bits = results[0].loss / math.log(2) * whole.num_tokens / whole.num_bytes
    np.testing.assert_allclose([r.bits_per_byte for r in results], bits, rtol=RTOL)


def test_documents_are_masked_as_the_model_was_trained(dataset, model):
    """Each piece of a document as if it stood alone: only distances between tokens count."""
    source, losses, num_pieces = open_split(dataset, "valid"), [], 0
    for record in map(source.record, range(4)):
        for start, end in itertools.pairwise(sorted({0, *record.starts.tolist(), 24})):
            tokens = record.tokens[start : end + 1]
            losses += losses_of(model.config, model.params, [tokens])[0].tolist()
            num_pieces += 1
    assert num_pieces > 4
    masked = dataclasses.replace(model, provenance=Provenance(mask_documents=True))
    result = dataset_perplexity(
        masked,
        Dataset.open(dataset),
        "valid",
        batch_size=4,
        max_records=4,
        execution=Execution(),
    )
    assert len(losses) == result.num_tokens == 4 * 24
    np.testing.assert_allclose(result.loss, np.mean(losses), rtol=RTOL)


def test_a_dataset_of_another_tokenizer_is_refused(dataset, model, tmp_path):
    other = train_tokenizer(DOCUMENTS, 310, tmp_path / "other.model")
    foreign = dataclasses.replace(model, tokenizer=other)
    with pytest.raises(UserError, match="another tokenizer"):
        dataset_perplexity(
            foreign,
            Dataset.open(dataset),
            "valid",
            batch_size=1,
            max_records=None,
            execution=Execution(),
        )


def test_official_protocol_written_out(model, tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Titlé = \n \n the cat and dog \n" + " sat on a mat \n" * 30)
    text = official_text(path)
    assert text.startswith("\n\n = Titlé = \n\n\n\n\n the cat and dog \n\n\n sat on a mat \n\n\n")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    chunks = np.array(ids[: len(ids) // 20 * 20]).reshape(-1, 20)
    assert len(ids) % 20, "a partial chunk must be dropped for the test to mean something"
    expected = losses_of(model.config, model.params, chunks).mean(axis=1).mean()
    result = official_perplexity(model, text, execution=Execution(), chunk=20)
    np.testing.assert_allclose(result.loss, expected, rtol=RTOL)
    assert result.num_tokens == len(chunks) * 19
    bytes_per_token = len(text.encode()) / len(ids)
    bits = expected / math.log(2) / bytes_per_token
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=RTOL)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the shared WikiText-2 is not here")
def test_official_text_of_wikitext_2_is_that_of_the_hugging_face_rows(tmp_path):
    raw = lzma.decompress((WIKITEXT / "wiki.test.raw.xz").read_bytes())
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(raw)
    text = official_text(path)
    assert text.count("\n\n") >= 4357  # rows and the blank lines between them
    ids = SentencePieceTokenizer.load(LLAMA).encode(text, bos=True)
    # GPTQ and others, which join the same rows alike, report 341,469 tokens with this tokenizer.
    assert len(ids) == 341_469


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n\n", "holds no text"), (b"\xff\xfe", "not UTF-8")],
)
def test_bad_text_files_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        official_text(path)
    with pytest.raises(UserError, match="cannot be read"):
        official_text(tmp_path / "absent.txt")


def test_short_text_is_refused(model):
    with pytest.raises(UserError, match=r"the text has \d+ tokens, .* at least 2048"):
        official_perplexity(model, "too short", execution=Execution())
