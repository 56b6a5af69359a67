"""Perplexity: the official protocol and prepared splits, against plain computations."""

import bz2
import dataclasses
import gzip
import itertools
import lzma
import math
import os
from pathlib import Path

import numpy as np
import pytest
import reference
import zstandard
from absl import logging
from model_cases import random_params, tiny
from prepared import DOCUMENTS, run_prepare, stream, texts, write_lines

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import RecordSource, open_split
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.perplexity import (
    Perplexity,
    dataset_perplexity,
    official_perplexity,
    official_text,
)
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.model_bundle import ModelBundle, Provenance
from mobilellm_jax.storage.atomic import check_can_write
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


def evaluate(model, folder, **settings):
    settings = {"batch_size": 4, "max_records": None, "execution": Execution()} | settings
    return dataset_perplexity(model, Dataset.open(folder), "valid", **settings)


def test_split_loss_predicts_every_token_but_the_first_once(dataset, model):
    """Control tokens count for the loss, as in training, and not for the text."""
    tokens = stream(dataset, "valid")
    result = evaluate(model, dataset)
    assert result.num_tokens == len(tokens) - 1
    starts = range(0, len(tokens) - 1, 24)
    losses = np.concatenate(
        [losses_of(model.config, model.params, [tokens[i : i + 25]])[0] for i in starts]
    )
    is_text = ~np.isin(tokens[1:], [model.tokenizer.bos_id, model.tokenizer.eos_id])
    np.testing.assert_allclose(result.loss, losses.mean(), rtol=RTOL)
    np.testing.assert_allclose(result.perplexity, math.exp(losses.mean()), rtol=RTOL)
    assert result.num_text_tokens == is_text.sum() < result.num_tokens
    np.testing.assert_allclose(result.text_loss, losses[is_text].mean(), rtol=RTOL)
    np.testing.assert_allclose(result.text_perplexity, math.exp(result.text_loss), rtol=RTOL)
    num_bytes = sum(len(text.encode()) for text in texts(dataset, "valid"))
    bits = losses[is_text].sum() / math.log(2) / num_bytes
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=RTOL)


def test_bits_per_byte_of_a_part_take_the_bytes_of_its_targets(dataset, model):
    """The same for every batch size: padding counts for nothing."""
    results = [evaluate(model, dataset, batch_size=size, max_records=9) for size in (2, 4)]
    assert {result.num_tokens for result in results} == {9 * 24}
    np.testing.assert_allclose([r.loss for r in results], results[0].loss, rtol=RTOL)
    tokens = np.array(stream(dataset, "valid")[: 9 * 24 + 1])
    documents = np.split(tokens, np.flatnonzero(tokens == model.tokenizer.bos_id)[1:])
    written = "".join(model.tokenizer.decode(document) for document in documents)
    assert len(documents) > 1 and "\ufffd" not in written
    nats = results[0].text_loss * results[0].num_text_tokens
    bits = nats / math.log(2) / len(written.encode())
    np.testing.assert_allclose([r.bits_per_byte for r in results], bits, rtol=RTOL)


def test_a_loss_mask_leaves_out_nats_and_bytes_alike(dataset, model, monkeypatch):
    """Only "cat" is learnt: the bits of its tokens, per byte of its tokens."""
    original = RecordSource.record
    cat = model.tokenizer.encode("the cat")[1:]
    assert model.tokenizer.decode(cat) == "cat" and len(cat) == 1

    def record(source, index):
        found = original(source, index)
        return dataclasses.replace(found, loss_mask=np.isin(found.tokens, cat))

    everything = evaluate(model, dataset)
    monkeypatch.setattr(RecordSource, "record", record)
    result = evaluate(model, dataset)
    assert 0 < result.num_tokens == result.num_text_tokens < everything.num_tokens
    num_first = sum(text.startswith("cat") for text in texts(dataset, "valid"))
    num_bytes = len(" cat") * result.num_tokens - num_first
    bits = result.text_loss * result.num_text_tokens / math.log(2) / num_bytes
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=RTOL)
    monkeypatch.setattr(
        RecordSource,
        "record",
        lambda *args: dataclasses.replace(original(*args), loss_mask=np.zeros(25, bool)),
    )
    assert math.isnan(evaluate(model, dataset).loss)


