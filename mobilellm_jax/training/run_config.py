"""Every key of a training run with its default, and how a config file and overrides are read.

A config file is a Python file with a function `get_config()` that changes what it wants of
`default_config()`. Keys that are not in here cannot be set, from a file or from the command line.
"""

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import ml_collections
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.storage.paths import local_path


def default_config(preset: str = "125m") -> ml_collections.ConfigDict:
    """The run that the paper and the official script describe, for the named architecture."""
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = ml_collections.ConfigDict()
    # Of parameters and of the order of the data.
    config.seed = 0
    # Architecture: every field of `ModelConfig`. They do not follow each other: whoever changes
    # embed_dim changes num_heads and ffn_dim too (ffn_dim = 0 takes the rule of the paper).
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
    # What the backward pass computes again: "dots" (all but products and attention), "attention"
    # (all but attention), "full", or "none", which pays with unrolled layers only.
    config.execution.remat = "dots"
    # Faster steps on GPUs, slower compilation; the saved weights do not depend on it.
    config.execution.unroll_layers = False
    # "auto", "xla", "cudnn" (NVIDIA) or "splash" (TPU).
    config.execution.attention = "auto"

    # Devices along each axis; -1 takes what the others leave. The batch is split over data x fsdp.
    config.mesh = ml_collections.ConfigDict()
    # With -1 for both, fsdp takes what leaves each a multiple of 8 of embed_dim, data the rest.
    config.mesh.data = -1
    # Splits the master weights and the optimizer state too; 1 is plain data parallelism.
    config.mesh.fsdp = -1
    # Splits heads, ffn and vocabulary.
    config.mesh.tensor = 1
    # When a step brings the weights that fsdp splits together: "step" (all of them, once, in the
    # compute dtype: ZeRO) or "layer" (each block's as it is visited: FSDP; less memory).
    config.mesh.gather = "step"

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

    Args:
      path: the file; "FILE:PLATFORM" has its `get_config` called with the name of a platform.

    Raises:
      UserError: no such file, an error inside it, or a key or a type that does not exist.
    """
    file = path.partition(":")[0]
    if not local_path(file).is_file():
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
    except Exception as error:  # the file is a program: it may raise anything
        text = str(error.args[0] if error.args else error)  # a KeyError shows itself quoted
        where = " ".join([path, *overrides])
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(text.split())}") from error
    _check_keys(path, config)
    _validate(config)
    return config


def on_platform(
    config: ml_collections.ConfigDict, settings: Mapping[str, Mapping], platform: str
) -> ml_collections.ConfigDict:
    """The config with what its file recommends for a platform: `--config=FILE:PLATFORM`.

    Args:
      settings: platform -> {"SECTION.KEY": value}.
      platform: "" leaves the config as it is.

    Raises:
      UserError: the file knows no such platform.
    """
    if platform and platform not in settings:
        raise UserError(f"no platform {platform!r}: the file has {', '.join(settings)}")
    for key, value in settings.get(platform, {}).items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return config


def _check_keys(path: str, config: ml_collections.ConfigDict) -> None:
    """A file may unlock the config; it still may not add or lose keys."""
    known, found = (flatten_dict(c.to_dict(), sep=".").keys() for c in (default_config(), config))
    for key in sorted(found - known):
        near = difflib.get_close_matches(key, known, n=1)
        raise UserError(
            f"{path}: unknown key config.{key}" + (f"; did you mean config.{near[0]}?" * bool(near))
        )
    for key in sorted(known - found):
        raise UserError(f"{path}: config.{key} is missing; start from default_config()")


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The architecture of a run config."""
    return ModelConfig.from_dict(config.model.to_dict())


# Key -> smallest and largest value that make sense.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "train.num_steps": (1, 2**31 - 1),
    "train.global_batch_size": (1, math.inf),
    "train.accumulation_steps": (1, math.inf),
    "log.every_steps": (1, math.inf),
    "eval.every_steps": (0, math.inf),
    "eval.num_records": (1, math.inf),
    "checkpoint.every_steps": (1, math.inf),
    "checkpoint.keep_last": (1, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.peak_lr": (0, 1e30),
    "optimizer.final_lr_fraction": (0, 1),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.weight_decay": (0, 1e30),
    "optimizer.beta1": (0, 1 - 1e-9),
    "optimizer.beta2": (0, 1 - 1e-9),
    "optimizer.epsilon": (1e-30, 1),
    "optimizer.clip_norm": (1e-30, 1e30),
}


def _validate(config: ml_collections.ConfigDict) -> None:
    model_config(config)
    for key, (smallest, largest) in _RANGES.items():
        *section, name = key.split(".")
        value = (config[section[0]] if section else config)[name]
        if not smallest <= value <= largest:
            at_most = f" and at most {largest:g}" if largest < math.inf else ""
            raise UserError(f"config.{key} = {value}: use at least {smallest:g}{at_most}")
    if config.mesh.gather not in ("step", "layer"):
        raise UserError(f"config.mesh.gather = {config.mesh.gather!r}: use 'step' or 'layer'")
    if config.train.global_batch_size % config.train.accumulation_steps:
        raise UserError(
            f"config.train.accumulation_steps = {config.train.accumulation_steps} does not divide "
            f"config.train.global_batch_size = {config.train.global_batch_size}"
        )
