"""Our checkpoints as PyTorch modules, and PyTorch modules as our parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilellm_jax.checkpoints.loading import load
from mobilellm_jax.huggingface import names as hf_names
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from mobilellm_jax.huggingface.remote_code.model import MobileLLM


def load_torch(path: str | Path) -> MobileLLM:
    """Reads a model as a plain PyTorch module, fp32, shared blocks once.

    Usage: `load_torch(path)(tokens)` gives the logits `[B, T, V]` of int tokens `[B, T]`.

    Args:
      path: as for `mobilellm_jax.load`: a run's workdir, the folder of one step, or a Hugging Face
        folder.

    Raises:
      UserError: nothing to read there, or something damaged; torch is not installed.
    """
    import_extra("torch", "torch")
    return module_from_params(*load(path))


def module_from_params(config: ModelConfig, params: Mapping[str, Any]) -> MobileLLM:
    """The module of a config, with weights; `params_from_module` is the inverse.

    Memory: the parameters once more.

    Args:
      params: our parameter tree, any float dtype, on any device.

    Raises:
      UserError: the parameters do not belong to the config, or are not finite.
    """
    torch = import_extra("torch", "torch")
    from mobilellm_jax.huggingface.remote_code.model import MobileLLM

    blocks = range(config.num_layers)
    arrays = hf_names.hf_arrays(config, params, blocks)
    names = hf_names.hf_shapes(config, blocks)
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in zip(names, arrays, strict=True)
    }
    embedding, head = hf_names.EMBEDDING.hf_name, hf_names.HEAD.hf_name
    if config.tie_embeddings:
        tensors[head] = tensors[embedding]
    with torch.device("meta"):
        module = MobileLLM(config)
    module.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:  # assigned as two parameters of one memory
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def params_from_module(config: ModelConfig, module: MobileLLM) -> dict[str, Any]:
    """Our parameter tree, fp32 NumPy arrays, of a module: for going on in JAX."""
    tensors = module.state_dict()
    leaves = {w.path: np.empty(w.shape(config), np.float32) for w in hf_names.weights(config)}
    for name, weight, block in hf_names.hf_tensors(config, range(config.num_layers)):
        array = tensors[name].float().cpu().numpy()
        leaves[weight.path][... if block is None else block] = weight.from_hf(array, config)
    return hf_names.unflatten(leaves)
