"""What the processes of a run owe each other: agreement before the first step, an end together.

JAX ends all processes when one of them is dead or frozen, but only `HEARTBEAT_SECONDS` later and
without a reason; and a process that is alive but stuck, or that ended by an error, leaves the
others in a collective for ever. So each process says why it ends, and watches the others and its
own steps, by the key-value store and the barriers of JAX's coordination service
(`jax_private.store`): they work before devices are known to match, and from another thread.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from flax.traverse_util import flatten_dict

import mobilellm_jax
from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine import jax_private
from mobilellm_jax.machine.arrival import named_processes

LOST_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
_MISTAKE_STATUS = 2  # of the command line: another start would meet it again

_PREFIX = "mobilellm/"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 1.0  # for an error that this process is about to have itself
_LEAVE_SECONDS = 5.0
_AGREE_SECONDS = 600.0  # others may still be hashing or mounting
_SLOWER = 5.0  # times the slowest step so far is not a stall yet
_FEW = 8  # differences that an error lists
_PACKAGE = str(Path(__file__).parents[1])
_CONTACT = re.compile(
    r"gloo|nccl|collective|connection|socket|peer|unavailable|coordination|heartbeat", re.I
)


class RunCoordination:
    """This process among those of the run; alone, every method does next to nothing.

    Args:
      stall_seconds: a step may take this long, or `_SLOWER` times the slowest so far.
      num_processes: of the run.
      process: the number of this one.
    """

    def __init__(
        self, stall_seconds: float = float("inf"), *, num_processes: int = 1, process: int = 0
    ):
        self.num_processes, self.process = num_processes, process
        self._client = jax_private.store() if num_processes > 1 else None
        self._stall_seconds = stall_seconds
        self._busy: str | None = "starting"
        self._step, self._since, self._slowest = 0, time.monotonic(), 0.0
        self._leaving = threading.Lock()

    def __enter__(self) -> "RunCoordination":
        if self._client is not None:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
            interrupts.clean_ups.append(self._leave_interrupted)
        return self

    def __exit__(self, kind, error, stack) -> None:
        if self._client is None:
            return
        if error is not None:
            self._fail(error)
        interrupts.clean_ups.remove(self._leave_interrupted)

    # Before the first step.

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compares what has to be the same everywhere; works on unequal numbers of devices.

        Args:
          facts: nested dicts of JSON values; versions and devices are added to it.

        Raises:
          UserError: on every process, naming each difference with both values.
        """
        if self._client is None:
            return
        mine = json.loads(json.dumps({**facts, **_surroundings()}))
        if self.process == 0:
            self._set("facts", json.dumps(mine))
        first = json.loads(self._client.blocking_key_value_get(*self._waiting_for("facts")))
        self._set(f"differences/{self.process}", json.dumps(differences(mine, first)))
        self._client.wait_at_barrier(*self._waiting_for("agree"))
        found = [
            f"{key}: {here} on process {process}, {there} on process 0"
            for process, lines in sorted(self._read("differences/").items())
            for key, here, there in json.loads(lines)
        ]
        if found:
            more = f"\n  and {len(found) - _FEW} more" if len(found) > _FEW else ""
            raise UserError(
                "the processes disagree:\n  " + "\n  ".join(found[:_FEW]) + more + "\n"
                "start all of them with the same command, files and versions"
            )

    # While it trains.

    def start_clock(self) -> None:
        """Called before the first step: what came before, compiling, says nothing of a step."""
        self._since = time.monotonic()

    def done(self, step: int) -> None:
        """Says that the results of `step` are there; the watch begins with the first."""
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._since)
        self._busy, self._step, self._since = None, step, now

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Inside, neither this process nor any other takes the time for that of a step."""
        before, self._busy = self._busy, what
        try:
            yield
        finally:
            self._busy, self._since = before, time.monotonic()

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Ends the process at once when a collective inside fails; the steps are all inside.

        Nothing is unwound: closing a checkpoint that is being saved would wait for the dead.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self._client is not None and _is_lost_contact(error):
                self._fail(error)
            raise
        finally:
            self._busy = "finishing"  # the last save may take far longer than a step

    # The end.

    def _fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error in this one."""
        text = str(error) or type(error).__name__
        if interrupts.answered() is not None:
            self._leave_interrupted()
        if _is_lost_contact(error) or _is_lost_contact(error.__cause__):
            self._leave("at", f"lost contact ({text.splitlines()[0][:200]})", LOST_STATUS)
        elif isinstance(error, UserError):
            self._leave("cause", text, _MISTAKE_STATUS)
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
            self._leave("cause", f"ends with status {status}, see above", status)
        elif isinstance(error, KeyboardInterrupt):
            self._leave("cause", "interrupted", 130)
        traceback.print_exception(error)
        self._leave("cause", f"{type(error).__name__}: {text}"[:1000], 1)

    def _leave_interrupted(self) -> NoReturn:
        """Ends all processes because of a signal to this one."""
        self._leave("cause", "ended by a signal", interrupts.answered())

    def _leave(self, kind: str, text: str, status: int) -> NoReturn:
        """Meets the others at a barrier, says who is missing or to blame, and is gone.

        Not by sys.exit: JAX would wait at a barrier of its own for those that are dead, and abort.
        """
        self._leaving.acquire()  # for good: the process ends
        if kind == "cause":
            self._say(text)
        missing, causes, others, mistakes = None, {}, {}, {}
        try:
            self._set(f"end/{kind}/{status}/{self.process}", text)
            self._client.wait_at_barrier(_PREFIX + "leave", int(_LEAVE_SECONDS * 1000))
        except jax.errors.JaxRuntimeError as error:
            missing = missing_at_barrier(str(error))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            causes, others = self._read("end/cause/"), self._read("end/at/")
            mistakes = self._read(f"end/cause/{_MISTAKE_STATUS}/")
        if kind != "cause":
            self._say(self._explanation(text, missing, causes, others))
            # Schedulers look at the highest status of all: nobody may say "try again".
            status = _MISTAKE_STATUS if mistakes else status
        sys.stdout.flush()
        if self.process == 0:
            time.sleep(1)  # without its service JAX aborts the others before they have spoken
        os._exit(status)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"error: process {self.process} of {self.num_processes}: {text}\n")
        sys.stderr.flush()

    def _explanation(
        self,
        text: str,
        missing: str | None,
        causes: Mapping[int, str],
        others: Mapping[int, str],
    ) -> str:
        lines = [text]
        if missing:
            lines.append(f"no answer from {missing}: killed, frozen or stuck; see its output")
        lines += [
            f"process {process}: {said}"
            for process, said in sorted((causes or others).items())
            if process != self.process
        ][:_FEW]
        if not causes:
            lines.append("run the same command again to go on from the newest checkpoint")
        return "\n  ".join(lines)

    # The thread.

    def _watch(self) -> None:
        published = None
        while True:
            time.sleep(_POLL_SECONDS)
            try:
                if published != (published := self._busy):
                    self._set(f"busy/{self.process}", published or "")
                ending = self._read("end/")
                stalled = self._stalled()
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is gone: JAX ends the process
            if ending:
                time.sleep(_GRACE_SECONDS)
                self._leave("at", f"ends with the others, {_place()}", LOST_STATUS)
            if stalled:
                self._leave("at", f"{stalled}, {_place()}", LOST_STATUS)

    def _stalled(self) -> str | None:
        """What takes too long, if a step does and no process has a reason."""
        waited = time.monotonic() - self._since
        limit = max(self._stall_seconds, _SLOWER * self._slowest)
        if self._busy is not None or waited < limit or any(self._read("busy/").values()):
            return None
        return (
            f"nothing for {waited:.0f} s since step {self._step:,} (slowest step: "
            f"{self._slowest:.1f} s, limit --stall_seconds {self._stall_seconds:g})"
        )

    # The store.

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(_PREFIX + key, value, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        """Process -> value below `folder`."""
        entries = self._client.key_value_dir_get(_PREFIX + folder)
        return {int(key.rpartition("/")[2]): value for key, value in entries}

    def _waiting_for(self, key: str) -> tuple[str, int]:
        return _PREFIX + key, int(_AGREE_SECONDS * 1000)


def _is_lost_contact(error: BaseException | None) -> bool:
    text = str(error)
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and "RESOURCE_EXHAUSTED" not in text
        and _CONTACT.search(text) is not None
    )


