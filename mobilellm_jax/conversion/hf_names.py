"""The one table of names: our parameter tree <-> the tensors of a Hugging Face Llama model.

Hugging Face stores a linear layer as `[outputs, inputs]` with heads flattened and one tensor per
layer; we keep heads apart and stack the layers. The rotary convention (rotate-half) is the same, so
no row is permuted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight in both forms.

    Attributes:
      path: keys of our parameter tree; what is under "blocks" has a leading layer axis.
      hf_name: tensor name, `{}` stands for the layer.
      axes: our axes (without the layer), one letter each.
      hf_axes: their axes; "NH" is the two axes N and H flattened.
    """

    path: tuple[str, ...]
    hf_name: str
    axes: str
    hf_axes: tuple[str, ...]

    @property
    def in_block(self) -> bool:
        return self.path[0] == "blocks"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in our tree, with the layer axis where there is one."""
        sizes = axis_sizes(config)
        shape = tuple(sizes[axis] for axis in self.axes)
        return (config.num_layers, *shape) if self.in_block else shape

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(int(np.prod([sizes[a] for a in axes])) for axes in self.hf_axes)

    def to_hf(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """One layer's weight of ours as their tensor (a view or a copy)."""
        order = [self.axes.index(axis) for axes in self.hf_axes for axis in axes]
        return array.transpose(order).reshape(self.hf_shape(config))

    def from_hf(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_hf`, a view."""
        sizes, flat = axis_sizes(config), "".join(self.hf_axes)
        order = [flat.index(axis) for axis in self.axes]
        return array.reshape([sizes[axis] for axis in flat]).transpose(order)


def _in_block(path: str, hf_name: str, axes: str, *hf_axes: str) -> Weight:
    return Weight(
        ("blocks", *path.split("/")), f"model.layers.{{}}.{hf_name}.weight", axes, hf_axes
    )


EMBEDDING = Weight(("embedding",), "model.embed_tokens.weight", "VD", ("V", "D"))
HEAD = Weight(("head",), "lm_head.weight", "DV", ("V", "D"))
FINAL_NORM = Weight(("final_norm", "scale"), "model.norm.weight", "D", ("D",))
BLOCK_WEIGHTS = (
    _in_block("attention_norm/scale", "input_layernorm", "D", "D"),
    _in_block("attention/query", "self_attn.q_proj", "DNH", "NH", "D"),
    _in_block("attention/key", "self_attn.k_proj", "DKH", "KH", "D"),
    _in_block("attention/value", "self_attn.v_proj", "DKH", "KH", "D"),
    _in_block("attention/output", "self_attn.o_proj", "NHD", "D", "NH"),
    _in_block("ffn_norm/scale", "post_attention_layernorm", "D", "D"),
    _in_block("ffn/gate", "mlp.gate_proj", "DF", "F", "D"),
    _in_block("ffn/up", "mlp.up_proj", "DF", "F", "D"),
    _in_block("ffn/down", "mlp.down_proj", "FD", "D", "F"),
)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    c = config
    return {
        "D": c.embed_dim,
        "N": c.num_heads,
        "K": c.num_kv_heads,
        "H": c.head_dim,
        "F": c.ffn_dim,
        "V": c.vocab_size,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """All weights of a SwiGLU model."""
    head = () if config.tie_embeddings else (HEAD,)
    return (EMBEDDING, *BLOCK_WEIGHTS, FINAL_NORM, *head)


def hf_tensors(
    config: ModelConfig, blocks: Sequence[int]
) -> Iterator[tuple[str, Weight, int | None]]:
    """(tensor name, weight, stored block) of a model whose layer i is stored block `blocks[i]`."""
    yield EMBEDDING.hf_name, EMBEDDING, None
    for layer, block in enumerate(blocks):
        for weight in BLOCK_WEIGHTS:
            yield weight.hf_name.format(layer), weight, block
    yield FINAL_NORM.hf_name, FINAL_NORM, None
    if not config.tie_embeddings:
        yield HEAD.hf_name, HEAD, None


def flatten(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, array) of each array in a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