@pytest.mark.parametrize("loss_version", [None, 2])
def test_documents_are_masked_as_the_model_was_trained(dataset, model, loss_version):
    """Each piece of a document as if it stood alone: only distances between tokens count.

    The next document's first token is predicted by a model that was trained to do so.
    """
    source, losses, num_pieces = open_split(dataset, "valid"), [], 0
    for record in map(source.record, range(4)):
        for start, end in itertools.pairwise(sorted({0, *record.starts.tolist(), 24})):
            is_cut = end == 24 and end not in record.starts  # predicts the next record's first
            tokens = record.tokens[start : end + (loss_version is None or is_cut)]
            losses += losses_of(model.config, model.params, [tokens])[0].tolist()
            num_pieces += 1
    assert num_pieces > 4
    provenance = Provenance(mask_documents=True, loss_version=loss_version)
    masked = dataclasses.replace(model, provenance=provenance)
    result = dataset_perplexity(
        masked,
        Dataset.open(dataset),
        "valid",
        batch_size=4,
        max_records=4,
        execution=Execution(),
    )
    assert len(losses) == result.num_tokens
    assert (len(losses) == 4 * 24) == (loss_version is None)
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


def test_a_batch_larger_than_the_split_is_the_whole_split(dataset, model):
    result = evaluate(model, dataset, batch_size=10**20)
    assert result.num_tokens == evaluate(model, dataset).num_tokens


def test_a_byte_order_mark_is_not_measured(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe cat\n")
    assert official_text(tmp_path / "a.txt") == "the cat\n"


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


@pytest.mark.parametrize("trained", [8, None])
def test_chunks_longer_than_the_training_sequences_get_a_warning(model, trained, monkeypatch):
    """Where that is not known, the model's max_seq_len has to do."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    model = dataclasses.replace(model, provenance=Provenance(sequence_length=trained))
    limit = trained or model.config.max_seq_len
    text = " sat on a mat \n" * 12
    official_perplexity(model, text, execution=Execution(), chunk=limit + 1, max_chunks=1)
    assert warnings == []
    official_perplexity(model, text, execution=Execution(), chunk=limit + 2, max_chunks=1)
    assert f"chunks of {limit + 2} tokens" in warnings[0] and f"sequences of {limit}" in warnings[0]


def test_the_first_chunks_alone_are_measured(model):
    text = " sat on a mat \n" * 12
    ids = np.array([model.tokenizer.bos_id, *model.tokenizer.encode(text)])[:40].reshape(2, 20)
    result = official_perplexity(model, text, execution=Execution(), chunk=20, max_chunks=2)
    expected = losses_of(model.config, model.params, ids).mean()
    np.testing.assert_allclose(result.loss, expected, rtol=RTOL)
    assert result.num_tokens == 2 * 19


def test_a_loss_beyond_the_exponential_is_an_infinite_perplexity():
    result = Perplexity(800.0, 1, 700.0, 1, 1.0)
    assert result.perplexity == math.inf and result.text_perplexity == math.exp(700)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".BZ2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ],
)
def test_compressed_text_is_read_as_prepare_reads_it(tmp_path, suffix, compress):
    raw = " \n = Titlé = \n".encode() * 9
    (tmp_path / "wiki.raw").write_bytes(raw)
    path = tmp_path / f"wiki.raw{suffix}"
    path.write_bytes(compress(raw))
    assert official_text(path) == official_text(tmp_path / "wiki.raw")
    path.write_bytes(compress(raw)[:-6])
    with pytest.raises(UserError, match="truncated|damaged"):
        official_text(path)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the shared WikiText-2 is not here")
def test_official_text_of_wikitext_2_is_that_of_the_hugging_face_rows():
    text = official_text(WIKITEXT / "wiki.test.raw.xz")
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/figures.json", "No such file"),
        ("folder", "is a folder; name a file"),
        ("locked/figures.json", "Permission denied"),
        ("kept.json", "Permission denied"),
        ("device", "is a device; name a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "kept.json").write_text("kept")
    (tmp_path / "kept.json").chmod(0o400)
    if message == "Permission denied" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        check_can_write(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "kept.json").read_text() == "kept"
