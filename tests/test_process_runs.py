"""Training as several processes: they train as one, stop together, and end together on a fault."""

import fcntl
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from mobilellm_jax import load
from mobilellm_jax.checkpoints.files import load_checkpoint
from mobilellm_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location(
    "process_faults", ROOT / "benchmarks" / "process_faults.py"
)
faults = importlib.util.module_from_spec(_spec)
sys.modules["process_faults"] = faults  # for its dataclass
_spec.loader.exec_module(faults)

LOSS_TOLERANCE = 5e-6  # fp32, other numbers of processes and other meshes, 100 steps
pytestmark = pytest.mark.slow
ENDLESS = "--config.train.num_steps=100000"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    faults.make_inputs(folder)
    return folder


def losses(workdir):
    return [record["train/loss"] for record in read_metrics(workdir) if "train/loss" in record]


def assert_same_losses(workdir, reference):
    found = losses(workdir)
    assert len(found) == 100
    np.testing.assert_allclose(found, reference, rtol=0, atol=LOSS_TOLERANCE)


@pytest.fixture(scope="module")
def one_process(home):
    """The losses of one process with 8 devices."""
    command = [
        sys.executable, "-m", "mobilellm_jax", "train", "--config", str(home / "config.py"),
        "--workdir", str(home / "one"), f"--config.data.path={home / 'data'}",
    ]  # fmt: skip
    environment = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return losses(home / "one")


@pytest.fixture(scope="module")
def two_processes(home):
    """What two processes with 4 devices each printed."""
    with faults.Run(home, "two", 2, 4) as run:
        assert run.statuses() == [0, 0], run.output(0) + run.output(1)
    return run.output(0), run.output(1)


def test_two_processes_train_as_one(home, one_process, two_processes):
    assert "error" not in "".join(two_processes)
    assert_same_losses(home / "two", one_process)
    assert "step 100/100" in two_processes[0]
    assert "step 100/100" not in two_processes[1]  # process 0 logs for all


def test_a_stopped_and_a_killed_run_go_on_bitwise_on_the_same_mesh(home, two_processes):
    with faults.Run(home, "again", 2, 4) as run:
        run.wait_for(r"step +30/")
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.statuses() == [0, 0], run.output(0)
    with faults.Run(home, "again", 2, 4, "--config.checkpoint.every_steps=5") as run:
        run.wait_for(r"step +70/")
        run.processes[1].kill()
        assert run.processes[0].wait(faults.LIMIT_SECONDS) not in (0, 2), run.output(0)
    with faults.Run(home, "again", 2, 4) as run:
        assert run.statuses() == [0, 0], run.output(0)
    assert re.search(r"resuming from step (6[5-9]|[7-9]\d)", run.output(0)), run.output(0)
    assert len(losses(home / "again")) == 100
    assert losses(home / "again") == losses(home / "two")
    (_, expected), (_, found) = load(home / "two"), load(home / "again")
    chex.assert_trees_all_equal(found, expected)


def test_a_signal_to_one_saves_in_all_and_other_numbers_and_meshes_go_on(home, one_process):
    with faults.Run(home, "many", 4, 2) as run:
        run.wait_for(r"step +20/")
        run.processes[2].send_signal(signal.SIGTERM)
        assert run.statuses() == [0] * 4, "\n".join(map(run.output, range(4)))
        stops = {re.search(r"stopped by a signal, step (\d+)", run.output(i))[1] for i in range(4)}
    (stop,) = map(int, stops)
    assert 20 <= stop < 90 and "SIGTERM: saving" in run.output(2)
    assert load_checkpoint(home / "many").provenance.step == stop

    arguments = ["--config.mesh.fsdp=4", "--config.checkpoint.every_steps=5"]
    with faults.Run(home, "many", 2, 2, *arguments) as run:
        run.wait_for(rf"step +{stop + 8}/")
        run.processes[1].kill()
        assert run.processes[0].wait(faults.LIMIT_SECONDS) not in (0, 2), run.output(0)
    assert f"resuming from step {stop}" in run.output(0)

    with faults.Run(home, "many", 1, 2, "--config.mesh.data=2", "--config.mesh.fsdp=1") as run:
        assert run.statuses() == [0], run.output(0)
    assert "resuming from step" in run.output(0)
    assert_same_losses(home / "many", one_process)


