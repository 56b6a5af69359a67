"""Rotary positions and causal grouped-query attention, as functions of arrays."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mobilellm_jax.model.attention_kernels import (
    ATTENTION_RESIDUALS,
    check_shape,
    cudnn_attention,
    splash_attention,
)
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import constrain
from mobilellm_jax.model.visits import Visit

_MASKED = -1e30  # finite: a row without any visible key must not become NaN


class TokenContext(NamedTuple):
    """The properties of the tokens that every block needs."""

    positions: jax.Array  # [B, T]; B may be 1 for all rows
    rope: tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, H] each
    segment_ids: jax.Array | None  # [B, T]


def token_context(
    config: ModelConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
) -> TokenContext:
    """The context of tokens at these positions, which attend within their segments if given."""
    rope = rope_tables(positions_BT, config.head_dim, config.rope_theta)
    return TokenContext(positions_BT, rope, segment_ids_BT)


class KeyValue(NamedTuple):
    """Rotated keys and values of one visit of one block."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, H]` in fp32, rotate-half layout (RoFormer, arXiv 2104.09864).

    The frequencies are those of transformers bit for bit: at large positions their last bit counts.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    angles_BTH = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles_BTH), jnp.sin(angles_BTH)


def apply_rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (h, h + H/2) by its position's angle; computes in fp32, keeps the dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    x = x_BTNH.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_BTNH.dtype)


class CausalAttention:
    """Attention of the tokens of one call to each other, for one visit of a block.

    Attributes:
      key_value: the keys and values that the visit attended to, once it was called.
    """

    def __init__(self, context: TokenContext, kind: str, reused_kv: KeyValue | None = None):
        """Begins a visit.

        Args:
          context: of the tokens.
          kind: as for `causal_attention`.
          reused_kv: keys and values of an earlier visit, for a visit that projects none.
        """
        self._context, self._kind = context, kind
        self.key_value = reused_kv

    def __call__(self, visit: Visit, q_BTNH, k_BTKH, v_BTKH) -> jax.Array:
        if visit.projects_kv:
            self.key_value = KeyValue(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
        q_BTNH = constrain(q_BTNH, ("batch", "seq", "act_heads", "head_dim"))
        with jax.named_scope("attend"):
            return causal_attention(
                q_BTNH, self.key_value, segment_ids_BT=self._context.segment_ids, kind=self._kind
            )


class CachedAttention:
    """Attention of new tokens to all tokens so far, for all visits of one call.

    Attributes:
      keys, values: of each cache slot, as in `decoding.KVCache`; those of the new tokens are stored
        as their visits are called.
    """

    def __init__(
        self,
        context: TokenContext,
        keys: Sequence[jax.Array],
        values: Sequence[jax.Array],
        lengths_B: jax.Array,
    ):
        """Begins a call.

        Args:
          context: of the new tokens.
          lengths_B: tokens that each row held before.
        """
        self.keys, self.values = list(keys), list(values)
        self._context, self._lengths_B = context, lengths_B

    def __call__(self, visit: Visit, q_BTNH, k_BTKH, v_BTKH) -> jax.Array:
        slot = visit.cache_slot
        if visit.projects_kv:
            k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
            self.keys[slot] = _store(self.keys[slot], k_BKHT, self._lengths_B, axis=2)
            self.values[slot] = _store(self.values[slot], v_BKTH, self._lengths_B, axis=1)
        positions_BT = self._context.positions
        return attend_to_cache(q_BTNH, self.keys[slot], self.values[slot], positions_BT)


def _store(held, new, starts_B, axis):
    """Writes `new` `[B, K, ...]` into `held` `[B * K, ...]`, each row from its start on `axis`."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if new.shape[0] == 1:  # as a batch of one, XLA would copy the cache
        return update(held, new[0], starts_B[0])
    return jax.vmap(update)(held.reshape(*new.shape[:2], *held.shape[1:]), new, starts_B).reshape(
        held.shape
    )


def causal_attention(
    q_BTNH: jax.Array,
    key_value: KeyValue,
    *,
    segment_ids_BT: jax.Array | None = None,
    kind: str = "xla",
) -> jax.Array:
    """Attention of T tokens to each other: each to itself and to those before it.

    Args:
      q_BTNH: rotated queries.
      key_value: rotated keys and values of the same T tokens.
      segment_ids_BT: when given, a token sees only tokens of its own segment (document).
      kind: "xla", or a kernel of the device that the program is for
        (`attention_kernels.choose_attention`).

    Returns:
      `[B, T, N, H]` in the dtype of the queries; softmax is computed in fp32.

    Raises:
      UserError: a kernel that does not take operands of this dtype or size.
    """
    check_shape(kind, q_BTNH.dtype, head_dim=q_BTNH.shape[-1], num_tokens=q_BTNH.shape[1])
    if kind == "cudnn":
        return cudnn_attention(q_BTNH, *key_value, segment_ids_BT)
    if kind == "splash":
        return splash_attention(q_BTNH, *key_value, segment_ids_BT)
    grouped = _to_grouped(q_BTNH, key_value)
    return _from_grouped(_blocked_attention(grouped, *key_value, segment_ids_BT))


def _to_grouped(q_BTNH: jax.Array, kv: KeyValue) -> jax.Array:
    """Scaled queries as `[B, K, G, T, H]`: the G heads that share a kv head side by side."""
    B, T, N, H = q_BTNH.shape
    K = kv.keys.shape[1]
    return (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _from_grouped(out_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = out_BKGTH.shape
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


# Attention without a fused kernel: blocks of queries against the keys up to them, so that the
# masked half is not computed and the scores of all tokens never exist at once; the backward pass
# computes them again from the saved normaliser (the scheme of FlashAttention-2, arXiv 2307.08691).
# Every product has the large operand as it lies in memory (M = G x block of queries, rows) and
# transposes the small one: XLA on CPU would copy the scores otherwise, at half the step's time.


def _query_blocks(num_tokens: int) -> list[tuple[int, int]]:
    size = max(128, -(-num_tokens // 8))
    return [(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def _rows(x_BKGTH: jax.Array, start: int, stop: int) -> jax.Array:
    """The block's rows as `[B, K, M, H]`."""
    block = x_BKGTH[:, :, :, start:stop]
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _block_scores(q_BKMH, keys_BKSH, segment_ids_BT, start: int, stop: int) -> jax.Array:
    """fp32 scores `[B, K, M, stop]`, masked."""
    scores = _matmul("bkmh,bksh->bkms", q_BKMH, keys_BKSH[:, :, :stop])
    visible = np.arange(start, stop)[:, None] >= np.arange(stop)[None, :]
    visible = jnp.asarray(visible)[None]
    if segment_ids_BT is not None:
        own = segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, :stop]
        visible = visible & own
    rows = (*scores.shape[:2], -1, stop - start, stop)
    masked = jnp.where(visible[:, None, None], scores.reshape(rows), _MASKED)
    return masked.reshape(scores.shape)


_matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocked_forward(q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT):
    outs, normalizers = [], []
    for start, stop in _query_blocks(q_BKGTH.shape[3]):
        q = _rows(q_BKGTH, start, stop)
        scores = _block_scores(q, keys_BKSH, segment_ids_BT, start, stop)
        largest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        values = values_BKSH[:, :, :stop]
        out = _matmul("bkms,bksh->bkmh", weights.astype(values.dtype), values) / total
        grouped = (*q_BKGTH.shape[:3], stop - start, -1)
        outs.append(out.astype(q_BKGTH.dtype).reshape(grouped))
        normalizers.append((largest + jnp.log(total)).reshape(grouped))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(normalizers, axis=3)


@jax.custom_vjp
def _blocked_attention(q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT):
    return _blocked_forward(q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT)[0]


def _blocked_attention_forward(q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT):
    out, normalizer = (
        checkpoint_name(x, ATTENTION_RESIDUALS)
        for x in _blocked_forward(q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT)
    )
    return out, (q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT, out, normalizer)


def _blocked_attention_backward(residuals, d_out_BKGTH):
    q_BKGTH, keys_BKSH, values_BKSH, segment_ids_BT, out_BKGTH, normalizer_BKGT1 = residuals
    dtype = q_BKGTH.dtype
    d_q, d_keys_BKHS, d_values_BKHS = [], 0.0, 0.0
    for start, stop in _query_blocks(q_BKGTH.shape[3]):
        q, out, d_out, normalizer = (
            _rows(x, start, stop) for x in (q_BKGTH, out_BKGTH, d_out_BKGTH, normalizer_BKGT1)
        )
        scores = _block_scores(q, keys_BKSH, segment_ids_BT, start, stop)
        weights = jnp.exp(scores - normalizer)
        d_weights = _matmul("bkmh,bksh->bkms", d_out, values_BKSH[:, :, :stop])
        along = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - along)).astype(dtype)
        d_q_block = _matmul("bkms,bksh->bkmh", d_scores, keys_BKSH[:, :, :stop])
        d_q.append(d_q_block.astype(dtype).reshape(*q_BKGTH.shape[:3], stop - start, -1))
        later = ((0, 0), (0, 0), (0, 0), (0, keys_BKSH.shape[2] - stop))
        d_keys_BKHS += jnp.pad(_matmul("bkmh,bkms->bkhs", q, d_scores), later)
        d_values_BKHS += jnp.pad(_matmul("bkmh,bkms->bkhs", d_out, weights.astype(dtype)), later)
    d_keys, d_values = (x.swapaxes(2, 3).astype(dtype) for x in (d_keys_BKHS, d_values_BKHS))
    return jnp.concatenate(d_q, axis=3), d_keys, d_values, None


_blocked_attention.defvjp(_blocked_attention_forward, _blocked_attention_backward)


def attend_to_cache(
    q_BTNH: jax.Array, keys_XHS: jax.Array, values_XSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of new tokens to a cache that holds them already; slot s is position s.

    Args:
      q_BTNH: rotated queries of the tokens at `positions_BT`.
      keys_XHS: rotated keys, X = B * K.
      values_XSH: values.

    Returns:
      `[B, T, N, H]` in the dtype of the queries; softmax is computed in fp32.
    """
    B, T, N, H = q_BTNH.shape
    X, S = values_XSH.shape[:2]
    grouped = (B, X // B, N * B // X, T)
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, X // B, -1, H)
    q_XMH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(X, -1, H)
    scores = _matmul("xmh,xhs->xms", q_XMH, keys_XHS).reshape(*grouped, S)
    visible_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], scores, _MASKED), axis=-1)
    weights_XMS = weights.astype(values_XSH.dtype).reshape(X, -1, S)
    out = _matmul("xms,xsh->xmh", weights_XMS, values_XSH).astype(q_BTNH.dtype)
    return _from_grouped(out.reshape(*grouped, H))
