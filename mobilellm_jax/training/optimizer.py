"""AdamW and its learning-rate schedules, as in the paper and its official script."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from mobilellm_jax.errors import UserError

if TYPE_CHECKING:  # benchmarks use the optimizer where ml_collections is not installed
    from ml_collections import ConfigDict

SCHEDULES = ("cosine", "wsd")


def learning_rate_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate of update number 0, 1, ...

    Linear warm-up from 0, then either a cosine that reaches `final_lr_fraction` of the peak at
    `num_steps` and stays there, or "wsd" (warm-up, stable, decay; arXiv 2404.06395).

    Args:
      config: `config.optimizer` of a run.
      num_steps: updates in the whole run.

    Raises:
      UserError: an unknown schedule, or a warm-up longer than the run.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    if warmup >= num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps = {warmup} leaves nothing of config.train.num_steps = "
            f"{num_steps}: shorten the warm-up"
        )
    final = peak * config.final_lr_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps, final)
    if config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * num_steps))
        stable_until = max(warmup, num_steps - decay)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, final, num_steps - stable_until),
            ],
            [warmup, stable_until],
        )
    choices = ", ".join(SCHEDULES)
    raise UserError(f"config.optimizer.schedule = {config.schedule!r}: use one of {choices}")


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW without decay on the norms' scales.

    Args:
      config: `config.optimizer` of a run.
      schedule: of the learning rate.
    """
    return optax.chain(
        _clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed_params,
        ),
    )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one factor for all.

    optax divides each gradient by the norm, which XLA on CPU writes out before AdamW reads it
    twice: a product is computed twice instead.
    """

    def clip(updates, _):
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * factor, updates)

    return optax.stateless(clip)


def decayed_params(params: dict) -> dict:
    """The tree of `params` with False for the norms' scales, which weight decay leaves alone."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)
