"""Cached decoding: new tokens against the keys and values of the tokens before them.

A token reads every weight once and computes next to nothing with it, so decoding runs at the speed
of memory, if each weight is read where it lies, by all cores. The loop of training reads a layer
out of the stacked weights, which XLA on CPU does by a copy, and its narrow products each keep one
core busy: here every layer has its own arrays, those that share an input joined, and no loop.

Which way round a matrix lies is up to the number of rows: one row is multiplied fastest by a matrix
that lies output by output, `[outputs, inputs]` (a CPU then reads it from end to end: 0.87 of the
time of a token), several rows by one that lies `[inputs, outputs]` (0.8 of the time with 4 rows).
"""

import collections
import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.model.attention import KeyValue, apply_rope, attend_to_cache, rope_tables
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import RMSNorm


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, with a static capacity of S tokens.

    One array for each visit that has its own, visit r of block i at i * R' + r, with R' =
    `ModelConfig.num_cached_visits`. In the shapes of their products: B and K are one axis because
    XLA would copy a cache that is stored to in one shape and read in another.

    Attributes:
      keys: `[B * K, H, S]` each: half the time of `[B * K, S, H]` on a CPU.
      values: `[B * K, S, H]` each.
      lengths: int32 `[B]`, tokens held in each row; slots from there on are unused.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S, the number of tokens that fit."""
        return self.keys[0].shape[2]


class BlockWeights(NamedTuple):
    """One block; matrices in the compute dtype, joined where they share an input.

    Shapes are those for several rows; for one, the matrices of two axes are transposed.
    """

    attention_norm: jax.Array  # [D]
    query_key_value: jax.Array  # [D, (N + 2K) H]
    output: jax.Array  # [N, H, D]
    ffn_norm: jax.Array  # [D]
    gate_up: jax.Array  # [D, 2F]; [D, F] for an ffn without a gate
    down: jax.Array  # [F, D]


@flax.struct.dataclass
class DecodeWeights:
    """A model laid out for `decode`.

    Attributes:
      vocabulary: "embedding" `[V, D]` and, if untied, "head" `[D, V]`.
      blocks: one for each stored block.
      final_norm: `[D]`.
      for_one_row: whether the blocks' matrices are transposed.
    """

    vocabulary: dict[str, jax.Array]
    blocks: tuple[BlockWeights, ...]
    final_norm: jax.Array
    for_one_row: bool = flax.struct.field(pytree_node=False)


def decode_weights(params: dict, dtype: str, *, num_rows: int) -> DecodeWeights:
    """Lays parameters out for `decode`: a copy of all blocks, the table only if the dtype changes.

    Args:
      params: as `transformer.init_params` makes them.
      dtype: of the products, `Execution.dtype`.
      num_rows: B, rows that are decoded at a time; another number is slower, not wrong.
    """
    params = jax.device_put(params)
    num_layers = params["blocks"]["attention_norm"]["scale"].shape[0]
    one = num_rows == 1
    return DecodeWeights(
        {name: params[name].astype(dtype) for name in ("embedding", "head") if name in params},
        tuple(_block_weights(params["blocks"], layer, dtype, one) for layer in range(num_layers)),
        params["final_norm"]["scale"],
        one,
    )


@functools.partial(jax.jit, static_argnames=("dtype", "for_one_row"))
def _block_weights(blocks: dict, layer: int, dtype: str, for_one_row: bool) -> BlockWeights:
    block = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), blocks)

    def join(*matrices):
        flat = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
        joined = jnp.concatenate(flat, axis=1).astype(dtype)
        return joined.T if for_one_row else joined

    attention, ffn = block["attention"], block["ffn"]
    return BlockWeights(
        attention_norm=block["attention_norm"]["scale"],
        query_key_value=join(attention["query"], attention["key"], attention["value"]),
        output=attention["output"].astype(dtype),
        ffn_norm=block["ffn_norm"]["scale"],
        gate_up=join(*(ffn[name] for name in ("gate", "up") if name in ffn)),
        down=join(ffn["down"]),
    )


def make_cache(fresh: KeyValue, lengths_B: jax.Array, capacity: int) -> KVCache:
    """What `MobileLLM.prefill` computed, as a cache.

    Args:
      fresh: keys and values of prompts padded on the right.
      lengths_B: int32, tokens in each row; what stands behind them is ignored.
      capacity: S >= T, tokens that the cache can hold.
    """
    visits = np.ndindex(fresh.keys.shape[:2])
    keys, values = zip(*(_cached_visit(fresh, visit, capacity) for visit in visits), strict=True)
    return KVCache(keys, values, lengths_B)


@functools.partial(jax.jit, static_argnames="capacity")
def _cached_visit(fresh: KeyValue, visit: tuple[int, int], capacity: int) -> KeyValue:
    """The visit's index is no constant, so that one compilation serves all."""
    kv = jax.tree.map(lambda x_LRBKTH: x_LRBKTH[visit], fresh)
    B, K, T, H = kv.keys.shape
    free = (0, capacity - T)
    keys_XHT = kv.keys.swapaxes(2, 3).reshape(B * K, H, T)
    return KeyValue(
        jnp.pad(keys_XHT, ((0, 0), (0, 0), free)),
        jnp.pad(kv.values.reshape(B * K, T, H), ((0, 0), free, (0, 0))),
    )


