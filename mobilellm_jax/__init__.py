"""mobilellm_jax: small on-device language models in JAX.

The names below are the public surface. They load on first use, so that importing the package
costs nothing and starts no JAX backend.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "mobilellm_jax.model.config",
    "PRESETS": "mobilellm_jax.model.presets",
    "MobileLLM": "mobilellm_jax.model.transformer",
    "load": "mobilellm_jax.checkpoints.loading",
    "load_torch": "mobilellm_jax.export.pytorch",
    "save_hf": "mobilellm_jax.huggingface.folder",
    "UserError": "mobilellm_jax.errors",
}
__all__ = ["MobileLLM", "ModelConfig", "PRESETS", "UserError", "load", "load_torch", "save_hf"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mobilellm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
