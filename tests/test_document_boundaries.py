"""With `data.mask_documents`, no document is asked what the next one begins with."""

import json

import numpy as np
import pytest
from prepared import DOCUMENTS, run_prepare, write_lines

from mobilellm_jax.checkpoints.files import read_metadata
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import eval_batches, open_split, train_batches
from mobilellm_jax.training import run_data
from mobilellm_jax.training.metrics import read_metrics
from mobilellm_jax.training.run_config import load_config, model_config
from mobilellm_jax.training.run_data import RunData
from mobilellm_jax.training.trainer import _Run, train

T = 16
CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=16)
    config.train.update(num_steps=2, global_batch_size=8)
    config.optimizer.update(peak_lr=1e-2, warmup_steps=1, schedule="wsd", decay_fraction=0.0)
    config.log.every_steps = config.eval.every_steps = 1
    config.data.mask_documents = True
    return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config, and datasets of short documents with and without BOS and EOS."""
    folder = tmp_path_factory.mktemp("boundaries")
    (folder / "config.py").write_text(CONFIG)
    texts = [text[: 1 + 7 * i % 40] for i, text in enumerate(DOCUMENTS)]
    lines = write_lines(folder / "text.jsonl", texts)
    for name, marks in (("plain", False), ("marks", True)):
        settings = {"vocab_size": 300, "valid_fraction": 0.3, "sequence_length": T}
        run_prepare([lines], folder / name, bos=marks, eos=marks, **settings)
    return folder


def config_of(home, *overrides):
    path = f"--config.data.path={home / 'plain'}"
    return load_config(str(home / "config.py"), [path, *overrides])


@pytest.mark.parametrize("name", ["plain", "marks"])
def test_only_the_first_token_of_the_next_document_loses_its_weight(home, name):
    """By walking over the tokens; the last target of a record begins a document now and then."""
    source = open_split(home / name, "valid")
    expected, last_targets = [], 0
    for record in map(source.record, range(len(source))):
        starts = record.starts.tolist()
        last_targets += T in starts
        expected.append([t < record.num_valid and t not in starts for t in range(1, T + 1)])
    assert last_targets and 0 in expected[0]
    settings = {"batch_size": len(source), "across_documents": False}
    batch = next(eval_batches(source, **settings))
    assert batch["loss_weights"].tolist() == expected
    assert (batch["text_weights"] <= batch["loss_weights"]).all()
    crosses = np.diff(batch["segment_ids"], axis=1) != 0
    assert batch["loss_weights"][:, :-1][crosses].sum() == 0 < crosses.sum()
    everything = next(eval_batches(source, batch_size=len(source)))["loss_weights"].sum()
    assert everything == source.header.splits["valid"].num_tokens


def test_training_leaves_the_same_targets_out_and_nothing_else(home):
    datasets = [(Dataset.open(home / "plain"), 1.0)]
    settings = {"seed": 0, "global_batch_size": 8, "sequence_length": T, "num_steps": 1}
    within = next(train_batches(datasets, **settings, across_documents=False))
    across = next(train_batches(datasets, **settings))
    seams = across.pop("loss_weights") - within.pop("loss_weights")
    assert all((across[name] == within[name]).all() for name in across)
    crosses = np.diff(across["segment_ids"], axis=1) > 0
    assert (seams[:, :-1] == crosses).all() and crosses.sum() > 4


def test_a_run_begun_before_keeps_its_loss_and_says_so(home):
    def data(*overrides):
        config = config_of(home, *overrides)
        return RunData(config, model_config(config))

    masked, free = {"mask_documents": True}, {"mask_documents": False}
    for metadata, step, across in (
        (masked, 3, True),  # before there were versions
        (masked | {"loss_version": 1}, 3, True),
        (masked | {"loss_version": 2}, 3, False),
        (masked, 0, False),  # weights that were imported: a run that begins
        (free, 3, False),  # it never had that loss
    ):
        run = data()
        assert ("keeps that loss" in run.keep_loss(step, metadata)) == across
        assert run.across_documents == across
    run = data("--config.data.mask_documents=False")
    assert run.keep_loss(3, masked) == "" and run.across_documents


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_resumed_run_has_bitwise_the_loss_it_began_with(
    home, tmp_path, monkeypatch, capfd, version
):
    monkeypatch.setattr(run_data, "LOSS_VERSION", version)
    longer = config_of(home, "--config.train.num_steps=4")
    train(longer, tmp_path / "whole")
    metadata = _Run.metadata

    def earlier(run, step):
        return {k: v for k, v in metadata(run, step).items() if k != "loss_version"}

    if version == 1:
        monkeypatch.setattr(_Run, "metadata", earlier)
    train(config_of(home), tmp_path / "resumed")
    monkeypatch.undo()
    capfd.readouterr()
    train(longer, tmp_path / "resumed")
    assert capfd.readouterr().out.count("it keeps that loss") == (version == 1)
    saved = read_metadata(tmp_path / "resumed" / "checkpoints" / "4")
    assert saved["loss_version"] == version
    curves = [
        json.dumps(
            [{k: v for k, v in r.items() if "/loss" in k} for r in read_metrics(tmp_path / name)]
        )
        for name in ("whole", "resumed")
    ]
    assert curves[0] == curves[1]
