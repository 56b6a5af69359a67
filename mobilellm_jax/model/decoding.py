"""Cached decoding: new tokens against the keys and values of the tokens before them.

A token reads every weight once and computes next to nothing with it, so decoding runs at the speed
of memory, if each weight is read where it lies, by all cores. The loop of training reads a layer
out of the stacked weights, which XLA on CPU does by a copy, and its narrow products each keep one
core busy: here every layer has its own arrays, those that share an input joined, and no loop.

Which way round a matrix lies is up to the number of rows: one row is multiplied fastest by a matrix
that lies output by output, `[outputs, inputs]` (a CPU then reads it from end to end: 0.87 of the
time of a token), several rows by one that lies `[inputs, outputs]` (0.8 of the time with 4 rows).
"""

import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from mobilellm_jax.model.attention import CachedAttention, KeyValue, token_context
from mobilellm_jax.model.block import run_block
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import rms_norm


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, with a static capacity of S tokens.

    One array for each cache slot (`Visit.cache_slot`), in the shapes of their products: B and K are
    one axis because XLA would copy a cache that is stored to in one shape and read in another.

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


class BlockMatrices(NamedTuple):
    """One block; matrices in the compute dtype, joined where they share an input.

    Shapes are those for several rows; for one, the matrices of two axes are transposed.
    """

    norms: dict[str, jax.Array]  # [D]
    query_key_value: jax.Array  # [D, (N + 2K) H]
    output: jax.Array  # [N, H, D]
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
    blocks: tuple[BlockMatrices, ...]
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
        tuple(_block_matrices(params["blocks"], layer, dtype, one) for layer in range(num_layers)),
        params["final_norm"]["scale"],
        one,
    )


@functools.partial(jax.jit, static_argnames=("dtype", "for_one_row"))
def _block_matrices(blocks: dict, layer: int, dtype: str, for_one_row: bool) -> BlockMatrices:
    block = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), blocks)

    def join(*matrices):
        flat = [matrix.reshape(matrix.shape[0], -1) for matrix in matrices]
        joined = jnp.concatenate(flat, axis=1).astype(dtype)
        return joined.T if for_one_row else joined

    attention, ffn = block["attention"], block["ffn"]
    return BlockMatrices(
        norms={name: weights["scale"] for name, weights in block.items() if "scale" in weights},
        query_key_value=join(attention["query"], attention["key"], attention["value"]),
        output=attention["output"].astype(dtype),
        gate_up=join(*(ffn[name] for name in ("gate", "up") if name in ffn)),
        down=join(ffn["down"]),
    )


def make_cache(
    config: ModelConfig, prompts: KeyValue, lengths_B: jax.Array, capacity: int
) -> KVCache:
    """The result of `MobileLLM.prefill` as a cache.

    Args:
      prompts: keys and values of prompts padded on the right, `[L, R', B, K, T, H]`.
      lengths_B: int32, tokens in each row; those behind them are ignored.
      capacity: S >= T, tokens that the cache can hold.
    """
    slots = [
        _cache_slot(prompts, (visit.block, visit.repeat), capacity)
        for visit in config.visits
        if visit.projects_kv
    ]
    keys, values = zip(*slots, strict=True)
    return KVCache(keys, values, lengths_B)


@functools.partial(jax.jit, static_argnames="capacity")
def _cache_slot(prompts: KeyValue, visit: tuple[int, int], capacity: int) -> KeyValue:
    """The visit's index is no constant, so that one compilation serves all."""
    kv = jax.tree.map(lambda x_LRBKTH: x_LRBKTH[visit], prompts)
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

    The hidden states `[B, T, D]` are the input of `MobileLLM.logits`. The caller keeps
    `lengths + T` within the capacity.
    """
    positions_BT = cache.lengths[:, None] + jnp.arange(tokens_BT.shape[1])[None, :]
    context = token_context(config, positions_BT)
    attention = CachedAttention(context, cache.keys, cache.values, cache.lengths)
    x_BTD = weights.vocabulary["embedding"][tokens_BT]
    for visit in config.visits:
        block = _DecodingBlock(config, weights.blocks[visit.block], weights.for_one_row)
        x_BTD = run_block(config, block, x_BTD, context, visit, attention)
    keys, values = tuple(attention.keys), tuple(attention.values)
    cache = KVCache(keys, values, cache.lengths + tokens_BT.shape[1])
    return rms_norm(x_BTD, weights.final_norm, config.norm_eps), cache


class _DecodingBlock:
    """A block's weights in decoding. Implements `block.BlockWeights`."""

    def __init__(self, config: ModelConfig, matrices: BlockMatrices, for_one_row: bool):
        self._config, self._matrices = config, matrices
        product = "BTD,FD->BTF" if for_one_row else "BTD,DF->BTF"
        self._multiply = functools.partial(jnp.einsum, product)

    def norm(self, name, x_BTD):
        return rms_norm(x_BTD, self._matrices.norms[name], self._config.norm_eps)

    def query_key_value(self, x_BTD, projects_kv):
        # Where keys and values are not projected, a narrower product would be no faster.
        N, K, H = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        joined = self._multiply(x_BTD, self._matrices.query_key_value)
        joined = joined.reshape(*x_BTD.shape[:2], N + 2 * K, H)
        return joined[:, :, :N], joined[:, :, N : N + K], joined[:, :, N + K :]

    def output(self, attended_BTNH):
        # Head by head, then summed: XLA on CPU leaves one product of this size to one core.
        by_head = jnp.einsum(
            "BTNH,NHD->NBTD",
            attended_BTNH,
            self._matrices.output,
            preferred_element_type=jnp.float32,
        )
        return by_head.sum(axis=0).astype(attended_BTNH.dtype)

    def gate_up(self, x_BTD):
        hidden = self._multiply(x_BTD, self._matrices.gate_up)
        return jnp.split(hidden, 2, axis=-1) if self._config.ffn == "swiglu" else (None, hidden)

    def down(self, hidden_BTF):
        return self._multiply(hidden_BTF, self._matrices.down)
