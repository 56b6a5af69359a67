"""`mobilellm doctor`: every check says what is wrong and how to mend it."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
from hf_folders import train_small_tokenizer
from model_cases import save_params
from prepared import make_documents, run_prepare, write_lines

from mobilellm_jax import cli
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.training import checks
from mobilellm_jax.training.checks import CHECKS, Finding, RunChecks
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


def without_compiling(monkeypatch):
    monkeypatch.setattr(RunChecks, "check_memory", lambda _: Finding("ok", "not asked"))


def test_a_run_that_would_start_has_no_fail(doctor, home):
    status, found = doctor()
    assert status == 0
    assert tuple(found) == CHECKS
    assert {level for level, _ in found.values()} == {"ok", "warn"}
    assert "8 x cpu in 1 process" in found["devices"][1]
    assert "data 4, fsdp 2" in found["mesh"][1]
    assert "8 sequences per step = 1 on a device x 8 devices" in found["batch"][1]
    assert "starts from scratch" in found["resume"][1]
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    ("override", "check", "message"),
    [
        ("--config.data.path=nowhere", "data", "nowhere"),
        ("--config.model.vocab_size=301", "data", "set --config.model.vocab_size=300"),
        ("--config.mesh.fsdp=3", "mesh", "the nearest that works: --config.mesh.data="),
        ("--config.train.global_batch_size=12", "batch", "does not split into .*: use"),
        ("--config.execution.attention=cudnn", "kernel", "needs an NVIDIA GPU .* Use 'auto'"),
        ("--config.optimizer.warmup_steps=12", "schedule", "warmup_steps = 12 leaves nothing"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(doctor, monkeypatch, override, check, message):
    without_compiling(monkeypatch)
    status, found = doctor(override)
    assert status == 2
    assert [name for name, (level, _) in found.items() if level == "FAIL"] == [check]
    assert re.search(message, found[check][1])


def test_the_model_is_counted_and_heads_beside_its_width_are_a_warning(home):
    def model_line(*overrides):
        config = load_config(str(home / "config.py"), list(overrides))
        return RunChecks(config, home / "run", RunCoordination()).check_model()

    found = model_line()
    # A block: queries, output 16 x 16 each; keys, values 16 x 8; three of 16 x 32; two norms.
    block = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16
    assert f"{2 * block + 16 + 300 * 16:,} parameters, {2 * block + 16:,} without" in found.text
    # 6 per weight and token; 6 per layer, head width and half of the 32 x 2 scores of a token.
    flops = 6 * (2 * (block - 32) + 300 * 16) + 6 * 2 * 16 * 32
    assert f"; {flops / 1e9:.3g} GFLOP per trained token" in found.text
    assert found.level == "ok"
    cache = 2 * 2 * 8 * 2  # keys and values, two blocks, 8 wide, 2 bytes
    assert f"{cache} bytes per token, {cache * 32 / 1e6:.1f} MB at 32" in found.text
    beside = model_line("--config.model.num_heads=4")
    assert beside.level == "warn"
    assert "4 heads of 8 are 32 wide, embed_dim is 16" in beside.text
    assert model_line("--config.model.num_heads=4", "--config.model.head_dim=0").level == "ok"


def test_checkpoints_to_come_and_repeated_text_are_counted(doctor, home, monkeypatch):
    """The newest is whole before the oldest goes; what is kept for good adds up."""
    without_compiling(monkeypatch)
    tokens = DatasetHeader.load(home / "data").splits["train"].num_tokens
    for steps, level in ((int(3.9 * tokens / 256), "ok"), (int(4.2 * tokens / 256), "warn")):
        overrides = [f"--config.train.num_steps={steps}", "--config.checkpoint.keep_every=10"]
        overrides += ["--config.checkpoint.every_steps=5"]
        _, found = doctor(*overrides)
        assert found["data"][0] == level
        assert f"the run takes {256 * steps / tokens:.2f} epochs" in found["data"][1]
        assert found["disk"][1].startswith(f"{2 + 1 + steps // 10} checkpoint(s) of ")


def test_a_step_takes_all_that_the_compiler_counts(home, monkeypatch):
    """A donated state is returned in place; the program lies in the same memory as its arrays."""
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=1000,
        output_size_in_bytes=850,
        alias_size_in_bytes=800,
        temp_size_in_bytes=300,
        generated_code_size_in_bytes=20,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: sizes)
    lowered = types.SimpleNamespace(compile=lambda: compiled)
    monkeypatch.setattr(checks.TrainProgram, "lower", lambda _: lowered)
    monkeypatch.setattr(checks, "_bytes_on_a_device", lambda _: 0)
    run = RunChecks(load_config(str(home / "config.py")), home / "run", RunCoordination())
    run.check_mesh()
    needed = (1000 + 50 + 300 + 20) * jax.local_device_count()
    for memory, level in ((needed - 1, "FAIL"), (needed, "warn"), (2 * needed, "ok")):
        monkeypatch.setattr(checks, "_machine_memory", lambda memory=memory: memory)
        assert run.check_memory().level == level

    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm.")

    lowered.compile = refuse
    with pytest.raises(UserError, match="Ran out of memory in hbm.*accumulation_steps"):
        run.check_memory()


def test_too_little_memory_is_a_fail_before_it_happens(doctor, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.training.checks._machine_memory", lambda: 1000)
    status, found = doctor()
    assert status == 2 and found["memory"][0] == "FAIL"
    assert "set config.mesh.fsdp" in found["memory"][1]


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_a_fail(doctor, tmp_path, monkeypatch):
    without_compiling(monkeypatch)
    config = ModelConfig(**default_config().model.to_dict() | {"num_layers": 1, "vocab_size": 8})
    save_params(tmp_path / "other", config, {"embedding": np.zeros((8, 4), np.float32)})
    status, found = doctor(workdir=tmp_path / "other")
    assert status == 2 and found["resume"][0] == "FAIL"
    assert "num_layers" in found["resume"][1]
    shutil.copytree(tmp_path / "other", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "0" / "metadata.json").write_text("{}")
    status, found = doctor(workdir=tmp_path / "damaged")
    assert status == 2 and found["resume"][0] == "FAIL"


def test_what_train_would_not_go_on_with_is_a_fail(doctor, home, tmp_path, monkeypatch):
    without_compiling(monkeypatch)
    model = model_config(load_config(str(home / "config.py")))
    arrays = init_params(model, jax.random.key(0))
    tokenizer = (home / "data" / "tokenizer.model").read_bytes()
    save_params(tmp_path / "same", model, arrays, tokenizer)
    _, found = doctor(workdir=tmp_path / "same")
    assert found["resume"] == ("ok", f"{tmp_path / 'same'}: goes on from step 0, which is whole")
    another = train_small_tokenizer(tmp_path / "another.model")
    save_params(tmp_path / "tokenizer", model, arrays, another)
    save_params(tmp_path / "order", model, arrays, tokenizer, {"sample_order": {"seed": 7}})
    for name, message in [("tokenizer", "another tokenizer"), ("order", "seed was 7, is 0")]:
        status, found = doctor(workdir=tmp_path / name)
        assert status == 2 and found["resume"][0] == "FAIL"
        assert message in found["resume"][1]


def a_file(workdir):
    workdir.write_text("mine")


def below_a_file(workdir):
    workdir.parent.write_text("mine")


def a_dead_link(workdir):
    workdir.symlink_to("nowhere")


def with_a_file_for_checkpoints(workdir):
    workdir.mkdir()
    (workdir / "checkpoints").write_text("mine")


def of_another_run(workdir):
    workdir.mkdir()
    checks.lock_workdir(workdir)  # until the test is over


@pytest.mark.parametrize(
    ("name", "make", "overrides", "check"),
    [
        ("run", a_file, [], "workdir"),
        ("file/run", below_a_file, [], "workdir"),
        ("run", a_dead_link, [], "workdir"),
        ("run", with_a_file_for_checkpoints, [], "workdir"),
        ("run", of_another_run, [], "workdir"),
        ("/proc/none/run", lambda _: None, [], "workdir"),
        ("run", lambda _: None, ["--config.data.path=nowhere"], "data"),
        ("run", lambda _: None, ["--config.optimizer.warmup_steps=12"], "schedule"),
        ("run", lambda _: None, ["--config.mesh.fsdp=3"], "mesh"),
        ("run", lambda _: None, ["--config.train.global_batch_size=12"], "batch"),
        ("run", lambda _: None, ["--config.execution.attention=cudnn"], "kernel"),
    ],
)
def test_train_refuses_what_doctor_fails_in_the_same_words(
    doctor, home, tmp_path, capsys, monkeypatch, name, make, overrides, check
):
    without_compiling(monkeypatch)
    workdir = tmp_path / name
    make(workdir)
    status, found = doctor(*overrides, workdir=workdir)
    assert status == 2
    assert [name for name, (level, _) in found.items() if level == "FAIL"] == [check]
    assert refusal_of_train(home, workdir, capsys, *overrides) == found[check][1]


def refusal_of_train(home, workdir, capsys, *overrides):
    arguments = ["train", "--config", str(home / "config.py"), "--workdir", str(workdir)]
    assert cli.main([*arguments, f"--config.data.path={home / 'data'}", *overrides]) == 2
    return capsys.readouterr().err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(("checkpoints", "level"), [(0.9, "FAIL"), (2.9, "FAIL"), (3.1, "warn")])
def test_a_disk_that_cannot_hold_the_checkpoints_is_found_before_the_first_step(
    doctor, home, tmp_path, capsys, monkeypatch, checkpoints, level
):
    """Each is weights and two moments in fp32; two are kept beside the one that is written."""
    without_compiling(monkeypatch)
    # Embedding, two blocks of attention and feed-forward with their norms, the last norm.
    parameters = 300 * 16 + 2 * (16 * 8 * (2 + 1 + 1 + 2) + 3 * 16 * 32 + 2 * 16) + 16
    free = int(checkpoints * (3 * 4 * parameters * 1.02 + (1 << 20)))
    usage = lambda _: types.SimpleNamespace(free=free)  # noqa: E731
    monkeypatch.setattr(checks.shutil, "disk_usage", usage)
    overrides = ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep_every=5"]
    status, found = doctor(*overrides, workdir=tmp_path / "run")
    assert found["disk"][0] == level
    if level == "FAIL":
        assert status == 2 and "free some, lower config.checkpoint.keep_last" in found["disk"][1]
        assert refusal_of_train(home, tmp_path / "run", capsys, *overrides) == found["disk"][1]
        assert not (tmp_path / "run").exists()


def test_every_check_is_in_the_list():
    methods = {name for name in vars(RunChecks) if name.startswith("check_")}
    assert {f"check_{name}" for name in CHECKS} == methods


def test_a_damaged_newest_checkpoint_is_a_warning_if_an_older_one_is_whole(
    doctor, home, tmp_path, monkeypatch
):
    without_compiling(monkeypatch)
    model = model_config(load_config(str(home / "config.py")))
    tokenizer = (home / "data" / "tokenizer.model").read_bytes()
    save_params(tmp_path / "run", model, init_params(model, jax.random.key(0)), tokenizer)
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "0", steps / "3")
    (steps / "3" / "metadata.json").write_text("{}")
    status, found = doctor(workdir=tmp_path / "run")
    assert status == 0 and found["resume"][0] == "warn"
    assert "goes on from step 0, which is whole; the newer steps [3] are" in found["resume"][1]
    assert (steps / "3").exists()


def test_what_has_changed_in_a_run_that_goes_on_is_shown(doctor, home, tmp_path, monkeypatch):
    without_compiling(monkeypatch)
    config = load_config(str(home / "config.py"), [f"--config.data.path={home / 'data'}"])
    model, run = model_config(config), {"run": json.loads(config.to_json_best_effort())}
    tokenizer = (home / "data" / "tokenizer.model").read_bytes()
    arrays = init_params(model, jax.random.key(0))
    save_params(tmp_path / "run", model, arrays, tokenizer, run)
    _, found = doctor(workdir=tmp_path / "run")
    assert found["resume"] == ("ok", f"{tmp_path / 'run'}: goes on from step 0, which is whole")
    _, found = doctor("--config.optimizer.peak_lr=1e-3", workdir=tmp_path / "run")
    assert found["resume"][1].endswith("; changed config.optimizer.peak_lr: 0.002 -> 0.001")
    save_params(tmp_path / "m", model, arrays, tokenizer, run | {"mask_documents": True})
    status, found = doctor(workdir=tmp_path / "m")
    assert status == 2 and "trained with config.data.mask_documents = True" in found["resume"][1]
