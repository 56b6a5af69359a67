"""Small models of every kind that the tests share."""

import functools

import jax
import numpy as np

from mobilellm_jax.checkpoints.store import Checkpoints
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import abstract_params
from mobilellm_jax.model_bundle import ModelBundle, PromptFormat, Provenance
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

SHARING = [
    ("none", 1, "own"),
    ("immediate", 2, "own"),
    ("immediate", 3, "first_visit"),
    ("repeat_all", 2, "first_visit"),
    ("repeat_all", 3, "own"),
    ("reverse", 2, "own"),
    ("reverse", 3, "first_visit"),
]


def tiny(sharing: str = "none", num_repeats: int = 1, shared_kv: str = "own", **changes):
    """A model of 3 blocks, weights large enough that every part matters."""
    values = {
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 24,
        "ffn_dim": 40,
        "head_dim": 8,
        "vocab_size": 53,
        "max_seq_len": 64,
        "init_std": 0.2,
    }
    return ModelConfig(
        sharing=sharing, num_repeats=num_repeats, shared_kv=shared_kv, **values | changes
    )


ALL_KINDS = {
    **{f"{order}-x{repeats}-{kv}": tiny(order, repeats, kv) for order, repeats, kv in SHARING},
    "mha": tiny(num_kv_heads=4),
    "mqa-shared": tiny("immediate", 2, num_kv_heads=1),
    "untied": tiny(tie_embeddings=False, rope_theta=500.0, norm_eps=1e-2),
    "relu": tiny("repeat_all", 2, ffn="relu"),
}


@functools.cache
def random_params(config, seed=0):
    """Weights made by NumPy (compiling the initialiser takes seconds), norms away from 1."""
    rng = np.random.default_rng(seed)

    def draw(path, like):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, like.shape).astype(np.float32)
        return (rng.normal(size=like.shape) * config.init_std).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def bundle(
    config, params=None, tokenizer_model=None, *, bos=None, chat_template=None, stop_ids=None
) -> ModelBundle:
    """A model with random weights unless they are given, and the bytes of a SentencePiece model."""
    return ModelBundle(
        config=config,
        params=random_params(config) if params is None else params,
        tokenizer=tokenizer_model and SentencePieceTokenizer(tokenizer_model),
        prompt=PromptFormat(bos=bos, chat_template=chat_template, stop_ids=stop_ids),
        provenance=Provenance(),
    )


def save_params(workdir, config, params, tokenizer_model=None, metadata=None) -> None:
    """A checkpoint without optimizer state, as step 0 of a new workdir."""
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(
            0,
            params=params,
            opt_state=None,
            metadata={**(metadata or {}), "model": config.to_dict()},
            tokenizer=tokenizer_model and SentencePieceTokenizer(tokenizer_model),
        )
