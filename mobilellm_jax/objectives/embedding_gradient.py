"""The gradient of the embedding table, summed once over the batch.

A tied table has two gradients, of the lookup and of the head, each a sum over the whole batch. Both
are summed up by shard of the batch (the part that one device works on) in one array, and over the
shards once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mobilellm_jax.model.layers import compute_axes, constrain

_AXES = ("vocab", "embed")
_BY_SHARD = ("batch", *compute_axes(_AXES))


class BatchShards(NamedTuple):
    """How a mesh splits the rows of a batch.

    Attributes:
      total: shards.
      in_group: neighbouring shards whose devices together store one copy of the weights; their
        gradients are summed first.
    """

    total: int = 1
    in_group: int = 1


class ShardedGradTable(NamedTuple):
    """Embedding table split in two: a forward pass and a gradient.

    Attributes:
      values: `[V, D]` in the compute dtype, gathered; without a gradient.
      shards: `[P, V, D]` fp32, never read; its cotangent collects the gradient per batch shard.
    """

    values: jax.Array
    shards: jax.Array


def sharded_grad_table(stored_VD: jax.Array, dtype: str, shards: BatchShards) -> ShardedGradTable:
    """Splits a stored fp32 table; it is cast as stored, then gathered."""
    values = constrain(jax.lax.stop_gradient(stored_VD).astype(dtype), _AXES)
    return ShardedGradTable(constrain(values, compute_axes(_AXES)), _by_shard(stored_VD, shards))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_shard(stored_VD, shards):
    return constrain(jnp.broadcast_to(stored_VD, (shards.total, *stored_VD.shape)), _BY_SHARD)


def _sum_shards(shards, _, d_shards_PVD):
    # Within a group first: each device goes on with the rows and columns that it stores.
    groups = (shards.total // shards.in_group, shards.in_group)
    d_groups = d_shards_PVD.reshape(*groups, *d_shards_PVD.shape[1:]).sum(axis=1)
    d_groups = constrain(d_groups, ("replicas", *_AXES))
    return (constrain(d_groups.sum(axis=0), _AXES),)


_by_shard.defvjp(lambda stored_VD, shards: (_by_shard(stored_VD, shards), None), _sum_shards)


@jax.custom_vjp
def look_up(table: ShardedGradTable, tokens_BT: jax.Array) -> jax.Array:
    """The rows of the tokens, `[B, T, D]`; their gradients are summed up in fp32."""
    return table.values[tokens_BT]


def _look_up_backward(residuals, d_x_BTD):
    like_PVD, tokens_BT = residuals
    tokens_PN = tokens_BT.reshape(like_PVD.shape[0], -1)
    d_x_PND = d_x_BTD.reshape(*tokens_PN.shape, -1).astype(like_PVD.dtype)
    zeros = constrain(jnp.zeros_like(like_PVD), _BY_SHARD)
    d_shards = jax.vmap(lambda shard, rows, d_x: shard.at[rows].add(d_x))(zeros, tokens_PN, d_x_PND)
    return ShardedGradTable(None, constrain(d_shards, _BY_SHARD)), None


look_up.defvjp(
    lambda table, tokens_BT: (look_up(table, tokens_BT), (table.shards, tokens_BT)),
    _look_up_backward,
)