def test_processes_that_disagree_end_before_the_first_step_and_show_it(home):
    own = {1: ["--config.optimizer.peak_lr=0.5", f"--config.data.path={home}/./data"]}
    with faults.Run(home, "disagree", 2, [2, 3], own=own) as run:
        assert run.statuses(60) == [2, 2]
    for output in (run.output(0), run.output(1)):
        assert "config.optimizer.peak_lr: 0.5 on process 1, 0.002 on process 0" in output
        assert "devices.per process: 3 on process 1, 2 on process 0" in output
        assert "dataset." in output and "Traceback" not in output
    assert not (home / "disagree").exists()


def test_a_peer_that_never_arrives_is_named(home):
    with faults.Run(home, "missing", 3, 1, "--arrival_seconds=8", absent=(1,)) as run:
        assert run.statuses(60) == [2, 2]
    for number in (0, 2):
        output = run.output(number)
        assert "error: process 1 of 3 did not arrive at localhost:" in output, output
        assert "within 8 s" in output and "@ " not in output  # no stack


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_of_one_process_ends_the_other_with_its_reason(home, number):
    own = {number: ["--config.data.path=nowhere"]}
    with faults.Run(home, "alone", 2, 1, own=own) as run:
        statuses = run.statuses(60)
    assert statuses == [2, 2]  # a scheduler must not start it again
    for output in (run.output(0), run.output(1)):
        assert "nowhere: not a finished dataset" in output and "Traceback" not in output
    assert f"process {number}: " in run.output(1 - number)


def test_a_workdir_in_use_ends_all(home):
    (home / "held").mkdir()
    descriptor = os.open(home / "held", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with faults.Run(home, "held", 2, 1) as run:
        assert run.statuses(60) == [2, 2]
    os.close(descriptor)
    assert all("another run is training there" in run.output(i) for i in range(2))


@pytest.mark.parametrize(
    ("fault", "victim", "said"),
    [
        ("kill", 1, "no answer from process 1"),
        ("kill", 0, ""),  # JAX is faster
        ("freeze", 1, "unhealthy (stopped sending heartbeats):\n1"),
    ],
)
def test_a_killed_or_frozen_peer_ends_the_other(home, fault, victim, said):
    with faults.Run(home, f"{fault}-{victim}", 2, 1, ENDLESS) as run:
        ending = faults.try_fault(run, fault, victim, "step")
        assert ending.good and said in run.output(1 - victim), (ending, run.output(1 - victim))


def test_a_process_that_lives_but_hangs_is_noticed_and_found(home):
    with faults.Run(home, "hangs", 2, 1, ENDLESS, "--stall_seconds=5") as run:
        ending = faults.try_fault(run, "hang", 1, "step")
        assert ending.good and ending.statuses == [75, 75], ending
        assert ending.seconds < 20
    place = r"process 1: .*at training/trainer.py:\d+: if due := self.due"
    assert re.search(place, run.output(0)), run.output(0)


SLOW_SAVE = """
from mobilellm_jax.checkpoints import store as checkpoints

def write_manifest(*arguments, original=checkpoints.write_manifest):
    time.sleep(8)
    return original(*arguments)

checkpoints.write_manifest = write_manifest
"""


def test_a_last_save_that_takes_longer_than_a_stall_is_waited_for(home, tmp_path):
    (tmp_path / "data").symlink_to(home / "data")
    (tmp_path / "config.py").write_text(faults.CONFIG + SLOW_SAVE)
    with faults.Run(tmp_path, "slow", 2, 1, ENDLESS, "--stall_seconds=2") as run:
        run.wait_for(r"step +5/")
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.statuses() == [0, 0], run.output(0) + run.output(1)
    step = load_checkpoint(tmp_path / "slow").provenance.step
    assert f"step {step} is saved" in run.output(0)
