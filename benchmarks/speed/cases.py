"""What all sides of a comparison are given: the same weights, the same tokens, the same AdamW.

Nothing here imports jax or torch, so that each side loads only what it is made of, and nothing here
depends on the device: the weights and tokens of a seed are the same everywhere.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Sequence

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface import names
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS

# `run_config.default_config().optimizer`, which cannot be read where ml_collections is missing; but
# for the warm-up, a thousandth of which would leave the weights as they are over 50 steps.
NUM_STEPS = 120_000
OPTIMIZER = types.SimpleNamespace(
    peak_lr=2e-3,
    schedule="cosine",
    warmup_steps=100,
    final_lr_fraction=0.1,
    decay_fraction=0.2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    clip_norm=1.0,
)


def learning_rate(step: int) -> float:
    """The rate of update number `step` from 0 on, for sides that do not have optax."""
    o = OPTIMIZER
    if step < o.warmup_steps:
        return o.peak_lr * step / o.warmup_steps
    done = (step - o.warmup_steps) / (NUM_STEPS - o.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1, done))) / 2
    return o.peak_lr * (o.final_lr_fraction + (1 - o.final_lr_fraction) * cosine)


def model_config(preset: str, changes: Sequence[str] = ()) -> ModelConfig:
    """A preset with `KEY=VALUE` changes of its fields.

    Raises:
      UserError: no such preset or field, or a value that makes no model.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    base = PRESETS[preset]
    kinds = {field.name: field.type for field in dataclasses.fields(base)}
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {near[0]}=...?" if near else f"; fields: {', '.join(kinds)}"
            raise UserError(f"--model {change}: write FIELD=VALUE{hint}")
        try:
            values[name] = text == "true" if kinds[name] is bool else kinds[name](text)
        except ValueError:
            raise UserError(f"--model {change}: a {kinds[name].__name__} is wanted") from None
    return dataclasses.replace(base, **values)


def random_weights(config: ModelConfig, seed: int = 0) -> dict:
    """fp32 arrays in the tree of `transformer.init_params`, of the same mean and spread.

    Uniform, because a billion normal values take numpy a quarter of a minute.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for weight in names.weights(config):
        *folders, name = weight.path
        shape = weight.shape(config)
        if name == "scale":
            array = np.ones(shape, np.float32)
        else:
            array = rng.random(shape, np.float32)
            array -= 0.5
            array *= config.init_std * math.sqrt(12)
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return params


def random_tokens(vocab_size: int, shape: tuple[int, int], step: int) -> np.ndarray:
    """int32 tokens of step number `step`, frequent and rare ones by Zipf's law as in a text.

    There is something to learn in them (how frequent each is), so that losses move.
    """
    shares = 1 / np.arange(2, vocab_size + 2)
    edges = np.cumsum(shares / shares.sum())
    draws = np.random.default_rng((1, step)).random(shape)
    return np.minimum(np.searchsorted(edges, draws), vocab_size - 1).astype(np.int32)
