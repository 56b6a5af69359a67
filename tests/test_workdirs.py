"""Folders that are something else are not taken for a run's, a model's, or its output's."""

import dataclasses
import shutil
import sys

import pytest
from hf_folders import TINY, make_params, train_small_tokenizer
from model_cases import save_params
from prepared import make_documents, run_prepare, write_lines

from mobilellm_jax import cli
from mobilellm_jax.checkpoints.loading import load_model, load_text_model
from mobilellm_jax.checkpoints.store import save_model
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import save_hf
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer
from mobilellm_jax.training.checks import RunChecks
from mobilellm_jax.training.run_config import default_config

CONFIG = dataclasses.replace(TINY, vocab_size=600)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_small_tokenizer(folder / "tokenizer.model")
    save_hf(folder / "hf", CONFIG, make_params(CONFIG), tokenizer_model=tokenizer)
    save_model(folder / "run", load_model(folder / "hf"))
    run_prepare([write_lines(folder / "a.jsonl")], folder / "data", vocab_size=310)
    (folder / "unsaved").mkdir()  # a run before its first checkpoint
    for name in ("config.json", "metrics.jsonl"):
        (folder / "unsaved" / name).write_text("{}\n")
    return folder


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("data", "a dataset"),
        ("hf", "an exported model"),
        ("run/checkpoints", "the checkpoints of a run"),
        ("run/checkpoints/0", "a checkpoint"),
    ],
)
def test_a_run_is_not_begun_inside_of_something_else(name, what, world):
    before = sorted(world.rglob("*"))
    checks = RunChecks(default_config(), world / name, RunCoordination())
    ((_, finding),) = checks.findings(["workdir"])
    assert finding.level == "FAIL" and f"{name}: is {what}, which a run would" in finding.text
    with pytest.raises(UserError, match=f"{name}: is {what}, which a run would"):
        save_model(world / name, load_model(world / "hf"))
    assert sorted(world.rglob("*")) == before


def test_a_run_goes_on_beside_what_was_put_into_its_workdir(world, tmp_path):
    for name in ("dataset.json", "SHA256SUMS"):
        (world / "run" / name).touch()
    checks = RunChecks(default_config(), world / "run", RunCoordination())
    ((_, finding),) = checks.findings(["workdir"])
    assert finding.level == "ok"
    for name in ("dataset.json", "SHA256SUMS"):
        (world / "run" / name).unlink()


def test_a_name_that_checkpoints_cannot_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"w\\udcff' is not UTF-8"):
        save_model(tmp_path / "w\udcff", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "loss.png"])
def test_a_folder_where_a_run_writes_a_file_is_found_before_it_starts(name, tmp_path):
    (tmp_path / name).mkdir()
    checks = RunChecks(default_config(), tmp_path, RunCoordination())
    ((_, finding),) = checks.findings(["workdir"])
    assert finding.level == "FAIL" and f"{name}: is a folder, and a run writes" in finding.text


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of macOS refuse the name")
def test_a_dataset_of_a_name_that_cannot_be_read_is_refused_when_it_is_opened(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "d\udcff")
    with pytest.raises(UserError, match=r"d\\udcff' is not UTF-8"):
        Dataset.open(tmp_path / "d\udcff")


def test_the_name_of_a_tokenizer_is_not_taken_for_its_bytes(tmp_path):
    params = make_params(CONFIG)
    with pytest.raises(UserError, match="bytes, not a str: Path"):
        save_hf(tmp_path / "hf", CONFIG, params, tokenizer_model="tokenizer.model")


@pytest.mark.parametrize("above", ["file", "loop"])
def test_a_workdir_below_what_is_no_folder_is_refused(above, world, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot write checkpoints here"):
        save_model(tmp_path / above / "x", load_model(world / "hf"))


def test_a_model_is_not_replaced_by_what_is_made_of_it(world, capsys):
    before = {path: path.read_bytes() for path in (world / "hf").iterdir()}
    hf = str(world / "hf")
    flags = ["--dtype", "q4_0", "--no-verify"]
    assert cli.main(["convert", "--to", "gguf", "--checkpoint", hf, "--output", hf, *flags]) == 2
    assert f"--output {hf} is the --checkpoint; choose another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (world / "hf").iterdir()} == before


def test_the_whole_file_system_is_no_output(world, capsys):
    flags = ["--checkpoint", str(world / "hf"), "--output", "/", "--no-verify"]
    assert cli.main(["convert", "--to", "gguf", *flags]) == 2
    assert "/: already holds something that is not" in capsys.readouterr().err


def test_a_run_without_checkpoints_is_not_taken_for_a_hugging_face_folder(world):
    with pytest.raises(UserError, match="unsaved: no checkpoint here; use a run's workdir"):
        load_model(world / "unsaved")
    with pytest.raises(UserError, match="data: no checkpoint here.*or a Hugging Face folder"):
        load_model(world / "data")


@pytest.mark.parametrize("name", ["hf", "run"])
def test_another_tokenizer_than_the_one_of_the_model_is_refused(name, world):
    other = world / "other.model"
    train_tokenizer(make_documents(60, seed=1), 320, other)
    with pytest.raises(UserError, match="other.model: is another tokenizer than that of .*leave"):
        load_text_model(world / name, other)
    own = world / name / ("" if name == "hf" else "checkpoints/0") / "tokenizer.model"
    assert load_text_model(world / name, own).tokenizer is not None


def test_a_folder_without_a_tokenizer_takes_any_that_fits(world, tmp_path):
    save_params(tmp_path / "run", CONFIG, make_params(CONFIG))
    assert load_text_model(tmp_path / "run", world / "tokenizer.model").tokenizer is not None
