"""The differences of a run that goes on: in its config, and in its next learning rate."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.run_config import default_config, leaves

_JUMP = 1.5  # times the last learning rate


def changes(metadata: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """ "config.KEY: SAVED -> NOW" for each key with another value than in the checkpoint.

    Args:
      metadata: of the checkpoint; early ones, and models from elsewhere, hold no config.
      config: of the run that goes on.
    """
    saved, now = _saved_values(metadata), leaves(config)
    if saved is None:
        return []
    return [f"config.{key}: {saved[key]} -> {now[key]}" for key in now if saved[key] != now[key]]


def rate_jump(metadata: Mapping[str, Any], config: ConfigDict, step: int) -> str | None:
    """Says so if the learning rate of the next step is far above the last one.

    A rise that the saved schedule itself would have had, as in a warm-up, is none.

    Args:
      metadata, config: as for `changes`.
      step: updates done.
    """
    saved = _saved_values(metadata)
    if saved is None or step == 0:
        return None
    before = {key.partition(".")[2]: v for key, v in saved.items() if key.startswith("optimizer.")}
    try:
        old = learning_rate_schedule(ConfigDict(before), saved["train.num_steps"])
    except UserError:  # other versions allowed it
        return None
    new = learning_rate_schedule(config.optimizer, config.train.num_steps)
    last, planned, following = float(old(step - 1)), float(old(step)), float(new(step))
    if following <= _JUMP * max(last, planned):
        return None
    times = f", {following / last:.1f} times as much" if last else ""
    return (
        f"the learning rate rises from {last:.3g} at step {step:,} to {following:.3g} at step "
        f"{step + 1:,}{times}: lower config.optimizer.peak_lr; a run that is to be extended takes "
        "config.optimizer.schedule=wsd from its start"
    )


def _saved_values(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """ "SECTION.KEY" -> value in the checkpoint; keys that it does not know have their default."""
    run = metadata.get("run")
    if not isinstance(run, dict):
        return None
    return leaves(default_config()) | leaves(ConfigDict(run))
