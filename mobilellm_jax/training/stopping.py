"""Why a run stops before its last step: bad numbers, too little memory, signals."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np

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
def memory_errors() -> Iterator[None]:
    """Turns the compiler's and the allocator's "out of memory" into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"a device is out of memory ({str(error).splitlines()[0]}): raise "
            "config.train.accumulation_steps, lower config.train.global_batch_size, or set "
            "config.execution.remat to 'dots' or 'full'"
        ) from error


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def request(number, _):
        stop.set()
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
