"""Faults: damaged files, failing and full disks, kill -9 and a second process lose nothing."""

import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from mobilellm_jax.checkpoints import store as training
from mobilellm_jax.checkpoints.store import Checkpoints
from mobilellm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FAULTS_PATH = ROOT / "benchmarks" / "checkpoint_faults.py"
_spec = importlib.util.spec_from_file_location("checkpoint_faults", FAULTS_PATH)
faults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faults)


def _save(workdir, *steps, keep_last=5, size=1000, **options):
    with Checkpoints(workdir, keep_last=keep_last, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, **faults.state(step, size))


def _restore(workdir, **options):
    with Checkpoints(workdir, keep_last=5) as checkpoints:
        return faults.restore(checkpoints, **options)


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _flip(path):
    faults.mutate(path, "flip", random.Random(0))


def _data_file(workdir, step, item="params"):
    folder = workdir / "checkpoints" / str(step) / item
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _run_faults(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, FAULTS_PATH, "--mutations=0", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# What is damaged is not used.


def test_a_damaged_step_is_reported_moved_aside_and_can_be_saved_again(tmp_path, caplog):
    _save(tmp_path, 1, 2, 3)
    _flip(_data_file(tmp_path, 3))
    (tmp_path / "checkpoints" / "2" / "metadata.json").unlink()
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        assert faults.restore(checkpoints).step == 1
        assert "3: params/" in caplog.text and "2: metadata.json: missing" in caplog.text
        assert sorted(os.listdir(tmp_path / "checkpoints_damaged")) == ["2-0", "3-0"]
        checkpoints.save(2, **faults.state(2))
    assert _restore(tmp_path).step == 2
    _flip(_data_file(tmp_path, 2))
    assert _restore(tmp_path).step == 1
    assert sorted(os.listdir(tmp_path / "checkpoints_damaged")) == ["2-0", "2-1", "3-0"]


def test_no_random_damage_of_100_gets_through(tmp_path):
    outcomes = faults.try_mutations(tmp_path, 100, seed=1)
    assert outcomes["SILENT"] == 0 and outcomes["noticed"] >= 80, outcomes


@pytest.mark.slow
def test_no_random_damage_of_500_gets_through(tmp_path):
    outcomes = faults.try_mutations(tmp_path, 500, seed=2)
    assert outcomes["SILENT"] == 0 and outcomes["noticed"] >= 400, outcomes


def test_a_step_without_its_manifest_is_not_valid(tmp_path):
    _save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    assert _restore(tmp_path).step == 1


def test_a_step_under_the_name_of_another_is_not_valid(tmp_path):
    _save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "9")
    assert _restore(tmp_path).step == 1


def test_an_explicit_damaged_or_missing_step_is_an_error(tmp_path):
    _save(tmp_path, 1, 2)
    _flip(_data_file(tmp_path, 2, "opt_state"))
    with pytest.raises(UserError, match="2 is damaged: opt_state/"):
        _restore(tmp_path, step=2)
    with pytest.raises(UserError, match=r"no step 3; it has \[1, 2\]"):
        _restore(tmp_path, step=3)
    assert _steps(tmp_path) == [1, 2]


def test_nothing_valid_is_an_error_each_time_and_never_a_fresh_start(tmp_path):
    _save(tmp_path, 1, 2)
    for step in (1, 2):
        _flip(_data_file(tmp_path, step))
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the steps \[1, 2\] is valid"):
            _restore(tmp_path)
    assert _steps(tmp_path) == [1, 2]


def test_a_half_written_step_is_ignored_and_cleaned_up(tmp_path):
    _save(tmp_path, 1)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert faults.restore(checkpoints).step == 1
        checkpoints.save(3, **faults.state(3))
    assert _steps(tmp_path) == [1, 3]


# Disks.


def test_too_little_free_space_stops_a_save_before_it_starts(tmp_path):
    _save(tmp_path, 1)
    with (
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
        pytest.raises(UserError, match="needs 1,060,820 bytes, 1,000 are free"),
    ):
        _save(tmp_path, 2)
    assert _steps(tmp_path) == [1]


def test_several_processes_save_on_a_disk_that_says_it_has_no_end(tmp_path):
    """Amazon EFS reports 8 EiB."""
    broadcast = "mobilellm_jax.checkpoints.store.multihost_utils.broadcast_one_to_all"
    with (
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=(1 << 63) - 1)),
        mock.patch("jax.process_count", return_value=2),
        mock.patch(broadcast, side_effect=lambda halves: halves),
    ):
        checkpoints._check_free_space({})


