"""Requests to stop, by signals, with the same answer in all processes of a run."""

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from mobilellm_jax import interrupts
from mobilellm_jax.machine import jax_private


class StopRequest:
    """Whether to save and stop; the same answer in all processes at the same step."""

    def __init__(self):
        self.requested = False
        self._told = False
        self._since = 0.0
        self._previous = {}

    def agreed(self, step: int) -> bool:
        """Whether the run ends after `step`; every process asks after each of its steps.

        Several processes go on to the first step that none of them has passed: JAX's preemption
        service finds it (`multihost_utils.reached_preemption_sync_point`).
        """
        if jax.process_count() == 1:
            return self.requested
        # Before the notice goes out: JAX proposes a step after the last one that it was told of.
        agreed = multihost_utils.reached_preemption_sync_point(step)
        if self.requested and not self._told:
            self._told = True
            now = datetime.datetime.now(datetime.UTC).isoformat()
            notice = jax_private.PREEMPTION_NOTICE
            jax_private.store().key_value_set(notice, now, allow_overwrite=True)
        return agreed

    def listen(self) -> None:
        """Takes signals as requests from now on, inside `stop_signals`."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, _) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            # Not print: the signal may have interrupted one.
            os.write(2, f"{signal.Signals(number).name}: saving the current step ...\n".encode())
        elif time.monotonic() - self._since > interrupts.SAME_SECONDS:
            self.leave()
            with interrupts.working(unwound=False):  # or leaving would wait for the save
                signal.raise_signal(number)

    def leave(self) -> None:
        """Signals act as they did before `listen`."""
        while self._previous:
            signal.signal(*self._previous.popitem())


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """A request that the first SIGTERM or SIGINT after its `listen` makes; a second acts as usual.

    A signal that is ignored stays ignored.
    """
    stop = StopRequest()
    try:
        yield stop
    finally:
        stop.leave()