def _surroundings() -> dict[str, Any]:
    device = jax.local_devices()[0]
    return {
        "version": {
            "mobilellm_jax": mobilellm_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
        },
        "devices": {"kind": device.device_kind, "per process": jax.local_device_count()},
    }


def _place() -> str:
    """Where the main thread is, within this package."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    ours = [frame for frame in stack if frame.filename.startswith(_PACKAGE)]
    if not ours:
        return "outside of mobilellm_jax"
    name = Path(ours[-1].filename).relative_to(_PACKAGE)
    return f"at {name}:{ours[-1].lineno}: {ours[-1].line}"


def missing_at_barrier(text: str) -> str | None:
    """Who did not come, from JAX's error of a barrier that timed out: it names at most two."""
    numbers = re.search(r"reached the barrier: (\d+)/(\d+)", text)
    names = re.search(r"timed out task names:\s*((?:\S*?\d+[ \r]*\n)+)", text + "\n")
    if numbers is None or names is None:
        return None
    count = int(numbers[2]) - int(numbers[1])
    named = sorted(int(re.search(r"\d+$", name)[0]) for name in names[1].split())
    return named_processes(count, named)


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value here, value there) of each difference between nested dicts, as text."""
    here, there = flatten_dict(here, sep="."), flatten_dict(there, sep=".")
    return [
        (key, _shown(here, key), _shown(there, key))
        for key in [*here, *(key for key in there if key not in here)]
        if key not in here or key not in there or here[key] != there[key]
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]!r:.80}" if key in values else "nothing"
