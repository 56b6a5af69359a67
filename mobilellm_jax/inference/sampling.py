"""How the next token is chosen from the logits."""

import dataclasses

import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep only this many of the likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together reach this probability (nucleus sampling,
        arXiv 1904.09751); 1 keeps all. Applied after `top_k`.
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
      logits_BV: fp32.
      keys_B: a random key for each row, so that a row's text does not depend on its neighbours.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
