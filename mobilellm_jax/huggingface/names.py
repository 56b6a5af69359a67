"""The one table of names: our parameter tree <-> the tensors of a Hugging Face Llama model.

Hugging Face stores a linear layer as `[outputs, inputs]` with heads flattened and one tensor per
layer; we keep heads apart and stack the layers. The rotary convention (rotate-half) is the same, so
no row is permuted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass(frozen=True)
class WeightMapping:
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


def _in_block(path: str, hf_name: str, axes: str, *hf_axes: str) -> WeightMapping:
    return WeightMapping(
        ("blocks", *path.split("/")), f"model.layers.{{}}.{hf_name}.weight", axes, hf_axes
    )


EMBEDDING = WeightMapping(("embedding",), "model.embed_tokens.weight", "VD", ("V", "D"))
HEAD = WeightMapping(("head",), "lm_head.weight", "DV", ("V", "D"))
FINAL_NORM = WeightMapping(("final_norm", "scale"), "model.norm.weight", "D", ("D",))
_GATE = _in_block("ffn/gate", "mlp.gate_proj", "DF", "F", "D")
_BLOCK_WEIGHTS = (
    _in_block("attention_norm/scale", "input_layernorm", "D", "D"),
    _in_block("attention/query", "self_attn.q_proj", "DNH", "NH", "D"),
    _in_block("attention/key", "self_attn.k_proj", "DKH", "KH", "D"),
    _in_block("attention/value", "self_attn.v_proj", "DKH", "KH", "D"),
    _in_block("attention/output", "self_attn.o_proj", "NHD", "D", "NH"),
    _in_block("ffn_norm/scale", "post_attention_layernorm", "D", "D"),
    _GATE,
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


def block_weights(config: ModelConfig) -> tuple[WeightMapping, ...]:
    """The weights of one block; a ReLU feed-forward has no gate."""
    without = () if config.ffn == "swiglu" else (_GATE,)
    return tuple(weight for weight in _BLOCK_WEIGHTS if weight not in without)


def weights(config: ModelConfig) -> tuple[WeightMapping, ...]:
    """All weights of a model."""
    head = () if config.tie_embeddings else (HEAD,)
    return (EMBEDDING, *block_weights(config), FINAL_NORM, *head)


def hf_tensors(
    config: ModelConfig, blocks: Sequence[int]
) -> Iterator[tuple[str, WeightMapping, int | None]]:
    """(tensor name, weight, stored block) of a model whose layer i is stored block `blocks[i]`."""
    yield EMBEDDING.hf_name, EMBEDDING, None
    for layer, block in enumerate(blocks):
        for weight in block_weights(config):
            yield weight.hf_name.format(layer), weight, block
    yield FINAL_NORM.hf_name, FINAL_NORM, None
    if not config.tie_embeddings:
        yield HEAD.hf_name, HEAD, None


def hf_shapes(config: ModelConfig, blocks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, in the order of `hf_tensors`."""
    return {name: weight.hf_shape(config) for name, weight, _ in hf_tensors(config, blocks)}


def hf_arrays(
    config: ModelConfig, params: Mapping[str, Any], blocks: Sequence[int], dtype: str = "float32"
) -> Iterator[np.ndarray]:
    """The tensors themselves, one after the other, in the order of `hf_tensors`.

    Args:
      params: our parameter tree, any float dtype, on any device.
      blocks: the stored block of each layer of theirs.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      UserError: before the first array if a weight is missing, extra or misshapen; at its turn if
        it is not finite, or too large for `dtype`.
    """
    return _cast_arrays(config, _checked_leaves(config, params), blocks, dtype)


def _cast_arrays(
    config: ModelConfig,
    leaves: Mapping[tuple[str, ...], np.ndarray],
    blocks: Sequence[int],
    dtype: str,
) -> Iterator[np.ndarray]:
    for name, weight, block in hf_tensors(config, blocks):
        leaf = leaves[weight.path]
        array = weight.to_hf(leaf if block is None else leaf[block], config)
        with np.errstate(over="ignore"):
            cast = array.astype(DTYPES[dtype])
        if not np.isfinite(cast).all():
            ours = "/".join(weight.path) + ("" if block is None else f"[{block}]")
            if np.isfinite(array).all():
                problem = f"has values too large for {dtype}; use dtype 'bfloat16' or 'float32'"
            else:
                problem = "contains NaN or infinity; export an earlier checkpoint"
            raise UserError(f"parameter {ours} ({name}) {problem}")
        yield cast


def _checked_leaves(
    config: ModelConfig, params: Mapping[str, Any]
) -> dict[tuple[str, ...], np.ndarray]:
    """The weights by path, on the host; UserError for one that is missing, extra or misshapen."""
    expected = {weight.path: weight.shape(config) for weight in weights(config)}
    found = dict(flatten(params))
    for path in sorted(expected.keys() | found.keys()):
        shape = found[path].shape if path in found else None
        if shape != expected.get(path):
            raise UserError(
                f"parameter {'/'.join(path)} has shape {shape}, the config asks for "
                f"{expected.get(path)}; do the parameters belong to this config?"
            )
    return {path: np.asarray(leaf) for path, leaf in found.items()}


# Not those of flax.traverse_util: PyTorch's side of the benchmarks reads this file without JAX.


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
