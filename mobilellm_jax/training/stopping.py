"""Why a run stops before its last step: bad numbers, too little memory, signals."""

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from mobilellm_jax.errors import UserError


class Diverged(UserError):
    """The loss, a gradient or a weight is NaN or Inf."""

    def __init__(self, step: int, what: str):
        super().__init__(
            f"step {step:,}: {what}; the run stops and keeps its older checkpoints: lower "
            "config.optimizer.peak_lr or lengthen config.optimizer.warmup_steps"
        )


def finite_metrics(pending: dict[int, dict[str, jax.Array]]) -> dict[str, float]:
    """Waits for the metrics of the pending steps and returns those of the last one.

    Raises:
      Diverged: a value of any of the steps is NaN or Inf.
    """
    for step, metrics in pending.items():
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := {name: value for name, value in values.items() if not np.isfinite(value)}:
            shown = ", ".join(f"{name} = {value}" for name, value in bad.items())
            raise Diverged(step, shown)
    return values


@contextlib.contextmanager
def memory_errors(mend: str) -> Iterator[None]:
    """Turns the compiler's and the allocator's "out of memory" into a UserError with the mend."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"a device is out of memory ({str(error).splitlines()[0]}): {mend}"
        ) from error


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
            # What JAX's own handler of SIGTERM does, at most a second later and for SIGTERM only.
            now = datetime.datetime.now(datetime.UTC).isoformat()
            client = distributed.global_state.client
            client.key_value_set("RECEIVED_PREEMPTION_NOTICE", now, allow_overwrite=True)
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
