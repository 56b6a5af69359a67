"""Primitive layers; every weight names its logical axes.

Logical axes of weights: layers, embed, norm, heads, kv_heads, head_dim, ffn, vocab; of activations:
batch, seq, act_embed, act_heads, act_ffn, head_dim. `mobilellm_jax.training.sharding` maps them to
the mesh.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Lays an activation out by the rules of the mesh, if there is one; unknown axes are errors."""
    return nn.with_logical_constraint(x, axes, fallback=RulesFallback.RAISE_ERROR)


def declare_matrix(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init_std: float
) -> jax.Array:
    """A weight of `module`, fp32, with a normal initialiser."""
    init = nn.initializers.normal(init_std)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def compute_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Logical axes of a weight during compute: gathered along `embed`."""
    return tuple("act_embed" if axis == "embed" else axis for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x_BTD: jax.Array, weight_DF: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """`x @ weight` in the dtype of x.

    The backward pass gathers the weight again, so that whole weights of many layers never exist at
    once, and is laid out for XLA on CPU: the weight's gradient is x^T @ dy or (dy^T @ x)^T, and XLA
    transposes the left operand, together with all elementwise work that it has fused into it, so
    that should be the narrower one. Autodiff always takes the latter.

    Args:
      weight_DF: as stored.
      axes: its logical axes.
    """
    return _product(x_BTD, weight_DF, axes)


def _product(x_BTD, weight_DF, axes):
    return jnp.einsum("BTD,DF->BTF", x_BTD, _gather_cast(weight_DF, axes, x_BTD.dtype))


def _gather_cast(weight_DF, axes, dtype):
    return constrain(weight_DF.astype(dtype), compute_axes(axes))


def _project_forward(x_BTD, weight_DF, axes):
    # Not by `project`: a checkpoint policy that keeps products must see one.
    return _product(x_BTD, weight_DF, axes), (x_BTD, weight_DF)


def _project_backward(axes, residuals, d_out_BTF):
    x_BTD, weight_DF = residuals
    d_x = jnp.einsum("BTF,DF->BTD", d_out_BTF, _gather_cast(weight_DF, axes, d_out_BTF.dtype))
    if x_BTD.shape[-1] <= d_out_BTF.shape[-1]:
        d_weight = jnp.einsum("BTD,BTF->DF", x_BTD, d_out_BTF)
    else:
        d_weight = jnp.einsum("BTF,BTD->FD", d_out_BTF, x_BTD).T
    return d_x, constrain(d_weight, axes).astype(weight_DF.dtype)


project.defvjp(_project_forward, _project_backward)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in fp32 (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, x_BTD.shape[-1:], jnp.float32)
        return rms_norm(x_BTD, scale, self.epsilon)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """The function of `RMSNorm`."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    scale = jax.lax.expand_dims(scale_D.astype(jnp.float32), range(x.ndim - 1))
    return (x * scale).astype(x_BTD.dtype)
