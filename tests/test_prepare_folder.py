"""Prepare: a folder that is whole or not there, however the command ends."""

import contextlib
import errno
import fcntl
import gc
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared import DOCUMENTS, files_in, make_documents, run_prepare, write_lines

from mobilellm_jax.data import encoding, packing
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import atomic as files
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(DOCUMENTS, 310, path)
    return path


def test_a_second_run_changes_nothing_and_another_one_is_refused(tmp_path, model, capsys):
    path = write_lines(tmp_path / "a.jsonl")
    first = run_prepare([path], tmp_path / "out", tokenizer=model)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert run_prepare([path], tmp_path / "out", tokenizer=model, progress=True) == first
    assert "already prepared" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="sequence_length 32, now asked for 16"):
        run_prepare([path], tmp_path / "out", tokenizer=model, sequence_length=16)
    path.write_text(path.read_text().replace("cat", "cow"))
    with pytest.raises(UserError, match="a.jsonl was different"):
        run_prepare([path], tmp_path / "out", tokenizer=model)


def test_a_second_run_notices_a_damaged_shard(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    run_prepare([path], tmp_path / "out", tokenizer=model)
    shard = tmp_path / "out" / "train-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="train-00000.*damaged"):
        run_prepare([path], tmp_path / "out", tokenizer=model)


def test_a_second_run_with_a_further_input_is_refused(tmp_path, model):
    paths = [write_lines(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    run_prepare(paths[:1], tmp_path / "out", tokenizer=model)
    with pytest.raises(UserError, match="already made from 1 inputs, now 2"):
        run_prepare(paths, tmp_path / "out", tokenizer=model)


def test_an_empty_folder_is_filled_and_let_go(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    (tmp_path / "out").mkdir()
    run_prepare([path], tmp_path / "out", tokenizer=model)
    os.close(files.lock_folder(tmp_path / "out", "still held"))


def test_a_folder_with_something_else_is_not_touched(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="is not a dataset"):
        run_prepare([path], tmp_path / "out", tokenizer=model)
    assert files_in(tmp_path / "out") == {"mine": b"keep"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, model, monkeypatch, error):
    path = write_lines(tmp_path / "a.jsonl")

    def fail(*_):
        raise error

    monkeypatch.setattr(DatasetHeader, "save", fail)
    with pytest.raises(error):
        run_prepare([path], tmp_path / "out", tokenizer=model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_leftover_is_removed_under_its_lock(tmp_path, model, monkeypatch):
    path, partial, tried = write_lines(tmp_path / "a.jsonl"), tmp_path / "out.partial", []

    def rmtree(folder, original=shutil.rmtree, **settings):
        tried.append(folder)
        with pytest.raises(UserError, match="held"):
            files.lock_folder(folder, "held")
        original(folder, **settings)

    partial.mkdir()
    monkeypatch.setattr("shutil.rmtree", rmtree)
    run_prepare([path], tmp_path / "out", tokenizer=model)
    assert tried == [partial]


def test_a_folder_that_was_replaced_before_it_is_locked_is_left_alone(tmp_path, model, monkeypatch):
    path, partial = write_lines(tmp_path / "a.jsonl"), tmp_path / "out.partial"

    def flock(descriptor, how, original=fcntl.flock):
        partial.rename(tmp_path / "old")
        partial.mkdir()
        (partial / "theirs").write_text("keep")
        original(descriptor, how)

    partial.mkdir()
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="another prepare is writing"):
        run_prepare([path], tmp_path / "out", tokenizer=model)
    assert files_in(partial) == {"theirs": b"keep"}


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    """As Lustre is without -o flock."""

    def flock(descriptor, how):
        locked.append(descriptor)
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    locked = []
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="cannot be locked .*Function not implemented.*-o flock"):
        files.lock_folder(tmp_path, "held")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(*locked)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl", make_documents(3000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="train-00000.*nothing was kept"):
            run_prepare([path], tmp_path / "out", tokenizer=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("trained", [False, True])
def test_the_tokenizer_is_on_the_disk_before_the_header(tmp_path, model, monkeypatch, trained):
    synced = []

    def fsync(descriptor, original=os.fsync):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        original(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    path = write_lines(tmp_path / "a.jsonl")
    settings = {"vocab_size": 300} if trained else {"tokenizer": model}
    run_prepare([path], tmp_path / "out", **settings)
    found = [name for name in synced if not name.endswith("array_record")]
    assert found[:4] == [".tokenizer.model.tmp", "out.partial", ".dataset.json.tmp", "out.partial"]
    # Then all of it once more, and the folder that it gets its name in.
    assert sorted(found[4:-2]) == ["dataset.json", "tokenizer.model"]
    assert found[-2:] == ["out.partial", tmp_path.name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_every_shard_is_on_the_disk_whole_before_the_header(tmp_path, model, monkeypatch):
    synced = {}

    def fsync(descriptor, original=os.fsync):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.setdefault(name, os.fstat(descriptor).st_size)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = write_lines(tmp_path / "a.jsonl")
    header = run_prepare([path], tmp_path / "out", tokenizer=model, records_per_shard=8)
    before = list(synced)[: list(synced).index(".dataset.json.tmp")]
    shards = header.splits["train"].shards
    assert len(shards) > 2
    assert {shard.file: shard.bytes for shard in shards} == {
        name: synced[name] for name in before if name.endswith("array_record")
    }


def test_lost_records_are_noticed_when_a_shard_is_closed(tmp_path, model, monkeypatch):
    class Forgetful(packing.array_record_module.ArrayRecordWriter):
        def write(self, data):
            if random.random() < 0.5:
                super().write(data)

    monkeypatch.setattr(packing.array_record_module, "ArrayRecordWriter", Forgetful)
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="records arrived on the disk"):
        run_prepare([path], tmp_path / "out", tokenizer=model)


_SLOW_PREPARE = """
import signal, sys, time
from mobilellm_jax.data import encoding, prepare, sources
if __name__ == "__main__":
    # As in a terminal: in the background of a script SIGINT is ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real = sources.Source.documents
    def slow(self, *args):
        for number, document in enumerate(real(self, *args)):
            if number == 40:
                print("half", flush=True)
                time.sleep(600)
            yield document
    sources.Source.documents = slow
    prepare.BLOCK_BYTES = encoding.BLOCK_BYTES = 500
    prepare.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], sequence_length=32,
                    num_workers=2, records_per_shard=4, progress=False)
"""


@contextlib.contextmanager
def _slow_prepare(tmp_path, model):
    """A prepare that waits half way; gives its process, its workers' ids and its input."""
    script = tmp_path / "slow.py"
    script.write_text(_SLOW_PREPARE)
    path = write_lines(tmp_path / "a.jsonl")
    workers = []
    with (
        open(tmp_path / "errors", "w") as errors,
        subprocess.Popen(
            [sys.executable, script, path, tmp_path / "out", model],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout.readline() == "half\n", (tmp_path / "errors").read_text()
            workers = _children(process.pid)
            assert len(workers) >= 2
            yield process, workers, path
        finally:
            process.kill()
            for pid in filter(_is_alive, workers):
                os.kill(pid, signal.SIGKILL)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()]


def _is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z " not in stat.read_text()


def _wait_until_gone(pids):
    deadline = time.monotonic() + 20
    while any(map(_is_alive, pids)):
        assert time.monotonic() < deadline, "a worker process outlived its parent"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_prepare_leaves_nothing_that_loads_and_can_be_run_again(tmp_path, model, capsys):
    with _slow_prepare(tmp_path, model) as (process, workers, path):
        with pytest.raises(UserError, match="another prepare is writing"):
            run_prepare([path], tmp_path / "out", tokenizer=model, records_per_shard=4)
        process.kill()
        _wait_until_gone([process.pid, *workers])
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").glob("*.array_record"))
    with pytest.raises(UserError, match="not a finished dataset"):
        open_split(tmp_path / "out.partial", "train")
    run_prepare([path], tmp_path / "out", tokenizer=model, records_per_shard=4)
    assert "left over from an interrupted run" in capsys.readouterr().err
    run_prepare([path], tmp_path / "fresh", tokenizer=model, records_per_shard=4)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_control_c_ends_all_processes_and_leaves_nothing(tmp_path, model):
    with _slow_prepare(tmp_path, model) as (process, workers, _):
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers, too
        assert process.wait(timeout=20) != 0
        _wait_until_gone(workers)
    errors = (tmp_path / "errors").read_text()
    assert "KeyboardInterrupt" in errors
    assert "_process_worker" not in errors  # no traceback of a worker on top of the parent's
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_workers_start_leaves_nothing_and_no_traceback_of_theirs(
    tmp_path, model, monkeypatch, capfd, number
):
    """It comes when the first worker has started and waits for what it is to do."""
    started = []

    def start(*arguments, original=multiprocessing.util.spawnv_passfds):
        started.append(original(*arguments))
        if len(started) == 1:
            os.kill(os.getpid(), number)
        return started[-1]

    def end(number, _):
        raise SystemExit(128 + number)

    monkeypatch.setattr("mobilellm_jax.data.encoding.BLOCK_BYTES", 2000)
    monkeypatch.setattr("mobilellm_jax.data.prepare.BLOCK_BYTES", 2000)
    path = write_lines(tmp_path / "a.jsonl")
    multiprocessing.resource_tracker.ensure_running()  # it is a process that is no worker
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", start)
    handler = signal.signal(number, end)
    try:
        with pytest.raises(SystemExit) as ended:
            run_prepare([path], tmp_path / "out", tokenizer=model, num_workers=2)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, handler)
    assert ended.value.code == 128 + number
    del ended  # its frames keep a worker waiting
    gc.collect()
    for pid in started:
        with contextlib.suppress(ChildProcessError):  # the pool has waited for it
            os.waitpid(pid, 0)
    assert capfd.readouterr().err == ""
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def _die(_items):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_an_error_and_no_hang(tmp_path, model, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.data.encoding.BLOCK_BYTES", 2000)
    monkeypatch.setattr("mobilellm_jax.data.prepare.BLOCK_BYTES", 2000)
    monkeypatch.setattr(encoding, "_encode_in_worker", _die)
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="worker process died.*--workers 2"):
        run_prepare([path], tmp_path / "out", tokenizer=model, num_workers=2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
