"""Requests to stop, by signals, with the same answer in all processes of a run."""

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from mobilellm_jax.machine import jax_private


class StopRequest:
    """Whether to save and stop; the same answer in all processes at the same step."""

    def __init__(self):
        self.requested = False
        self._told = False

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


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """A request that the first SIGTERM or SIGINT makes; a second one acts as usual."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def request(number, _):
        stop.requested = True
        signal.signal(number, previous[number])
        # Not print: the signal may have interrupted one.
        os.write(2, f"{signal.Signals(number).name}: saving the current step ...\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
