"""One transformer block: its forward pass, written once, and its weights in training.

Training and decoding run the same `run_block`. They differ in how they multiply by weights
(`BlockWeights`) and in what a token attends to (`Attend`).
"""

from collections.abc import Callable
from typing import Protocol

import flax.linen as nn
import jax

from mobilellm_jax.model.attention import CausalAttention, KeyValue, TokenContext, apply_rope
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import RMSNorm, constrain, declare_matrix, project
from mobilellm_jax.model.visits import Visit

# (visit, rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] or None where the visit
# projects none) -> attended values [B, T, N, H].
Attend = Callable[[Visit, jax.Array, jax.Array | None, jax.Array | None], jax.Array]


class BlockWeights(Protocol):
    """A block's weights, each to be applied to its input."""

    def norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """RMSNorm with the scale of that name."""

    def query_key_value(
        self, x_BTD: jax.Array, projects_kv: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Queries `[B, T, N, H]`; keys and values `[B, T, K, H]`, None where not projected."""

    def output(self, attended_BTNH: jax.Array) -> jax.Array:
        """Attended values of all heads to `[B, T, D]`."""

    def gate_up(self, x_BTD: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """Gate, None for an FFN without one, and up: `[B, T, F]` each."""

    def down(self, hidden_BTF: jax.Array) -> jax.Array:
        """Hidden values of the FFN to `[B, T, D]`."""


def run_block(
    config: ModelConfig,
    weights: BlockWeights,
    x_BTD: jax.Array,
    context: TokenContext,
    visit: Visit,
    attend: Attend,
) -> jax.Array:
    """One visit of a pre-norm block: attention with rotary positions, then SwiGLU or ReLU.

    Args:
      x_BTD: the residual stream.
      context: of the tokens.
    """
    normed_BTD = weights.norm("attention_norm", x_BTD)
    q_BTNH, k_BTKH, v_BTKH = weights.query_key_value(normed_BTD, visit.projects_kv)
    q_BTNH = apply_rope(q_BTNH, context.rope)
    if visit.projects_kv:
        k_BTKH = apply_rope(k_BTKH, context.rope)
    x_BTD = x_BTD + weights.output(attend(visit, q_BTNH, k_BTKH, v_BTKH))
    gate_BTF, up_BTF = weights.gate_up(weights.norm("ffn_norm", x_BTD))
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF if config.ffn == "swiglu" else jax.nn.relu(up_BTF)
    return x_BTD + weights.down(hidden_BTF)


class Block(nn.Module):
    """A block's weights in training; calling it is one visit. Implements `BlockWeights`."""

    config: ModelConfig
    attention_kind: str

    def setup(self):
        self.attention = AttentionWeights(self.config)
        self.attention_norm = RMSNorm(self.config.norm_eps)
        self.ffn = FeedForwardWeights(self.config)
        self.ffn_norm = RMSNorm(self.config.norm_eps)

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, visit: Visit, reused_kv: KeyValue | None
    ) -> tuple[jax.Array, KeyValue]:
        """Returns the residual stream and the keys and values that the tokens attended to.

        Args:
          reused_kv: those of an earlier visit, for a visit that projects none.
        """
        attend = CausalAttention(context, self.attention_kind, reused_kv)
        x_BTD = run_block(self.config, self, x_BTD, context, visit, attend)
        return constrain(x_BTD, ("batch", "seq", "act_embed")), attend.key_value

    def norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return getattr(self, name)(x_BTD)

    def query_key_value(self, x_BTD: jax.Array, projects_kv: bool):
        return self.attention.query_key_value(x_BTD, projects_kv)

    def output(self, attended_BTNH: jax.Array) -> jax.Array:
        return self.attention.output_of(attended_BTNH)

    def gate_up(self, x_BTD: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        return self.ffn.gate_up(x_BTD)

    def down(self, hidden_BTF: jax.Array) -> jax.Array:
        return self.ffn.down_of(hidden_BTF)


class AttentionWeights(nn.Module):
    """Projections of grouped-query attention."""

    config: ModelConfig

    def setup(self):
        c = self.config
        N, K, D, H = c.num_heads, c.num_kv_heads, c.embed_dim, c.head_dim

        def matrix(name, shape, axes):
            return declare_matrix(self, name, shape, axes, c.init_std)

        # In this order, on which the random initial values depend.
        self.query = matrix("query", (D, N, H), ("embed", "heads", "head_dim"))
        self.output = matrix("output", (N, H, D), ("heads", "head_dim", "embed"))
        self.key = matrix("key", (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.value = matrix("value", (D, K, H), ("embed", "kv_heads", "head_dim"))

    def query_key_value(self, x_BTD, projects_kv):
        q_BTNH = _heads(x_BTD, self.query, "heads")
        if not projects_kv:
            return q_BTNH, None, None
        return q_BTNH, _heads(x_BTD, self.key, "kv_heads"), _heads(x_BTD, self.value, "kv_heads")

    def output_of(self, attended_BTNH):
        B, T, N, H = attended_BTNH.shape
        weight_FD = self.output.reshape(N * H, -1)
        return project(attended_BTNH.reshape(B, T, N * H), weight_FD, ("heads", "embed"))


def _heads(x_BTD, weight_DNH, axis):
    D, N, H = weight_DNH.shape
    projected = project(x_BTD, weight_DNH.reshape(D, N * H), ("embed", axis))
    return projected.reshape(*x_BTD.shape[:2], N, H)


class FeedForwardWeights(nn.Module):
    """Projections of SwiGLU (arXiv 2002.05202) or FC-ReLU-FC."""

    config: ModelConfig

    def setup(self):
        c = self.config

        def matrix(name, shape, axes):
            return declare_matrix(self, name, shape, axes, c.init_std)

        # In this order, on which the random initial values depend.
        self.up = matrix("up", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))
        self.down = matrix("down", (c.ffn_dim, c.embed_dim), ("ffn", "embed"))
        if c.ffn == "swiglu":
            self.gate = matrix("gate", (c.embed_dim, c.ffn_dim), ("embed", "ffn"))

    def gate_up(self, x_BTD):
        up_BTF = project(x_BTD, self.up, ("embed", "ffn"))
        if self.config.ffn != "swiglu":
            return None, up_BTF
        return project(x_BTD, self.gate, ("embed", "ffn")), up_BTF

    def down_of(self, hidden_BTF):
        hidden_BTF = constrain(hidden_BTF, ("batch", "seq", "act_ffn"))
        return project(hidden_BTF, self.down, ("ffn", "embed"))
