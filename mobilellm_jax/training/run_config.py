"""Every key of a training run with its default, and how a config file and overrides are read.

A config file is a Python file with a function `get_config()` that changes what it wants of
`default_config()`. Keys that are not in here cannot be set, from a file or from the command line.
"""

import re
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS


def default_config(preset: str = "125m") -> ml_collections.ConfigDict:
    """The run that the paper and the official script describe, for the named architecture."""
    config = ml_collections.ConfigDict()
    # Of parameters and of the order of the data.
    config.seed = 0
    # Architecture: every field of `ModelConfig`.
    config.model = ml_collections.ConfigDict(PRESETS[preset].to_dict())

    config.data = ml_collections.ConfigDict()
    # Folder made by `mobilellm prepare`, or a mixture "DIR=0.7,DIR=0.3" (shares of the samples).
    config.data.path = ""
    # Whether a token attends only to its own document, or to all that precedes it in the record.
    config.data.mask_documents = False

    config.train = ml_collections.ConfigDict()
    config.train.num_steps = 120_000
    # Sequences per step over all devices; x 2048 tokens = the paper's 2.1M tokens per step.
    config.train.global_batch_size = 1024
    # Parts that a step's batch is computed in, one after the other (less memory, same result).
    config.train.accumulation_steps = 1

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.peak_lr = 2e-3
    # "cosine" from the peak to `final_lr_fraction` of it at the last step; or "wsd": constant
    # after the warm-up, then linear over the last `decay_fraction` of the steps.
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1000
    config.optimizer.final_lr_fraction = 0.1
    config.optimizer.decay_fraction = 0.2
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.clip_norm = 1.0

    config.execution = ml_collections.ConfigDict()
    # "auto" is bfloat16 on GPUs and TPUs and float32 on CPUs; master weights are always float32.
    config.execution.dtype = "auto"
    # What the backward pass recomputes: "none", "dots" or "full".
    config.execution.remat = "none"
    # Faster steps on GPUs, slower compilation; the saved weights do not depend on it.
    config.execution.unroll_layers = False
    # "auto", "xla" or "cudnn".
    config.execution.attention = "auto"

    # Devices along each axis; -1 takes what the others leave.
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.log = ml_collections.ConfigDict()
    config.log.every_steps = 10

    config.eval = ml_collections.ConfigDict()
    # Validation loss in the loop, on the first `num_records` records of the split; 0 = never.
    config.eval.every_steps = 1000
    config.eval.num_records = 512

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 2
    # Checkpoints at multiples of this many steps are kept for good; 0 = none.
    config.checkpoint.keep_every = 0
    return config.lock()


def load_config(path: str, overrides: list[str] = ()) -> ml_collections.ConfigDict:
    """Reads the config file at `path` and applies `--config.KEY=VALUE` overrides.

    Raises:
      UserError: no such file, an error inside it, or a key or a type that does not exist.
    """
    if not Path(path).is_file():
        shipped = sorted(p.name for p in Path("configs").glob("*.py"))
        hint = f"; configs/ has {', '.join(shipped)}" if shipped else ""
        raise UserError(f"--config={path}: no such file{hint}")
    for override in overrides:
        if not re.match(r"--config\.[\w.]+=", override):
            raise UserError(f"{override}: write --config.KEY=VALUE")
    # A flag registry of our own: nothing is defined at import time, nothing can collide.
    values, arguments = flags.FlagValues(), ["train", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        config = values["config"].value
        if not isinstance(config, ml_collections.ConfigDict):
            raise TypeError(f"get_config() returned {config!r}, not a ConfigDict")
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error, SyntaxError) as error:
        text = str(error.args[0] if error.args else error)  # a KeyError shows itself quoted
        where = " ".join([path, *overrides])
        raise UserError(f"{where}: {' '.join(text.split())}") from error
    _validate(config)
    return config


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The architecture of a run config."""
    return ModelConfig.from_dict(config.model.to_dict())


def _validate(config: ml_collections.ConfigDict) -> None:
    model_config(config)
    for key, minimum in (
        ("train.num_steps", 1),
        ("train.global_batch_size", 1),
        ("train.accumulation_steps", 1),
        ("log.every_steps", 1),
        ("eval.every_steps", 0),
        ("eval.num_records", 1),
        ("checkpoint.every_steps", 1),
        ("checkpoint.keep_last", 1),
        ("checkpoint.keep_every", 0),
        ("optimizer.warmup_steps", 0),
        ("optimizer.peak_lr", 0),
        ("optimizer.weight_decay", 0),
        ("optimizer.clip_norm", 0),
    ):
        section, name = key.split(".")
        if not (value := config[section][name]) >= minimum:
            raise UserError(f"config.{key} = {value}: use {minimum} or more")
    if config.train.global_batch_size % config.train.accumulation_steps:
        raise UserError(
            f"config.train.accumulation_steps = {config.train.accumulation_steps} does not divide "
            f"config.train.global_batch_size = {config.train.global_batch_size}"
        )
