"""The training command as a process: resume, signals, damage and refusals."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from prepared import make_documents, run_prepare, write_lines

from mobilellm_jax import load
from mobilellm_jax.checkpoints import store as checkpoints
from mobilellm_jax.checkpoints.files import load_checkpoint, read_metadata
from mobilellm_jax.checkpoints.store import save_model
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.model_bundle import ModelBundle, PromptFormat
from mobilellm_jax.training import trainer
from mobilellm_jax.training.failures import Diverged, finite_metrics, memory_errors
from mobilellm_jax.training.metrics import read_metrics
from mobilellm_jax.training.program import TrainProgram
from mobilellm_jax.training.run_config import default_config, load_config, model_config
from mobilellm_jax.training.run_data import RunData
from mobilellm_jax.training.trainer import _Run, train

ROOT = Path(__file__).parents[1]
CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32, sharing="immediate", num_repeats=2)
    config.train.num_steps = 12
    config.train.global_batch_size = 8
    config.optimizer.update(peak_lr=1e-2, warmup_steps=2)
    config.log.every_steps = 1
    config.eval.update(every_steps=4, num_records=8)
    config.checkpoint.update(every_steps=4, keep_last=2)
    return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config, a dataset of 32-token records, and a finished run."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "config.py").write_text(CONFIG)
    lines = write_lines(folder / "text.jsonl", make_documents(200))
    run_prepare([lines], folder / "data", vocab_size=300, valid_fraction=0.1)
    finished = run(folder, "whole")
    assert finished.returncode == 0, finished.stderr
    return folder


def command(home, name, *overrides):
    return [
        sys.executable, "-m", "mobilellm_jax", "train", "--config", str(home / "config.py"),
        "--workdir", str(home / name), f"--config.data.path={home / 'data'}", *overrides,
    ]  # fmt: skip


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(home, name, *overrides):
    return subprocess.run(
        command(home, name, *overrides), env=ENVIRONMENT, capture_output=True, text=True
    )


def start(home, name, *overrides):
    return subprocess.Popen(
        command(home, name, *overrides),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_line(process, pattern):
    for line in process.stdout:
        if re.search(pattern, line):
            return
    raise AssertionError(f"{pattern!r} never came")


def curve(workdir):
    """Everything that is logged but times and rates."""
    return [
        {k: v for k, v in record.items() if k != "time" and not k.startswith("throughput")}
        for record in read_metrics(workdir)
    ]


def weights_hash(workdir):
    _, params = load(workdir)
    leaves = [params[key] for key in sorted(params)]
    digest = hashlib.sha256()

    def add(tree):
        if isinstance(tree, dict):
            for key in sorted(tree):
                add(tree[key])
        else:
            digest.update(np.asarray(tree).tobytes())

    for leaf in leaves:
        add(leaf)
    return digest.hexdigest()


def assert_same_run(home, name):
    assert curve(home / name) == curve(home / "whole")
    assert weights_hash(home / name) == weights_hash(home / "whole")


def test_a_run_leaves_what_one_expects(home):
    workdir = home / "whole"
    records = curve(workdir)
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(1, 13))
    assert {"train/learning_rate", "train/grad_norm"} <= train[0].keys()
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.5
    evals = [r for r in records if "eval/loss" in r]
    assert [r["step"] for r in evals] == [4, 8, 12]
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    names = ("loss", "perplexity", "text_loss", "text_perplexity", "bits_per_byte")
    assert {f"eval/{name}" for name in names} <= evals[0].keys()
    logged = read_metrics(workdir)[-2]
    assert logged["throughput/tokens_per_second"] > 0
    assert "throughput/mfu" not in logged  # of a peak that nobody has published
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 12
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]
    assert list((workdir / "tensorboard").iterdir())
    metadata = read_metadata(workdir / "checkpoints" / "12")
    assert metadata["step"] == 12 and metadata["position"] == 96


def test_a_finished_run_says_so_and_exits_0(home):
    again = run(home, "whole")
    assert again.returncode == 0 and "finished" in again.stdout
    assert len(curve(home / "whole")) == 15


def test_kill_9_and_rerun_is_bitwise_the_same_run(home):
    with start(home, "killed") as process:
        wait_for_line(process, "step  5/12")
        while not (home / "killed" / "checkpoints" / "4").exists():
            assert process.poll() is None
        process.kill()
    resumed = run(home, "killed")
    assert resumed.returncode == 0 and "resuming from step" in resumed.stdout, resumed.stderr
    assert "changed" not in resumed.stdout and "warning" not in resumed.stdout
    assert_same_run(home, "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_current_step_and_exits_0(home, number, as_in_a_terminal):
    name = f"stopped-{number}"
    with start(home, name, "--config.checkpoint.every_steps=1000") as process:
        wait_for_line(process, "step  2/12")
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    step = load_checkpoint(home / name).provenance.step
    assert 2 <= step < 12 and f"step {step} is saved" in rest
    assert run(home, name, "--config.checkpoint.every_steps=1000").returncode == 0
    assert_same_run(home, name)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_loudly(home):
    name = "damaged"
    assert run(home, name, "--config.checkpoint.keep_last=3").returncode == 0
    params = home / name / "checkpoints" / "12" / "params"
    victim = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    again = run(home, name, "--config.checkpoint.keep_last=3")
    assert again.returncode == 0, again.stderr
    assert "resuming from step 8" in again.stdout
    assert "DAMAGED" in again.stderr and str(victim.relative_to(params)) in again.stderr
    assert (home / name / "checkpoints_damaged" / "12-0").is_dir()
    assert_same_run(home, name)


@pytest.mark.slow
def test_divergence_stops_the_run_and_is_not_saved(home):
    overrides = ["--config.optimizer.peak_lr=1e30", "--config.optimizer.clip_norm=1e30"]
    failed = run(home, "diverged", *overrides, "--config.checkpoint.every_steps=1")
    assert failed.returncode == 2
    assert re.search(r"error: step \d+: .*(nan|inf|NaN).*lower config.optimizer.peak_lr",
                     failed.stderr), failed.stderr  # fmt: skip
    _, params = load(home / "diverged")
    assert all(np.isfinite(p).all() for p in [params["embedding"], params["final_norm"]["scale"]])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.num_layers=3"], r"num_layers is 2 there, 3 here"),
        (["--config.train.global_batch_size=4"], "global_batch_size was 8, is 4"),
        (["--config.seed=1"], "seed was 0, is 1"),
        (["--config.data.mask_documents=true"], "trained with config.data.mask_documents = False"),
    ],
)
def test_a_workdir_of_another_run_is_refused(home, overrides, message):
    failed = run(home, "whole", "--config.train.num_steps=20", *overrides)
    assert failed.returncode == 2 and re.search(message, failed.stderr), failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.data.path=nowhere"], "nowhere: not a finished dataset"),
        (["--config.data.path="], "config.data.path is empty"),
        (["--config.model.vocab_size=400"], "300 pieces, but config.model.vocab_size = 400"),
        (["--config.model.max_seq_len=16"], "sequences of 32 tokens"),
        (["--config.optimizer.warmup_steps=12"], "warmup_steps = 12 leaves nothing"),
        (["--config.optimizer.pek_lr=1"], r"did you mean --config.optimizer.peak_lr\?"),
        (["--config.data.path=nowhere=a"], "has no number behind '='"),
        (["--config.mesh.data=3"], "does not multiply to the 1 devices"),
    ],
)
def test_bad_settings_exit_2_and_leave_no_checkpoint(home, overrides, message):
    failed = run(home, "refused", *overrides)
    assert failed.returncode == 2 and re.search(message, failed.stderr), failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((home / "refused").glob("checkpoints/*"))


@pytest.mark.slow
def test_a_second_run_in_the_same_workdir_is_refused(home):
    with start(home, "held", "--config.train.num_steps=100000") as process:
        wait_for_line(process, "step  ")
        second = run(home, "held")
        process.kill()
    assert second.returncode == 2 and "another run is training there" in second.stderr


def test_a_dataset_without_a_train_split_is_refused(home):
    run_prepare([], home / "only-valid", valid_inputs=[home / "text.jsonl"], vocab_size=300)
    failed = run(home, "refused", f"--config.data.path={home / 'only-valid'}")
    assert failed.returncode == 2 and "has no train split, only valid" in failed.stderr


def test_a_mixture_of_two_tokenizers_is_refused_before_anything_is_written(home):
    lines = write_lines(home / "other.jsonl", make_documents(60, seed=9))
    run_prepare([lines], home / "other", vocab_size=300)
    mixture = f"--config.data.path={home / 'data'}=0.5,{home / 'other'}=0.5"
    failed = run(home, "mixed", mixture)
    assert failed.returncode == 2 and "made with different tokenizers" in failed.stderr
    assert not (home / "mixed").exists()


def test_a_workdir_that_is_a_file_is_refused(home):
    (home / "file").write_text("mine")
    failed = run(home, "file")
    assert failed.returncode == 2 and "cannot be written to (Not a directory)" in failed.stderr
    assert (home / "file").read_text() == "mine"


@pytest.mark.slow
def test_an_interrupted_run_may_be_lengthened(home):
    """Its schedule is the new one, and what that does to the learning rate is said."""
    assert run(home, "longer", "--config.train.num_steps=4").returncode == 0
    longer = run(home, "longer", "--config.train.num_steps=12")
    assert longer.returncode == 0 and "resuming from step 4" in longer.stdout
    lines = longer.stdout.splitlines()
    assert [x for x in lines if x.startswith("changed")] == [
        "changed   config.train.num_steps: 4 -> 12"
    ]
    (warning,) = [line for line in lines if line.startswith("warning")]
    # A cosine from 0.01 to 0.001 after 2 steps: half of one over 2 more, a fifth of one over 10.
    assert "from 0.0055 at step 4 to 0.00914 at step 5, 1.7 times as much: lower" in warning
    assert load_checkpoint(home / "longer").provenance.step == 12


@pytest.mark.slow
def test_compiled_programs_outlive_a_run_and_damaged_ones_cost_time_only(home):
    """In a cache of the user's own, wherever JAX_COMPILATION_CACHE_DIR does not name another."""
    caches = {"XDG_CACHE_HOME": str(home / "caches")}
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def train(name):
        return subprocess.run(
            command(home, name),
            env=ENVIRONMENT | caches | everything,
            capture_output=True,
            text=True,
        )

    assert train("compiles").returncode == 0
    (kept,) = (home / "caches" / "mobilellm_jax" / "compiled").glob("jit_train_step-*-cache")
    kept.write_bytes(kept.read_bytes()[:-1000])
    again = train("compiles_again")
    assert again.returncode == 0 and "Error reading persistent compilation cache" in again.stderr
    assert weights_hash(home / "compiles_again") == weights_hash(home / "whole")


