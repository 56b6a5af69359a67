"""Early termination of a run: divergence, out of memory."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from mobilellm_jax.errors import UserError

STATE_FIX = (
    "weights and optimizer state do not fit; set config.mesh.fsdp, which splits them, to the "
    "number of devices, or take more devices"
)
STEP_FIX = (
    "raise config.train.accumulation_steps, lower config.train.global_batch_size, or set "
    "config.execution.remat to 'attention' or 'full'"
)


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
def memory_errors(fix: str) -> Iterator[None]:
    """Turns the compiler's and the allocator's "out of memory" into a UserError with the fix."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"a device is out of memory ({str(error).splitlines()[0]}): {fix}"
        ) from error
