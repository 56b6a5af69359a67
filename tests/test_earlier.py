"""Datasets, workdirs and exports that earlier commits wrote are still read, and mean the same.

tests/earlier has artefacts of three commits, written by their own code (the first one, the first
with compact Hugging Face folders, the last before the rooms were rebuilt), and in expected.json
their own results: a model of two blocks that run twice, trained for three steps.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mobilellm_jax
from mobilellm_jax.checkpoints.loading import load_text_model
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.evaluation.perplexity import dataset_perplexity
from mobilellm_jax.inference.generate import generate_tokens
from mobilellm_jax.inference.sampling import Sampling
from mobilellm_jax.model.execution import Execution

ROOT = Path(__file__).resolve().parents[1]
ARCHIVES = sorted((ROOT / "tests" / "earlier").glob("*.tar.xz"))
RTOL = 1e-5  # sums of fp32 in another order
GREEDY = Sampling(temperature=0)
# Losses of steps 4 and 5 and the last evaluation, as the commit's own code goes on.
RESUMED = {
    "be9666d": (7.095317840576172, 6.724276542663574, 6.854830384254456),
    "7bc9d41": (7.0953216552734375, 6.724313735961914, 6.854831218719482),
    "d7c0eb1": (6.87691593170166, 6.5484938621521, 6.262301564216614),
}


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def earlier(request, tmp_path):
    """Folder of an unpacked archive, and what its commit made of it."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path, json.loads((tmp_path / "expected.json").read_text())


def params_sha256(params):
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(path.encode() + np.asarray(leaf, "<f4").tobytes())
    return digest.hexdigest()


def test_three_commits_are_here():
    assert len(ARCHIVES) == 3


def test_a_dataset_has_the_same_records(earlier):
    folder, expected = earlier
    dataset, source = Dataset.open(folder / "dataset"), open_split(folder / "dataset", "train")
    dataset.header.verify_shards(folder / "dataset")
    assert dataset.header.format_version == 1 and len(source) == expected["num_train_records"]
    record = source.record(0)
    assert record.tokens.tolist() == expected["first_record_tokens"] and record.loss_mask is None


def test_workdirs_and_folders_hold_the_same_model(earlier):
    folder, expected = earlier
    places = [folder / name for name in ("workdir", "hf", "hf_compact") if (folder / name).exists()]
    assert len(places) >= 2
    for place in places:
        config, params = mobilellm_jax.load(place)
        assert params_sha256(params) == expected["params_sha256"], place
        assert (config.num_layers, config.depth, config.sharing) == (2, 4, "immediate")
    model = load_text_model(places[0])
    steps = generate_tokens(
        model.config,
        model.params,
        [expected["greedy_prompt_ids"]],
        max_tokens=len(expected["greedy_ids"]),
        sampling=GREEDY,
    )
    assert [int(step[0]) for step in steps] == expected["greedy_ids"]
    assert dataclasses.asdict(load_text_model(places[-1]).prompt)["bos"] in (None, True)
    found = dataset_perplexity(
        model,
        Dataset.open(folder / "dataset"),
        "valid",
        batch_size=4,
        max_records=16,
        execution=Execution(),
    )
    np.testing.assert_allclose(found.loss, expected["eval_loss"], rtol=RTOL)


@pytest.mark.slow
def test_a_run_goes_on(earlier):
    folder, expected = earlier
    model = json.loads((folder / "workdir" / "config.json").read_text())
    (folder / "config.py").write_text(
        "from mobilellm_jax.training.run_config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.update({model!r})\n"
        "    config.train.num_steps = 5\n"
        "    return config\n"
    )
    command = ["train", "--config", "config.py", "--workdir", "workdir"]
    done = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stdout
    lines = (folder / "workdir" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [r["train/loss"] for r in records if r["step"] > 3 and "train/loss" in r]
    losses.append([r["eval/loss"] for r in records if "eval/loss" in r][-1])
    np.testing.assert_allclose(losses, RESUMED[expected["commit"][:7]], rtol=RTOL)