@pytest.mark.parametrize("bad_step", [3, 4, 5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_of_any_pending_step_is_found(bad_step, bad):
    pending = {step: {"loss": np.float32(step), "grad_norm": np.float32(1)} for step in (3, 4, 5)}
    assert finite_metrics(pending) == {"loss": 5.0, "grad_norm": 1.0}
    pending[bad_step]["grad_norm"] = np.float32(bad)
    with pytest.raises(Diverged, match=f"step {bad_step}: grad_norm = {bad}; "):
        finite_metrics(pending)


def test_the_last_step_is_logged_evaluated_and_saved_whatever_the_intervals():
    run = object.__new__(_Run)
    run.config = default_config()
    run.config.train.num_steps = 1010
    run.config.log.every_steps = run.config.eval.every_steps = 300
    assert run.due(1010, False) == {"log", "eval", "save"}
    assert run.due(1009, False) == set() and run.due(1009, True) == {"save"}
    assert run.due(900, False) == {"log", "eval"} and run.due(1000, False) == {"save"}
    run.config.eval.every_steps = 0
    assert run.due(1010, False) == {"log", "save"}


def test_other_errors_than_those_of_memory_pass_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors("a fix"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_a_checkpoint_says_how_documents_were_read(home, monkeypatch):
    run_prepare([home / "text.jsonl"], home / "no-bos", vocab_size=300, bos=False)
    for folder, bos, mask in (("data", True, True), ("no-bos", False, False)):
        overrides = [f"--config.data.path={home / folder}", f"--config.data.mask_documents={mask}"]
        run = _Run(
            load_config(str(home / "config.py"), overrides), home / "unused", RunCoordination()
        )
        metadata = run.metadata(5)
        assert (metadata["bos"], metadata["mask_documents"]) == (bos, mask)
        assert (metadata["loss_version"], metadata["sequence_length"]) == (2, 32)
        assert metadata["position"] == 40 and metadata["run"]["data"]["mask_documents"] == mask
    monkeypatch.setattr(trainer, "MetricsLog", lambda workdir, **settings: settings)
    settings = run.metrics_log(home / "unused", 0)
    records = Dataset.open(home / "no-bos").header.splits["train"].num_records
    assert settings["tokens_per_step"] == 8 * 32 and settings["tokens_per_epoch"] == records * 32
    assert settings["peak_flops_total"] is None
    run.peak = 2e12
    total = run.metrics_log(home / "unused", 0)["peak_flops_total"]
    assert total == 2e12 * jax.device_count()


def test_a_run_does_not_go_on_with_other_data_or_shares(home):
    run_prepare([home / "text.jsonl"], home / "all", tokenizer=home / "data" / "tokenizer.model")

    def inputs(path):
        config = load_config(str(home / "config.py"), [f"--config.data.path={path}"])
        return RunData(config, model_config(config))

    metadata = {"sample_order": inputs(home / "data").sample_order()}
    inputs(home / "data").check_continues(home, metadata)
    with pytest.raises(UserError, match="order of samples would change: data was"):
        inputs(home / "all").check_continues(home, metadata)
    mixture = f"{home / 'data'}={{}},{home / 'all'}={{}}"
    metadata = {"sample_order": inputs(mixture.format(0.5, 0.5)).sample_order()}
    with pytest.raises(UserError, match=r"weights was \[0.5, 0.5\], is \[0.4, 0.6\]"):
        inputs(mixture.format(0.4, 0.6)).check_continues(home, metadata)


def one_step(home):
    """A config of one step, for `train` in this process."""
    overrides = [f"--config.data.path={home / 'data'}", "--config.train.num_steps=1"]
    return load_config(str(home / "config.py"), [*overrides, "--config.optimizer.warmup_steps=0"])


def test_training_goes_on_with_the_prompt_format_of_a_model_from_elsewhere(home):
    config = one_step(home)
    prompt = PromptFormat(bos=True, chat_template="{{ messages }}", stop_ids=(2, 13))
    model = ModelBundle(
        config=model_config(config),
        params=init_params(model_config(config), jax.random.key(0)),
        tokenizer=Dataset.open(home / "data").tokenizer,
        prompt=prompt,
    )
    save_model(home / "prompt-format", model)
    train(config, home / "prompt-format")
    trained = load_checkpoint(home / "prompt-format")
    assert (trained.provenance.step, trained.prompt) == (1, prompt)


def test_the_clock_of_the_first_step_starts_once_it_is_compiled(home, monkeypatch):
    told, compile = [], _Run.compile

    class Noting(RunCoordination):
        def start_clock(self):
            told.append("clock")

        def done(self, step):
            told.append(step)

    monkeypatch.setattr(_Run, "compile", lambda run: [compile(run), told.append("compiled")][0])
    train(one_step(home), home / "clock", Noting())
    assert told == ["compiled", "clock", 1]


def test_the_last_save_does_not_count_as_a_step(home, monkeypatch):
    """Of several processes each would otherwise end the run before the save is complete."""
    peers, found, original = RunCoordination(), [], checkpoints.write_manifest

    def write_manifest(*arguments):
        time.sleep(1)  # meanwhile the loop ends
        found.append(peers._busy)
        original(*arguments)

    monkeypatch.setattr(checkpoints, "write_manifest", write_manifest)
    train(one_step(home), home / "last", peers)
    assert found == ["finishing"]


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (TrainProgram, "init_state", "do not fit; set config.mesh.fsdp"),
        (_Run, "compile", "raise config.train.accumulation_steps"),
    ],
)
def test_too_little_memory_comes_with_a_mend_that_helps(home, monkeypatch, owner, name, message):
    def fail(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n  a long stack")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(UserError, match=rf"\(RESOURCE_EXHAUSTED: Out of memory\): .*{message}"):
        train(one_step(home), home / "memory")
