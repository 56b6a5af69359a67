"""The parts of a block as linen modules; every weight names its logical axes.

Logical axes of weights: layers, embed, norm, heads, kv_heads, head_dim, ffn, vocab; of activations:
batch, seq, act_embed, act_heads, act_ffn, head_dim. `mobilellm_jax.training.sharding` maps them to
the mesh.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback

from mobilellm_jax.model.attention import KeyValue, apply_rope, causal_attention
from mobilellm_jax.model.config import ModelConfig


class TokenContext(NamedTuple):
    """What every block needs to know of the tokens it runs on."""

    rope: tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, H] each
    segment_ids: jax.Array | None  # [B, T]


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Lays an activation out by the rules of the mesh, if there is one; unknown axes are errors."""
    return nn.with_logical_constraint(x, axes, fallback=RulesFallback.RAISE_ERROR)


def _matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]):
    init = nn.initializers.normal(module.config.init_std)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def in_use(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of a weight while it is computed with: whole along `embed`."""
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
    return jnp.einsum("BTD,DF->BTF", x_BTD, _for_use(weight_DF, axes, x_BTD.dtype))


def _for_use(weight_DF, axes, dtype):
    return constrain(weight_DF.astype(dtype), in_use(axes))


def _project_forward(x_BTD, weight_DF, axes):
    # Not by `project`: a checkpoint policy that keeps products must see one.
    return _product(x_BTD, weight_DF, axes), (x_BTD, weight_DF)


def _project_backward(axes, residuals, d_out_BTF):
    x_BTD, weight_DF = residuals
    d_x = jnp.einsum("BTF,DF->BTD", d_out_BTF, _for_use(weight_DF, axes, d_out_BTF.dtype))
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
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)[None, None, :]).astype(x_BTD.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: ModelConfig
    attention_kind: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: TokenContext,
        given: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        """Returns the output `[B, T, D]` and the tokens' keys and values.

        `given` takes the place of this visit's own keys and values (`shared_kv="first_visit"`).
        """
        c = self.config
        N, K, D, H = c.num_heads, c.num_kv_heads, c.embed_dim, c.head_dim
        B, T, _ = x_BTD.shape
        query = _matrix(self, "query", (D, N, H), ("embed", "heads", "head_dim"))
        output = _matrix(self, "output", (N, H, D), ("heads", "head_dim", "embed"))
        q_BTNH = project(x_BTD, query.reshape(D, N * H), ("embed", "heads")).reshape(B, T, N, H)
        q_BTNH = apply_rope(q_BTNH, context.rope)
        if given is None:
            key = _matrix(self, "key", (D, K, H), ("embed", "kv_heads", "head_dim"))
            value = _matrix(self, "value", (D, K, H), ("embed", "kv_heads", "head_dim"))
            k_BTKH = project(x_BTD, key.reshape(D, K * H), ("embed", "kv_heads")).reshape(
                B, T, K, H
            )
            v_BTKH = project(x_BTD, value.reshape(D, K * H), ("embed", "kv_heads")).reshape(
                B, T, K, H
            )
            k_BTKH = apply_rope(k_BTKH, context.rope)
            given = KeyValue(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
        q_BTNH = constrain(q_BTNH, ("batch", "seq", "act_heads", "head_dim"))
        with jax.named_scope("attend"):
            attended_BTNH = causal_attention(
                q_BTNH,
                given,
                segment_ids_BT=context.segment_ids,
                kind=self.attention_kind,
            )
        attended_BTF = attended_BTNH.reshape(B, T, N * H)
        return project(attended_BTF, output.reshape(N * H, D), ("heads", "embed")), given


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) or FC-ReLU-FC."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        up = _matrix(self, "up", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))
        down = _matrix(self, "down", (c.ffn_dim, c.embed_dim), ("ffn", "embed"))
        hidden = project(x_BTD, up, ("embed", "ffn"))
        if c.ffn == "swiglu":
            gate = _matrix(self, "gate", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))
            hidden = jax.nn.silu(project(x_BTD, gate, ("embed", "ffn"))) * hidden
        else:
            hidden = jax.nn.relu(hidden)
        hidden = constrain(hidden, ("batch", "seq", "act_ffn"))
        return project(hidden, down, ("ffn", "embed"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: ModelConfig
    attention_kind: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: TokenContext,
        given: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        c = self.config
        attention = Attention(c, self.attention_kind, name="attention")
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        attended, key_value = attention(normed, context, given)
        x_BTD = x_BTD + attended
        normed = RMSNorm(c.norm_eps, name="ffn_norm")(x_BTD)
        x_BTD = x_BTD + FeedForward(c, name="ffn")(normed)
        return constrain(x_BTD, ("batch", "seq", "act_embed")), key_value
