"""Timing that can be believed: each side in a process of its own, fresh data, medians and spread.

A side is built in a spawned process, warmed up, and timed in samples of about half a second: one
long step, or several short ones in a row of which only the last is waited for, as in training. On a
CPU the sides take turns of a few samples each, because a shared machine that slows down then slows
them all; a turn begins with a step that is not timed, which finds caches and memory as the other
side left them (a step of 5 seconds then took 6). On a GPU, whose memory they would take from each
other, one side runs after the other.

Peak memory is of the side's whole process up to the end of its last sample: on a CPU the resident
set (`VmHWM`), the interpreter and its libraries included; on a GPU what the side's own allocator
handed out at most (`peak_bytes_in_use` of jax, `max_memory_allocated` of torch), whatever share of
the device it had set aside.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from mobilellm_jax.errors import UserError

SAMPLE_SECONDS = 0.5
_MAX_STEPS_PER_SAMPLE = 50
_WARM_STEPS = 3
_SAMPLES_PER_TURN = 3
_OUT_OF_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "OutOfMemory")


@dataclasses.dataclass
class Workload:
    """What a side does.

    Attributes:
      prepare: the inputs of that many steps from a first number on, where the step wants them; not
        timed.
      run: does the steps of such inputs, waits for them and returns JSON-ready results of each.
      facts: called after the last sample: what else is to be known of the side.
    """

    prepare: Callable[[int, int], Any]
    run: Callable[[Any], list]
    facts: Callable[[], dict]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of those compared: its name and a function, at the top of a module, that builds it."""

    name: str
    build: Callable[[dict], Workload]
    settings: dict
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # of its process, added


def summary(seconds: list[float]) -> dict:
    """Median and quartiles of samples, with the samples themselves."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": statistics.median(seconds),
        "quartiles": [quartiles[0], quartiles[2]],
        "samples": seconds,
    }


def compare(sides: list[Side], *, num_samples: int, take_turns: bool) -> dict[str, dict]:
    """Times all sides.

    Returns:
      For each side "seconds" (a `summary`, per step), "steps_per_sample", "first" (the result of
      its first step), "build_seconds", its facts; or "error" if it failed, out of memory say.
    """
    groups = [sides] if take_turns else [[side] for side in sides]
    results = {}
    with _progress(num_samples * len(sides)) as bar:
        for group in groups:
            results |= _time_group(group, num_samples, bar)
    return results


def run_alone(function: Callable[[dict], Any], settings: dict) -> Any:
    """The result of one call in a process of its own; raises what it raised, as a UserError."""
    with _Child(_call_once, function, settings) as child:
        return child.receive()


def _call_once(connection, function, settings):
    connection.send(("result", function(settings)))


def _progress(total: int) -> tqdm:
    every = 0.5 if sys.stderr.isatty() else 15
    return tqdm(total=total, unit="sample", mininterval=every, dynamic_ncols=True)


def _time_group(group: list[Side], num_samples: int, bar: tqdm) -> dict[str, dict]:
    results, children = {}, {}
    try:
        for side in group:
            bar.set_description(f"{side.name}: building")
            with _environment(side.environment):
                children[side.name] = child = _Child(_serve, side.build, side.settings)
            if len(group) > 1:  # one after the other: compiling takes all cores
                _first(results, child, side.name)
        for name, child in children.items():
            if name not in results:
                _first(results, child, name)
        for first in range(0, num_samples, _SAMPLES_PER_TURN):
            in_turn = min(_SAMPLES_PER_TURN, num_samples - first)
            for name, child in children.items():
                bar.set_description(name)
                _take_turn(results[name], child, in_turn, bar)
        for name, child in children.items():
            result = results[name]
            seconds = result.pop("seconds")
            if "error" not in result:
                result["seconds"] = summary(seconds)
                result |= _or_error(lambda child=child: child.ask(None))
    finally:
        for child in children.values():
            child.close()
    return {side.name: results[side.name] for side in group}


@contextlib.contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    """What processes started meanwhile find in their environment."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _first(results, child, name):
    results[name] = _or_error(child.receive) | {"seconds": []}


def _take_turn(result, child, num_samples, bar):
    for number in range(1 + num_samples):
        if "error" not in result:
            count = result["steps_per_sample"] if number else 1
            answer = _or_error(lambda count=count: {"seconds": child.ask(count)})
            if "error" in answer:
                result |= answer
            elif number:
                result["seconds"].append(answer["seconds"])
        if number:
            bar.update()


def _or_error(call: Callable[[], dict]) -> dict:
    try:
        return call()
    except UserError as error:
        return {"error": str(error)}


class _Child:
    """A spawned process that answers over a pipe; ends with the `with` block."""

    def __init__(self, serve, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_guarded, args=(theirs, serve, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def ask(self, question):
        with contextlib.suppress(OSError):  # it has ended: receive() says of what
            self._pipe.send(question)
        return self.receive()

    def receive(self):
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(f"its process ended with status {self._process.exitcode}") from None
        if kind == "error":
            raise UserError(value)
        return value

    def close(self):
        self._pipe.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _guarded(connection, serve, *arguments):
    """In the child: `serve`, and any error of it as a message."""
    try:
        serve(connection, *arguments)
    except UserError as error:
        connection.send(("error", str(error)))
    except EOFError:
        pass  # the parent has given up
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if any(sign in text for sign in _OUT_OF_MEMORY):
            connection.send(("error", "out of memory: use a smaller batch, or remat"))
        else:
            traceback.print_exc()
            connection.send(("error", text.splitlines()[0][:300]))


def _serve(connection, build, settings):
    start = time.perf_counter()
    workload = build(settings)
    first = workload.run(workload.prepare(0, 1))[0]
    build_seconds, step = time.perf_counter() - start, 1
    for _ in range(_WARM_STEPS):
        one = _timed(workload, step, 1)
        step += 1
        if one > 2 * SAMPLE_SECONDS:
            break
    count = max(1, min(_MAX_STEPS_PER_SAMPLE, round(SAMPLE_SECONDS / one)))
    if count > 1:
        _timed(workload, step, count)
        step += count
    found = {"first": first, "build_seconds": build_seconds, "steps_per_sample": count}
    connection.send(("result", found))
    for count in iter(connection.recv, None):
        connection.send(("result", _timed(workload, step, count)))
        step += count
    connection.send(("result", workload.facts()))


def _timed(workload, first, count):
    inputs = workload.prepare(first, count)
    start = time.perf_counter()
    workload.run(inputs)
    return (time.perf_counter() - start) / count


@contextlib.contextmanager
def named_if_missing(what: str) -> Iterator[None]:
    """Around imports: a package that is not installed is a UserError that names it."""
    try:
        yield
    except ImportError as error:
        missing = error.name or error
        raise UserError(f"{what}: {missing} is missing; pip install it") from error


def peak_resident_bytes() -> int:
    """Most memory that this process had resident; that of its parent, which exec keeps in
    `ru_maxrss`, left out."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
