"""The parts of a block as linen modules; every weight names its logical axes.

Logical axes of weights: layers, embed, heads, kv_heads, head_dim, ffn, vocab; of activations: batch,
seq, act_embed, act_heads, act_ffn, head_dim. `mobilellm_jax.training.sharding` maps them to the mesh.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.model.attention import (
    CachedKeyValue,
    KeyValue,
    apply_rope,
    causal_attention,
)
from mobilellm_jax.model.config import ModelConfig


class TokenContext(NamedTuple):
    """What every block needs to know of the tokens it runs on."""

    rope: tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, H] each
    segment_ids: jax.Array | None  # [B, T]
    cache_lengths: jax.Array | None  # [B]


def _matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]):
    init = nn.initializers.normal(module.config.init_std)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in fp32 (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
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
        cached: KeyValue | None,
        given: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        """Returns the output `[B, T, D]` and the tokens' keys and values.

        `given` takes the place of this visit's own keys and values (`shared_kv="first_visit"`).
        """
        c, dtype = self.config, x_BTD.dtype
        N, K, D, H = c.num_heads, c.num_kv_heads, c.embed_dim, c.head_dim
        query = _matrix(self, "query", (D, N, H), ("embed", "heads", "head_dim"))
        output = _matrix(self, "output", (N, H, D), ("heads", "head_dim", "embed"))
        q = jnp.einsum("BTD,DNH->BTNH", x_BTD, query.astype(dtype))
        q = apply_rope(q, context.rope)
        if given is None:
            key = _matrix(self, "key", (D, K, H), ("embed", "kv_heads", "head_dim"))
            value = _matrix(self, "value", (D, K, H), ("embed", "kv_heads", "head_dim"))
            k = jnp.einsum("BTD,DKH->BTKH", x_BTD, key.astype(dtype))
            v = jnp.einsum("BTD,DKH->BTKH", x_BTD, value.astype(dtype))
            given = KeyValue(apply_rope(k, context.rope), v)
        q = nn.with_logical_constraint(q, ("batch", "seq", "act_heads", "head_dim"))
        if cached is not None:
            cached = CachedKeyValue(*cached, context.cache_lengths)
        with jax.named_scope("attend"):
            attended = causal_attention(
                q,
                given,
                segment_ids_BT=context.segment_ids,
                cached=cached,
                kind=self.attention_kind,
            )
        return jnp.einsum("BTNH,NHD->BTD", attended, output.astype(dtype)), given


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) or FC-ReLU-FC."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BTD.dtype
        up = _matrix(self, "up", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))
        down = _matrix(self, "down", (c.ffn_dim, c.embed_dim), ("ffn", "embed"))
        hidden = jnp.einsum("BTD,DF->BTF", x_BTD, up.astype(dtype))
        if c.ffn == "swiglu":
            gate = _matrix(self, "gate", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))
            hidden = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x_BTD, gate.astype(dtype))) * hidden
        else:
            hidden = jax.nn.relu(hidden)
        hidden = nn.with_logical_constraint(hidden, ("batch", "seq", "act_ffn"))
        return jnp.einsum("BTF,FD->BTD", hidden, down.astype(dtype))


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: ModelConfig
    attention_kind: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: TokenContext,
        cached: KeyValue | None,
        given: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        c = self.config
        attention = Attention(c, self.attention_kind, name="attention")
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        attended, key_value = attention(normed, context, cached, given)
        x_BTD = x_BTD + attended
        normed = RMSNorm(c.norm_eps, name="ffn_norm")(x_BTD)
        x_BTD = x_BTD + FeedForward(c, name="ffn")(normed)
        return nn.with_logical_constraint(x_BTD, ("batch", "seq", "act_embed")), key_value