def decode(
    config: ModelConfig, weights: DecodeWeights, tokens_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Continues every row by T tokens (usually one); returns hidden states and the new cache.

    The hidden states `[B, T, D]` are what `MobileLLM.logits` is applied to. The caller keeps
    `lengths + T` within the capacity.

    The same function as `MobileLLM`'s, written once more for its own needs; the norms, the rotary
    embedding and the head are shared.
    """
    positions_BT = cache.lengths[:, None] + jnp.arange(tokens_BT.shape[1])[None, :]
    rope = rope_tables(positions_BT, config.head_dim, config.rope_theta)
    keys, values = list(cache.keys), list(cache.values)
    num_visits = collections.Counter()
    product = "BTD,FD->BTF" if weights.for_one_row else "BTD,DF->BTF"
    multiply = functools.partial(jnp.einsum, product)
    x_BTD = weights.vocabulary["embedding"][tokens_BT]
    for layer in config.visit_order:
        block = weights.blocks[layer]
        q_BTNH, k_BTKH, v_BTKH = _project(config, block, x_BTD, rope, multiply)
        own = config.shared_kv == "own"
        slot = layer * config.num_cached_visits + (num_visits[layer] if own else 0)
        # A later visit of "first_visit" drops the keys and values it has projected: the product
        # without them would be narrower, and no faster.
        if own or num_visits[layer] == 0:
            keys[slot] = _store(keys[slot], k_BTKH.transpose(0, 2, 3, 1), cache.lengths, axis=2)
            values[slot] = _store(values[slot], v_BTKH.swapaxes(1, 2), cache.lengths, axis=1)
        num_visits[layer] += 1
        attended_BTNH = attend_to_cache(q_BTNH, keys[slot], values[slot], positions_BT)
        # Head by head, then summed: XLA on CPU leaves one product of this size to one core.
        by_head = jnp.einsum(
            "BTNH,NHD->NBTD", attended_BTNH, block.output, preferred_element_type=jnp.float32
        )
        x_BTD = x_BTD + by_head.sum(axis=0).astype(x_BTD.dtype)
        x_BTD = x_BTD + _feed_forward(config, block, x_BTD, multiply)
    cache = KVCache(tuple(keys), tuple(values), cache.lengths + tokens_BT.shape[1])
    return _norm(config, weights.final_norm, x_BTD), cache


def _norm(config, scale, x_BTD):
    return RMSNorm(config.norm_eps).apply({"params": {"scale": scale}}, x_BTD)


def _project(config, block, x_BTD, rope, multiply):
    """Rotated queries and keys, and values."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    joined = multiply(_norm(config, block.attention_norm, x_BTD), block.query_key_value)
    joined = joined.reshape(*x_BTD.shape[:2], N + 2 * K, H)
    rotated = apply_rope(joined[:, :, : N + K], rope)
    return rotated[:, :, :N], rotated[:, :, N:], joined[:, :, N + K :]


def _store(held, new, starts_B, axis):
    """Writes `new` `[B, K, ...]` into `held` `[B * K, ...]`, each row from its start on `axis`."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if new.shape[0] == 1:  # as a batch of one, XLA would copy the cache
        return update(held, new[0], starts_B[0])
    return jax.vmap(update)(held.reshape(*new.shape[:2], *held.shape[1:]), new, starts_B).reshape(
        held.shape
    )


def _feed_forward(config, block, x_BTD, multiply):
    hidden = multiply(_norm(config, block.ffn_norm, x_BTD), block.gate_up)
    if config.ffn == "swiglu":
        gate, up = jnp.split(hidden, 2, axis=-1)
        hidden = jax.nn.silu(gate) * up
    else:
        hidden = jax.nn.relu(hidden)
    return multiply(hidden, block.down)
