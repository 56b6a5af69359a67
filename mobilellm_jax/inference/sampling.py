"""How the next token is chosen from the logits."""

import dataclasses

import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError

NO_NUMBERS = -2  # instead of a token, where the logits are NaN or infinite
_GREEDY_BELOW = 1e-6  # where only the likeliest token is left, but for ties of fp32
_UNIFORM_ABOVE = 1e30  # where all are equally likely; XLA multiplies by the inverse, in fp32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token.

    Attributes:
      temperature: divides the logits; greedy decoding below 1e-6, 0 included.
      top_k: keep only this many of the likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together reach this probability (nucleus sampling,
        arXiv 1904.09751); 1 keeps all. Applied after `top_k`.

    The likeliest token is always kept, and so is each that is as likely as the last one kept.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: use 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: use 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: use a probability above 0, up to 1 (keep all)")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 `[B]`.

    Args:
      logits_BV: fp32; -inf is a token that cannot come.
      keys_B: a random key for each row, so that a row's text does not depend on its neighbours.

    Returns:
      `NO_NUMBERS` for a row with a NaN, with an infinite logit, or without a possible token.
    """
    chosen_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)  # of a NaN, if there is one
    best_B1 = jnp.take_along_axis(logits_BV, chosen_B1, axis=-1)
    chosen_B = chosen_B1[:, 0]
    if sampling.temperature >= _GREEDY_BELOW:
        chosen_B = _draw(logits_BV, best_B1, keys_B, sampling)
    return jnp.where(jnp.isfinite(best_B1[:, 0]), chosen_B, NO_NUMBERS).astype(jnp.int32)


def _draw(logits_BV, best_B1, keys_B, sampling: Sampling) -> jax.Array:
    def scaled(logits_BV):  # the best becomes 0, whatever the temperature
        return (logits_BV - best_B1) / min(sampling.temperature, _UNIFORM_ABOVE)

    # What is kept is decided by the logits as they are: scaled ones may be all the same in fp32.
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(scaled(sorted_BV), axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The first is kept even if `top_p` is 0 in fp32.
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, best_B1)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, scaled(logits_BV))
