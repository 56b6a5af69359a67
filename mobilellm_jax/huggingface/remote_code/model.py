"""MobileLLM in PyTorch with its sharing kept: a block is one module, called once per visit.

Needs nothing but torch: this file also ships in compact Hugging Face folders. Tensors have the
names of a Llama of L layers, L the stored blocks. Letters: B batch, T query positions, S key
positions, D embed, N query heads, K kv heads, H head_dim, F ffn, V vocabulary.

What attends to what is left to an object, so that training, cached decoding and programs for phones
are one model: `attend(attention, slot, q_BTNH, k_BTKH, v_BTKH) -> BTNH` keeps the keys and values
under the number `slot`; without keys and values it takes those that the slot already holds. The
module `attention` says which tokens see each other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Visit(Protocol):
    """One execution of a stored block.

    Attributes:
      block: number of the stored block.
      cache_slot: number of the keys and values that it attends to.
      projects_kv: whether it projects them, or takes those that an earlier visit left there.
    """

    block: int
    cache_slot: int
    projects_kv: bool


class Architecture(Protocol):
    """The part of a config that the module reads; `mobilellm_jax.ModelConfig` has it all."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    ffn_dim: int
    vocab_size: int
    ffn: str
    tie_embeddings: bool
    rope_theta: float
    norm_eps: float
    visits: Sequence[Visit]


class CausalAttention:
    """Attention over the tokens of one call, for training and scoring.

    Keys and values are kept where `is_reread`, else they would only fill memory.
    """

    def __init__(self, is_reread: bool = True):
        self._is_reread = is_reread
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, attention, slot, q_BTNH, k_BTKH=None, v_BTKH=None):
        if k_BTKH is None:
            k_BTKH, v_BTKH = self._held[slot]
        elif self._is_reread:
            self._held[slot] = k_BTKH, v_BTKH
        return attention.among_themselves(q_BTNH, k_BTKH, v_BTKH)


class KVCache:
    """Attention over the tokens of all calls so far, for decoding; every row has as many."""

    def __init__(self):
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self._held.values()))[0].shape[1] if self._held else 0

    def __call__(self, attention, slot, q_BTNH, k_BTKH=None, v_BTKH=None):
        if k_BTKH is not None:
            if slot in self._held:
                k_held, v_held = self._held[slot]
                k_BTKH, v_BTKH = torch.cat([k_held, k_BTKH], 1), torch.cat([v_held, v_BTKH], 1)
            self._held[slot] = k_BTKH, v_BTKH
        k_BSKH, v_BSKH = self._held[slot]
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        places_S = torch.arange(S, device=q_BTNH.device)
        visible_TS = attention.visible(places_S[S - T :, None], places_S)
        return grouped_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_TS)


def grouped_attention(q_BTNH, k_BSKH, v_BSKH, *, mask=None, is_causal=False):
    """Scaled dot-product attention, N / K query heads to each key head; `[B, T, N, H]`."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=True,
    )
    return out_BNTH.transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_BTD):
        x = x_BTD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (x * self.weight.float()).to(x_BTD.dtype)


def rotary_tables(positions_BT, head_dim: int, theta: float):
    """fp32 cosines and sines `[B, T, 1, H]`."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    angles_BTH = positions_BT[..., None].float() * frequencies
    angles_BTH = torch.cat([angles_BTH, angles_BTH], dim=-1)[:, :, None, :]
    return angles_BTH.cos(), angles_BTH.sin()


def rotate(x_BTNH, rope):
    """Rotary positions, halves as pairs (arXiv 2104.09864)."""
    cosines, sines = rope
    first, second = x_BTNH.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BTNH.float() * cosines + turned * sines).to(x_BTNH.dtype)


class Attention(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.embed_dim, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.embed_dim, bias=False)

    def forward(self, x_BTD, rope, attend, visit: Visit):
        def heads(y):
            return y.unflatten(-1, (-1, self.head_dim))

        q_BTNH = rotate(heads(self.q_proj(x_BTD)), rope)
        if visit.projects_kv:
            k_BTKH = rotate(heads(self.k_proj(x_BTD)), rope)
            v_BTKH = heads(self.v_proj(x_BTD))
            out_BTNH = attend(self, visit.cache_slot, q_BTNH, k_BTKH, v_BTKH)
        else:
            out_BTNH = attend(self, visit.cache_slot, q_BTNH)
        return self.o_proj(out_BTNH.flatten(-2))

    def visible(self, queries, keys):
        """Whether tokens at the places of the queries see those of the keys; broadcasts."""
        return keys <= queries

    def among_themselves(self, q_BTNH, k_BTKH, v_BTKH):
        """Attention of T tokens to each other, each to those that are `visible` to it."""
        return grouped_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True)


class FeedForward(nn.Module):
    """SwiGLU, or FC-ReLU-FC."""

    def __init__(self, config: Architecture):
        super().__init__()
        c = config
        self.gate_proj = (
            nn.Linear(c.embed_dim, c.ffn_dim, bias=False) if c.ffn == "swiglu" else None
        )
        self.up_proj = nn.Linear(c.embed_dim, c.ffn_dim, bias=False)
        self.down_proj = nn.Linear(c.ffn_dim, c.embed_dim, bias=False)

    def forward(self, x_BTD):
        up = self.up_proj(x_BTD)
        hidden = F.relu(up) if self.gate_proj is None else F.silu(self.gate_proj(x_BTD)) * up
        return self.down_proj(hidden)


class Block(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTD, rope, attend, visit: Visit):
        attended = self.self_attn(self.input_layernorm(x_BTD), rope, attend, visit)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Tokens to normalised hidden states, without the head.

    Attributes:
      gradient_checkpointing: set it to keep only the input of each visit for the backward pass, and
        to compute the rest again.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.visits = config.visits
        self.rereads = not all(visit.projects_kv for visit in self.visits)
        self.gradient_checkpointing = False

    def forward(self, tokens_BT, attend, positions_BT):
        """Hidden states `[B, T, D]`; `positions_BT` counts from the first token of each row."""
        x_BTD = self.embed_tokens(tokens_BT)
        rope = rotary_tables(positions_BT, self.head_dim, self.rope_theta)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for visit in self.visits:
            block, arguments = self.layers[visit.block], (x_BTD, rope, attend, visit)
            if recompute:
                # The reentrant kind loses the gradient of keys and values that are read again.
                x_BTD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD = block(*arguments)
        return self.norm(x_BTD)


class MobileLLM(nn.Module):
    """The language model: `model(tokens)` gives logits `[B, T, V]` of the tokens that follow."""

    def __init__(self, config: Architecture):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BT, cache: KVCache | None = None):
        """Logits `[B, T, V]`; with a cache, of tokens that follow those it holds."""
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
        attend = cache if cache is not None else CausalAttention(self.model.rereads)
        return self.lm_head(self.model(tokens_BT, attend, positions_T.expand_as(tokens_BT)))
