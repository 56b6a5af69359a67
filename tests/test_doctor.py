"""`mobilellm doctor`: every check says what is wrong and how to mend it."""

import re
import shutil

import numpy as np
import pytest
from hf_folders import train_small_tokenizer
from model_cases import save_params
from prepared import make_documents, run_prepare, write_lines

from mobilellm_jax import cli
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.doctor import Examination, Finding
from mobilellm_jax.training.run_config import default_config, load_config, model_config

CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32)
    config.train.update(num_steps=12, global_batch_size=8)
    config.optimizer.update(warmup_steps=2)
    return config
"""
LINES = ["devices", "versions", "data", "mesh", "batch", "kernel", "workdir", "disk", "memory"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "config.py").write_text(CONFIG)
    lines = write_lines(folder / "text.jsonl", make_documents(200))
    run_prepare([lines], folder / "data", vocab_size=300, valid_fraction=0.1)
    return folder


@pytest.fixture
def doctor(home, capsys, devices):
    """Runs the verb: its exit status and name -> (level, text)."""

    def examine(*overrides, workdir=None):
        arguments = ["doctor", "--config", str(home / "config.py")]
        arguments += ["--workdir", str(workdir or home / "run")]
        arguments += [f"--config.data.path={home / 'data'}", *overrides]
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = exit.code
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return status, {name: (level, text) for level, name, text in lines}

    return examine


def test_a_run_that_would_start_has_no_fail(doctor, home):
    status, found = doctor()
    assert status == 0
    assert list(found) == LINES
    assert {level for level, _ in found.values()} == {"ok", "warn"}
    assert "8 x cpu in 1 process" in found["devices"][1]
    assert "data 4, fsdp 2" in found["mesh"][1]
    assert "8 sequences per step = 1 on a device x 8 devices" in found["batch"][1]
    assert "starts from scratch" in found["workdir"][1]
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    ("override", "check", "message"),
    [
        ("--config.data.path=nowhere", "data", "nowhere"),
        ("--config.model.vocab_size=301", "data", "set --config.model.vocab_size=300"),
        ("--config.mesh.fsdp=3", "mesh", "the nearest that works: --config.mesh.data="),
        ("--config.train.global_batch_size=12", "mesh", "does not split into .*: use"),
        ("--config.execution.attention=cudnn", "mesh", "needs an NVIDIA GPU .* Use 'auto'"),
        ("--config.checkpoint.keep_last=1000000000", "disk", "free in .*; free some, or lower"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(doctor, override, check, message):
    status, found = doctor(override)
    assert status == 2
    assert [name for name, (level, _) in found.items() if level == "FAIL"] == [check]
    assert re.search(message, found[check][1])


def test_checkpoints_to_come_and_repeated_text_are_counted(doctor, home, monkeypatch):
    """The newest is whole before the oldest goes; what is kept for good adds up."""
    monkeypatch.setattr(Examination, "memory", lambda _: Finding("ok", "not asked"))  # compiles
    tokens = DatasetHeader.load(home / "data").splits["train"].num_tokens
    for steps, level in ((int(3.9 * tokens / 256), "ok"), (int(4.2 * tokens / 256), "warn")):
        overrides = [f"--config.train.num_steps={steps}", "--config.checkpoint.keep_every=10"]
        _, found = doctor(*overrides)
        assert found["data"][0] == level
        assert f"the run takes {256 * steps / tokens:.2f} epochs" in found["data"][1]
        assert found["disk"][1].startswith(f"{2 + 1 + steps // 10} checkpoints of ")


def test_too_little_memory_is_a_fail_before_it_happens(doctor, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.training.doctor._machine_memory", lambda: 1000)
    status, found = doctor()
    assert status == 2 and found["memory"][0] == "FAIL"
    assert "raise config.train.accumulation_steps" in found["memory"][1]


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_a_fail(doctor, tmp_path):
    config = ModelConfig(**default_config().model.to_dict() | {"num_layers": 1, "vocab_size": 8})
    save_params(tmp_path / "other", config, {"embedding": np.zeros((8, 4), np.float32)})
    status, found = doctor(workdir=tmp_path / "other")
    assert status == 2 and found["workdir"][0] == "FAIL"
    assert "num_layers" in found["workdir"][1]
    shutil.copytree(tmp_path / "other", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "0" / "metadata.json").write_text("{}")
    status, found = doctor(workdir=tmp_path / "damaged")
    assert status == 2 and found["workdir"][0] == "FAIL"


def test_what_train_would_not_go_on_with_is_a_fail(doctor, home, tmp_path):
    model = model_config(load_config(str(home / "config.py")))
    arrays = {"embedding": np.zeros((8, 4), np.float32)}
    tokenizer = (home / "data" / "tokenizer.model").read_bytes()
    save_params(tmp_path / "same", model, arrays, tokenizer)
    _, found = doctor(workdir=tmp_path / "same")
    assert found["workdir"] == ("ok", f"{tmp_path / 'same'}: goes on from step 0, which is whole")
    another = train_small_tokenizer(tmp_path / "another.model")
    save_params(tmp_path / "tokenizer", model, arrays, another)
    save_params(tmp_path / "order", model, arrays, tokenizer, {"sample_order": {"seed": 7}})
    for name, message in [("tokenizer", "another tokenizer"), ("order", "seed was 7, is 0")]:
        status, found = doctor(workdir=tmp_path / name)
        assert status == 2 and found["workdir"][0] == "FAIL"
        assert message in found["workdir"][1]