def test_a_save_that_fails_in_the_background_fails_the_next_one(tmp_path):
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        checkpoints.save(1, **faults.state(1))
        checkpoints.wait()
        failure = mock.patch(
            "mobilellm_jax.checkpoints.store.write_manifest", side_effect=OSError(28, "full")
        )
        with failure, pytest.raises(UserError, match="step 2 was not saved.*full"):
            checkpoints.save(2, **faults.state(2))
            checkpoints.save(3, **faults.state(3))
        checkpoints.save(3, **faults.state(3))
    assert _restore(tmp_path).step == 3
    assert _steps(tmp_path) == [1, 3]


def test_a_step_that_was_not_saved_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        failure = mock.patch.object(training, "write_manifest", side_effect=OSError(28, "full"))
        with failure, pytest.raises(UserError, match="step 2 was not saved.*full"):
            checkpoints.save(2, **faults.state(2))
            checkpoints.wait()
        checkpoints.save(2, **faults.state(2))
    assert _restore(tmp_path).step == 2


def test_a_full_disk_loses_no_older_step():
    # In a process of its own: Orbax's threads complain after the failure is over.
    done = _run_faults("--kills=0", "--full_disks=5")
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout


def test_an_error_of_the_run_is_not_hidden_by_one_of_its_last_save(tmp_path):
    failure = mock.patch(
        "mobilellm_jax.checkpoints.store.write_manifest", side_effect=OSError(28, "full")
    )
    with (
        pytest.raises(ZeroDivisionError),
        failure,
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
    ):
        checkpoints.save(1, **faults.state(1))
        raise ZeroDivisionError


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot write checkpoints here"):
        Checkpoints(tmp_path, keep_last=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only disk needs root")
def test_a_read_only_disk_is_refused_at_once(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
    try:
        with pytest.raises(UserError, match="Read-only file system"):
            Checkpoints(tmp_path, keep_last=1)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Being killed.


def test_kill_minus_9_during_saves_loses_nothing():
    done = _run_faults("--kills=5", "--full_disks=0")
    assert done.returncode == 0, done.stderr
    assert "LOST" not in done.stdout and "recovered" in done.stdout


@pytest.mark.slow
def test_kill_minus_9_fifty_times_loses_nothing():
    done = _run_faults("--kills=50", "--seed=1", "--full_disks=0")
    assert done.returncode == 0, done.stderr


# Two processes.


@pytest.mark.parametrize("number", [0, -1, -2, 7, (1 << 30) - 1, 1 << 30, (1 << 61) - 1])
def test_a_number_of_the_first_process_reaches_all_whole(number):
    def send(halves):
        assert halves.dtype == np.int32
        return halves

    with (
        mock.patch.object(jax, "process_count", return_value=2),
        mock.patch.object(training.multihost_utils, "broadcast_one_to_all", side_effect=send),
    ):
        assert training._from_first_process(lambda: number) == number


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
workdir, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.checkpoints.store import Checkpoints

config = ModelConfig(num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=8, head_dim=8)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("x"))

def tree(step):
    whole = np.arange(512, dtype=np.float32).reshape(64, 8) + step
    return {"w": jax.make_array_from_callback((64, 8), sharding, lambda index: whole[index])}

with Checkpoints(workdir, keep_last=2) as checkpoints:
    try:
        restored = checkpoints.restore(config=config, params_like=tree(0), opt_state_like=tree(0))
    except UserError:
        print("refused")
        sys.exit()
    step = restored.step if restored else 0
    for expected, got in zip(tree(step)["w"].addressable_shards, (
        restored.params["w"] if restored else tree(0)["w"]).addressable_shards):
        assert (np.asarray(expected.data) == np.asarray(got.data)).all()
    for new in (step + 1, step + 2):
        state = tree(new)
        checkpoints.save(new, params=state, opt_state=state,
                         metadata={"model": config.to_dict()}, tokenizer=None)
print("restored", step)
"""


def _run_two_processes(workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, workdir, port, str(rank)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out.splitlines()[-1] for out, _ in outputs]  # Gloo prints too


@pytest.mark.slow
def test_two_processes_agree_on_what_to_restore(tmp_path):
    assert _run_two_processes(tmp_path) == ["restored 0"] * 2
    assert _run_two_processes(tmp_path) == ["restored 2"] * 2
    _flip(_data_file(tmp_path, 4))
    assert _run_two_processes(tmp_path) == ["restored 3"] * 2
    for step in _steps(tmp_path):
        _flip(_data_file(tmp_path, step))
    assert _run_two_processes(tmp_path) == ["refused"] * 2
