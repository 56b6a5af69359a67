"""Costs of a model, counted from its config: parameters, FLOPs, bytes of keys and values."""

import dataclasses

from mobilellm_jax.model.config import ModelConfig


def num_ffn_matrices(config: ModelConfig) -> int:
    """Matrices of one feed-forward layer: SwiGLU has a gate beside up and down."""
    return 3 if config.ffn == "swiglu" else 2


def _query_and_output(config: ModelConfig) -> int:
    return 2 * config.embed_dim * config.num_heads * config.head_dim


def _key_and_value(config: ModelConfig) -> int:
    return 2 * config.embed_dim * config.num_kv_heads * config.head_dim


def _ffn(config: ModelConfig) -> int:
    return num_ffn_matrices(config) * config.embed_dim * config.ffn_dim


def count_block_params(config: ModelConfig) -> int:
    """Stored parameters of all blocks, shared ones once, and of the final norm."""
    norms = 2 * config.embed_dim
    block = _query_and_output(config) + _key_and_value(config) + _ffn(config) + norms
    return config.num_layers * block + config.embed_dim


def count_params(config: ModelConfig) -> int:
    """Stored parameters: shared blocks once, a tied embedding once (paper, table 9)."""
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.embed_dim
    return count_block_params(config) + embeddings


def matmul_params_per_token(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: every visit counted, the head once.

    The embedding lookup and the norms count 0. A later visit under `first_visit` does not project
    keys and values.
    """
    blocks = config.depth * (_query_and_output(config) + _ffn(config))
    blocks += config.num_cache_slots * _key_and_value(config)
    return blocks + config.vocab_size * config.embed_dim


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """Floating-point operations of forward and backward pass, per token.

    Attributes:
      matmul: 6 per weight multiplied with (2 forward, 4 backward); attention left out ("6N").
      causal: with the half of the attention scores that a causal mask keeps. The headline figure
        (Megatron, MaxText).
      full: with all scores (PaLM, nanoGPT).
    """

    matmul: int
    causal: int
    full: int


def train_flops_per_token(config: ModelConfig, seq_len: int) -> TrainFlops:
    """Training FLOPs per token at `seq_len`; rematerialised work is not counted."""
    matmul = 6 * matmul_params_per_token(config)
    half_of_scores = 6 * config.depth * config.num_heads * config.head_dim * seq_len
    return TrainFlops(matmul, matmul + half_of_scores, matmul + 2 * half_of_scores)


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values kept for one token of context (2 bytes per value: fp16, bf16)."""
    values = 2 * config.num_kv_heads * config.head_dim
    return config.num_cache_slots * values * bytes_per_value
