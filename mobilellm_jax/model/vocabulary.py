"""The embedding table while a step computes with it.

A tied table has two gradients, of the lookup and of the head, each a sum over the whole batch. They
are summed up by part of the batch (what one device works on) in one array, and over the parts once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mobilellm_jax.model.layers import constrain, in_use

_AXES = ("vocab", "embed")
_BY_PART = ("batch", *in_use(_AXES))


class Table(NamedTuple):
    """A table for use: its values have no gradient, its parts have nothing else."""

    values: jax.Array  # [V, D] in the compute dtype, whole
    parts: jax.Array  # [P, V, D] fp32; read by nobody


def make_table(stored_VD: jax.Array, dtype: str) -> Table:
    """A stored fp32 table for use; cast where it lies, then brought together."""
    values = constrain(jax.lax.stop_gradient(stored_VD).astype(dtype), _AXES)
    return Table(constrain(values, in_use(_AXES)), _by_part(stored_VD, batch_shards(), _fsdp()))


def batch_shards() -> int:
    """Parts that the rows of a batch are split into on the mesh in force; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1) * _fsdp()


def _fsdp() -> int:
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_part(stored_VD, parts, fsdp):
    return constrain(jnp.broadcast_to(stored_VD, (parts, *stored_VD.shape)), _BY_PART)


def _sum_parts(parts, fsdp, _, d_parts_PVD):
    # Over fsdp first: each device goes on with the rows and columns that it stores.
    d_parts = d_parts_PVD.reshape(parts // fsdp, fsdp, *d_parts_PVD.shape[1:]).sum(axis=1)
    d_parts = constrain(d_parts, ("replicas", *_AXES))
    return (constrain(d_parts.sum(axis=0), _AXES),)


_by_part.defvjp(
    lambda stored_VD, parts, fsdp: (_by_part(stored_VD, parts, fsdp), None),
    _sum_parts,
)


@jax.custom_vjp
def look_up(table: Table, tokens_BT: jax.Array) -> jax.Array:
    """The rows of the tokens, `[B, T, D]`; their gradients are summed up in fp32."""
    return table.values[tokens_BT]


def _look_up_backward(residuals, d_x_BTD):
    like_PVD, tokens_BT = residuals
    tokens_PN = tokens_BT.reshape(like_PVD.shape[0], -1)
    d_x_PND = d_x_BTD.reshape(*tokens_PN.shape, -1).astype(like_PVD.dtype)
    zeros = constrain(jnp.zeros_like(like_PVD), _BY_PART)
    d_parts = jax.vmap(lambda part, rows, d_x: part.at[rows].add(d_x))(zeros, tokens_PN, d_x_PND)
    return Table(None, constrain(d_parts, _BY_PART)), None


look_up.defvjp(
    lambda table, tokens_BT: (look_up(table, tokens_BT), (table.parts, tokens_BT)),
    _look_up_backward,
)
