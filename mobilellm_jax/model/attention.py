"""Rotary positions and causal grouped-query attention, as functions of arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mobilellm_jax.errors import UserError

ATTENTION_KINDS = ("auto", "xla", "cudnn")
_MASKED = -1e30  # finite: a row without any visible key must not become NaN


class KeyValue(NamedTuple):
    """Rotated keys and values of one visit of one block, both `[B, S, K, H]`."""

    keys: jax.Array
    values: jax.Array


class CachedKeyValue(NamedTuple):
    """Keys and values of earlier tokens; row b holds `lengths[b]` of them, the rest is unused."""

    keys: jax.Array  # [B, S, K, H]
    values: jax.Array  # [B, S, K, H]
    lengths: jax.Array  # [B] int32


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, H]` in fp32, rotate-half layout (RoFormer, arXiv 2104.09864)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_BT.astype(jnp.float32)[..., None] * (theta**-exponents)[None, None, :]
    angles_BTH = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles_BTH), jnp.sin(angles_BTH)


def apply_rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (h, h + H/2) by its position's angle; computes in fp32, keeps the dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    x = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_BTNH.dtype)


def choose_attention(requested: str, q_BTNH: jax.Array) -> str:
    """The kernel for an uncached pass: "cudnn" or "xla".

    "auto" takes cuDNN's flash attention on NVIDIA GPUs from Ampere on for 16-bit inputs whose head
    width it supports, and XLA elsewhere.

    Raises:
      UserError: cuDNN was asked for by name where it cannot run.
    """
    if requested not in ATTENTION_KINDS:
        raise UserError(
            f"execution.attention = {requested!r}: use one of {', '.join(ATTENTION_KINDS)}"
        )
    on_gpu = jax.default_backend() == "gpu"
    supported = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and q_BTNH.shape[-1] % 8 == 0
    if requested == "cudnn" and not (on_gpu and supported):
        raise UserError(
            f"execution.attention = 'cudnn' needs an NVIDIA GPU, bfloat16 or float16 and a head "
            f"width divisible by 8; here: {jax.default_backend()}, {q_BTNH.dtype}, head width "
            f"{q_BTNH.shape[-1]}. Use 'auto'"
        )
    if requested == "auto":
        return "cudnn" if on_gpu and supported else "xla"
    return requested


def causal_attention(
    q_BTNH: jax.Array,
    fresh: KeyValue,
    *,
    segment_ids_BT: jax.Array | None = None,
    cached: CachedKeyValue | None = None,
    kind: str = "auto",
) -> jax.Array:
    """Attention of T new tokens to each other (causal) and to what the cache holds before them.

    Args:
      q_BTNH: rotated queries.
      fresh: rotated keys and values of the same T tokens.
      segment_ids_BT: when given, a token sees only tokens of its own segment (document). Not
        combined with `cached`.
      cached: keys and values of the tokens before.
      kind: see `choose_attention`.

    Returns:
      `[B, T, N, H]` in the dtype of the queries; scores and softmax are computed in fp32.
    """
    if cached is not None:
        assert segment_ids_BT is None
        return _attend_with_cache(q_BTNH, fresh, cached)
    if choose_attention(kind, q_BTNH) == "cudnn":
        mask = None
        if segment_ids_BT is not None:
            mask = (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
        return jax.nn.dot_product_attention(
            q_BTNH, fresh.keys, fresh.values, mask=mask, is_causal=True, implementation="cudnn"
        )
    scores_BKGTS = _scores(q_BTNH, fresh.keys)
    visible = _causal_mask(q_BTNH.shape[1])[None]
    if segment_ids_BT is not None:
        visible = visible & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    scores_BKGTS = jnp.where(visible[:, None, None], scores_BKGTS, _MASKED)
    return _weighted_values(jax.nn.softmax(scores_BKGTS, axis=-1), fresh.values, q_BTNH)


def _attend_with_cache(q_BTNH, fresh: KeyValue, cached: CachedKeyValue) -> jax.Array:
    before = _scores(q_BTNH, cached.keys)
    filled_BS = jnp.arange(cached.keys.shape[1])[None, :] < cached.lengths[:, None]
    before = jnp.where(filled_BS[:, None, None, None, :], before, _MASKED)
    among = _scores(q_BTNH, fresh.keys)
    among = jnp.where(_causal_mask(q_BTNH.shape[1])[None, None, None], among, _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([before, among], axis=-1), axis=-1)
    weights_before, weights_among = jnp.split(weights, [cached.keys.shape[1]], axis=-1)
    return _weighted_values(weights_before, cached.values, q_BTNH) + _weighted_values(
        weights_among, fresh.values, q_BTNH
    )


def _causal_mask(num_tokens: int) -> jax.Array:
    return lax.iota(jnp.int32, num_tokens)[:, None] >= lax.iota(jnp.int32, num_tokens)[None, :]


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    return jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)


def _weighted_values(weights_BKGTS: jax.Array, v_BSKH: jax.Array, like_BTNH: jax.Array):
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(like_BTNH.shape)
