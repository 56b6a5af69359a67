"""Several processes: their flags, how they find each other, agree and notice a stall."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.coordination import (
    RunCoordination,
    differences,
    missing_at_barrier,
)
from mobilellm_jax.machine.process_flags import add_arguments, check_flags
from mobilellm_jax.machine.signals import StopRequest, stop_signals

ROOT = Path(__file__).resolve().parents[1]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "a:1"], "--num_processes and --process_id missing"),
        (["--num_processes", "2"], "--coordinator and --process_id missing"),
        (["--coordinator", "a:1", "--num_processes", "2"], "^--process_id missing"),
        (["--num_processes", "0", "--coordinator", "a:1", "--process_id", "0"], "use 1 or more"),
        (["--num_processes", "2", "--coordinator", "a:1", "--process_id", "2"], "use 0 to 1"),
        (["--num_processes", "2", "--coordinator", "a:1", "--process_id", "-1"], "use 0 to 1"),
        (["--num_processes", "2", "--coordinator", "node0", "--process_id", "0"], "use HOST:PORT"),
        (["--num_processes", "2", "--coordinator", ":29500", "--process_id", "0"], "use HOST:PORT"),
        (["--num_processes", "2", "--coordinator", "a:70000", "--process_id", "0"], "HOST:PORT"),
        (["--num_processes", "2", "--coordinator", "a:0", "--process_id", "0"], "HOST:PORT"),
        (["--arrival_seconds", "0"], "--arrival_seconds 0: use 1 to"),
        (["--stall_seconds", "nan"], "--stall_seconds nan: use 1 to"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_flags(parse(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--num_processes", "1"],
        ["--coordinator", "[::1]:29500", "--num_processes", "2", "--process_id", "1"],
    ],
)
def test_flags_that_make_sense_are_taken(arguments):
    check_flags(parse(*arguments))


TIMED_OUT = """DEADLINE_EXCEEDED: Barrier timed out. Id: [Init]Wait_for_all_tasks_to_register::0.
# of tasks that reached the barrier: {}.
The first task at the barrier: 0. Some timed out task names:
{}
 [type.googleapis.com/tensorflow.BarrierError='']"""


@pytest.mark.parametrize(
    ("reached", "names", "missing"),
    [
        ("3/4", "1", "process 1"),
        ("2/4", "3\n1", "processes 1 and 3"),
        ("1/40", "24\n37", "39 processes (24 and 37 among them)"),
        ("3/4", "/job:jax_worker/replica:0/task:2", "process 2"),
    ],
)
def test_the_missing_are_read_from_the_text_of_jax(reached, names, missing):
    text = TIMED_OUT.format(reached, names)
    assert missing_at_barrier(text) == missing


def test_other_texts_of_jax_name_nobody():
    assert missing_at_barrier("UNAVAILABLE: Socket closed") is None


def test_differences_name_the_key_and_both_values():
    here = {"config": {"seed": 1, "mesh": {"data": -1}}, "only": True}
    there = {"config": {"seed": 2, "mesh": {"data": -1}}, "more": "x"}
    assert differences(here, there) == [
        ("config.seed", "1", "2"),
        ("only", "True", "nothing"),
        ("more", "nothing", "'x'"),
    ]
    assert differences(here, here) == []


class Store:
    """JAX's key-value store and barriers, for peers that are threads of this process."""

    def __init__(self, num_processes):
        self.values, self.changed = {}, threading.Condition()
        self.barrier = threading.Barrier(num_processes, timeout=10)

    def key_value_set(self, key, value, allow_overwrite):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=10)
            return self.values[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def wait_at_barrier(self, name, timeout):
        self.barrier.wait()


def make_peers(num_processes, **settings):
    store = Store(num_processes)
    peers = [RunCoordination(**settings) for _ in range(num_processes)]
    for number, peer in enumerate(peers):
        peer.process, peer.num_processes, peer._client = number, num_processes, store
    return peers


def agree(facts):
    """What each of the peers raises, a message or nothing."""
    messages = [None] * len(facts)

    def run(number, peer):
        try:
            peer.agree(facts[number])
        except UserError as error:
            messages[number] = str(error)

    threads = [
        threading.Thread(target=run, args=item) for item in enumerate(make_peers(len(facts)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return messages


def test_every_process_hears_of_every_difference():
    assert agree([{"seed": 1}] * 3) == [None] * 3
    first, *others = agree([{"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "more": {"a": 0}}])
    assert others == [first] * 3
    assert "\n  seed: 2 on process 2, 1 on process 0\n" in first
    assert "\n  more.a: 0 on process 3, nothing on process 0\n" in first


def test_many_differences_are_cut_short():
    message, _ = agree([{}, {str(number): number for number in range(30)}])
    assert message.count("on process 1") == 8 and "and 22 more" in message


def test_a_stall_is_a_step_far_slower_than_any_before_with_nobody_busy(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    here, other = make_peers(2, stall_seconds=20)
    now[0] = 1000.0  # compiling
    assert here._stalled() is None
    here.start_clock()
    now[0] += 3
    here.done(1)
    now[0] += 19
    assert here._stalled() is None
    now[0] += 2
    assert "nothing for 21 s since step 1" in here._stalled()
    other._set("busy/1", "at step 1: eval")
    assert here._stalled() is None
    other._set("busy/1", "")
    assert here._stalled()
    here.done(2)  # took 21 s
    now[0] += 100
    assert here._stalled() is None
    now[0] += 6
    assert "slowest step: 21.0 s" in here._stalled()
    with here.busy("at step 2: save"):
        now[0] += 1000
        assert here._stalled() is None
    assert here._stalled() is None
    now[0] += 106
    assert here._stalled()


def test_the_first_step_counts_without_what_came_before_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    here, _ = make_peers(2, stall_seconds=20)
    now[0] = 1000.0  # compiling
    here.start_clock()
    now[0] += 25
    here.done(1)
    now[0] += 124  # a step that waits for a slow disk, say, or takes 25 s itself
    assert here._stalled() is None
    now[0] += 2
    assert "slowest step: 25.0 s" in here._stalled()


@pytest.mark.parametrize(
    ("error", "expected"), [(UserError("a mistake"), {0: 2, 1: 2}), (KeyError(), {0: 75, 1: 1})]
)
def test_all_end_with_2_for_a_mistake_and_the_others_with_75_for_the_rest(
    error, expected, monkeypatch, capsys
):
    ended = {}

    def run(number, end, *arguments):
        with pytest.raises(SystemExit) as exit:
            end(*arguments)
        ended[number] = exit.value.code

    monkeypatch.setattr("os._exit", sys.exit)
    other, failing = make_peers(2)
    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in [(0, other._watch), (1, failing._fail, error)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == expected
    assert "process 0 of 2: ends with the others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("UNAVAILABLE: connection reset by peer", True),
        ("RESOURCE_EXHAUSTED: out of memory for a collective", False),
        ("INTERNAL: a bug", False),
    ],
)
def test_only_a_lost_contact_ends_the_process_from_inside_the_steps(text, ends, monkeypatch):
    here, _ = make_peers(2)
    failed = []
    monkeypatch.setattr(here, "_fail", failed.append)
    error = jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError), here.contact():
        raise error
    assert failed == [error] * ends


def test_alone_nothing_is_compared_watched_or_awaited():
    before = threading.active_count()
    with RunCoordination() as peers, peers.contact():
        peers.agree({"anything": object})
        peers.done(1)
        assert threading.active_count() == before
    stop = StopRequest()
    assert not stop.agreed(1)
    stop.requested = True
    assert stop.agreed(2)


def test_the_first_signal_asks_and_the_second_acts_as_usual(capfd, as_in_a_terminal):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.listen()
        assert not stop.requested
        for _ in range(2):  # at once: `timeout` sends it to the process and to its group
            signal.raise_signal(signal.SIGINT)
        assert stop.requested and capfd.readouterr().err.count("SIGINT: saving") == 1
        time.sleep(interrupts.SAME_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_ignored(as_in_a_terminal):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as stop:
        stop.listen()
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested


JOIN = """
import argparse, signal, sys, time
from mobilellm_jax.machine.process_flags import add_arguments
parser = argparse.ArgumentParser()
add_arguments(parser)
from mobilellm_jax.machine.processes import joined
start = time.monotonic()
with joined(parser.parse_args()):
    took = time.monotonic() - start
    import jax
    assert jax.distributed.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    print(jax.process_index(), jax.process_count(), jax.device_count(), took < 2)
with joined(parser.parse_args()):  # once more changes nothing
    pass
"""


def join(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_process_joins_itself_silently_without_a_network():
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
    process = join(JAX_NUM_CPU_DEVICES="4", **proxies)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (output, errors) == ("0 1 4 True\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "open mpi", "flags"])
def test_two_processes_find_each_other(launcher):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(number):
        slurm = {
            "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
            "JAX_COORDINATOR_PORT": str(port),
        }  # fmt: skip
        mpi = {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(number), "JAX_COORDINATOR_PORT": str(port),
        }  # fmt: skip
        flags = ["--coordinator", f"localhost:{port}", "--num_processes", "2"]
        flags += ["--process_id", str(number)]
        return {
            "slurm": lambda: join(**slurm),
            "open mpi": lambda: join(**mpi),
            "flags": lambda: join(*flags),
        }[launcher]()

    processes = [start(number) for number in range(2)]
    for number, process in enumerate(processes):
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert f"{number} 2 2 True" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PMI_SIZE": "2"}, "pip install mpi4py"),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, "jax\\[k8s\\]"),
        ({"OMPI_MCA_orte_hnp_uri": "?"}, "cannot be found .*--num_processes 1 to run alone"),
    ],
)
def test_a_launcher_that_jax_cannot_read_is_never_taken_for_one_process(environment, message):
    process = join(**environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and re.search(message, errors), errors
