"""Small models and edited Hugging Face folders for the tests of the conversion."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from mobilellm_jax.huggingface.folder import read_hf
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

# N * H differs from D on purpose.
TINY = ModelConfig(
    num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=24, ffn_dim=40, head_dim=8, vocab_size=97
)
VARIANTS = {
    "gqa": TINY,
    "mha": dataclasses.replace(TINY, num_kv_heads=4),
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "immediate": dataclasses.replace(TINY, sharing="immediate", num_repeats=2),
    "repeat_all": dataclasses.replace(TINY, sharing="repeat_all", num_repeats=3),
    "reverse": dataclasses.replace(TINY, sharing="reverse", num_repeats=3, tie_embeddings=False),
    "theta_eps": dataclasses.replace(TINY, rope_theta=5e5, norm_eps=1e-2, max_seq_len=64),
}


def make_params(config: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(0, 0.2, shape).astype(np.float32)

    c, L, D, H = config, config.num_layers, config.embed_dim, config.head_dim
    params = {
        "embedding": normal(c.vocab_size, D),
        "blocks": {
            "attention_norm": {"scale": 1 + normal(L, D)},
            "attention": {
                "query": normal(L, D, c.num_heads, H),
                "key": normal(L, D, c.num_kv_heads, H),
                "value": normal(L, D, c.num_kv_heads, H),
                "output": normal(L, c.num_heads, H, D),
            },
            "ffn_norm": {"scale": 1 + normal(L, D)},
            "ffn": {
                "gate": normal(L, D, c.ffn_dim),
                "up": normal(L, D, c.ffn_dim),
                "down": normal(L, c.ffn_dim, D),
            },
        },
        "final_norm": {"scale": 1 + normal(D)},
    }
    if not c.tie_embeddings:
        params["head"] = normal(D, c.vocab_size)
    return params


def load_hf(path: Path, **options) -> tuple[ModelConfig, dict]:
    """Config and parameters of a folder."""
    model = read_hf(path, **options)
    return model.config, model.params


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of config.json (None removes one), without checksums to notice it."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def edit_tensors(folder: Path, edit) -> None:
    """Applies `edit(tensors)` to model.safetensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def shard(folder: Path, num_files: int = 2) -> dict[str, str]:
    """Splits model.safetensors; returns the index {tensor: file}."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    index = {}
    for i in range(num_files):
        part = {name: tensors[name] for name in sorted(tensors)[i::num_files]}
        safetensors.numpy.save_file(part, folder / f"part-{i}.safetensors")
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    path.unlink()
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str]) -> None:
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)


def train_small_tokenizer(path: Path) -> bytes:
    """A model of 600 pieces from a text that every installation has."""
    return train_tokenizer([Path(argparse.__file__).read_text()], 600, path).model_bytes
