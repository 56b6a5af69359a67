"""Every key of a training run with its default, and how a config file and overrides are read.

A config file is a Python file with a function `get_config()` that changes what it wants of
`default_config()`. Keys that are not in here cannot be set, from a file or from the command line.
"""

import contextlib
import difflib
import inspect
import linecache
import operator
import re
import runpy
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.attention_kernels import ATTENTION_KINDS
from mobilellm_jax.model.config import FFN_KINDS, SHARED_KV_KINDS, SHARING_ORDERS, ModelConfig
from mobilellm_jax.model.execution import DTYPES, REMAT_POLICIES
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.training.optimizer import SCHEDULES

_LONGEST_REASON = 400


def default_config(preset: str = "125m") -> ml_collections.ConfigDict:
    """The run that the paper and the official script describe, for the named architecture."""
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = ml_collections.ConfigDict()
    # Of parameters and of the order of the data.
    config.seed = 0
    # Architecture: every field of `ModelConfig`. head_dim 0 is embed_dim / num_heads. Nothing else
    # follows: whoever changes embed_dim changes ffn_dim too (0 takes the rule of the paper).
    config.model = ml_collections.ConfigDict(PRESETS[preset].to_dict() | {"head_dim": 0})

    config.data = ml_collections.ConfigDict()
    # Folder made by `mobilellm prepare`, or a mixture "DIR=0.7,DIR=0.3" (shares of the samples).
    config.data.path = ""
    # Whether a token attends only to its own document, or to all that precedes it in the record.
    # If so, the last token of a document is not trained to predict the first of the next one.
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
      overrides: of a key that is given twice, the last one counts, as for all flags.

    Raises:
      UserError: no such file, an error inside it, or a key or a value that cannot be.
    """
    local_path(path)
    file, colon, platform = path.partition(":")
    if not Path(file).is_file():
        shipped = sorted(p.name for p in Path("configs").glob("*.py"))
        hint = f"; configs/ has {', '.join(shipped)}" if shipped else ""
        raise UserError(f"--config={path}: no such file{hint}")
    values = dict(map(_parse_override, overrides))
    config = _run_file(file, (platform,) if colon else ())
    _check_keys(file, config)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    check_config(config)
    config.model.update(model_config(config).to_dict())  # what 0 stands for
    return config.lock()


def _run_file(file: str, arguments: tuple[str, ...]) -> ml_collections.ConfigDict:
    """Returns what `get_config(*arguments)` of the file does."""
    get_config = _in_file(file, runpy.run_path, file).get("get_config")
    if not callable(get_config):
        raise UserError(f"{file}: has no function get_config(); see configs/ for examples")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        fix = f"leave :{arguments[0]} out" if arguments else "give the argument as FILE:ARGUMENT"
        raise UserError(f"{file}: get_config(): {error}; {fix}, or change the file") from error
    config = _in_file(file, get_config, *arguments)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{file}: get_config() returned {config!r:.100}, not a config; end it with `return "
            "config`"
        )
    return config


def _in_file(file: str, function: Callable, *arguments: str) -> Any:
    """Calls code of a config file; whatever it raises becomes a UserError with file and line."""
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file is a program: even SystemExit(0) may be in it
        calls = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in calls if frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        reason = textwrap.shorten(_reason(error), _LONGEST_REASON)
        if not lines:
            raise UserError(f"{file}: {reason}") from error
        source = linecache.getline(file, lines[-1]).strip()
        raise UserError(f"{file}, line {lines[-1]}: {reason}\n    {source:.200}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    text = str(inner.args[0] if isinstance(inner, KeyError | SyntaxError) and inner.args else inner)
    if match := re.match(r'Key "(.+)" does not exist and cannot be added', text):
        return f"there is no key {match[1]}{_near_keys(match[1], 'config.')}"
    return f"{type(error).__name__}: {text}"


def _parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of `--config.KEY=VALUE`, of the type that the key's default has."""
    match = re.fullmatch(r"--config\.([\w.]+)=(.*)", override, re.DOTALL)
    if match is None:
        raise UserError(f"{override}: write --config.KEY=VALUE")
    (key, text), known = match.groups(), leaves(default_config())
    if key in known:
        kind = type(known[key])
        value = _PARSERS[kind](text)
        if value is None:
            raise UserError(f"{override}: {text!r} is not {_KINDS[kind]}")
        return key, value
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        raise UserError(f"{override}: config.{key} is a section; its keys are {', '.join(inside)}")
    raise UserError(f"{override}: there is no key config.{key}{_near_keys(key)}")


def _parse_bool(text: str) -> bool | None:
    return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(
        text.lower()
    )


def _parse_int(text: str) -> int | None:
    """A whole number in any notation: 1000, 1_000, 1e3."""
    with contextlib.suppress(ValueError):
        return int(text)
    number = _parse_float(text)
    return int(number) if number is not None and number.is_integer() else None


def _parse_float(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


_PARSERS = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: str}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def leaves(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """ "SECTION.KEY" -> value."""
    return {
        ".".join(map(str, path)): value for path, value in flatten_dict(config.to_dict()).items()
    }


def _near_keys(key: str, prefix: str = "--config.") -> str:
    """A hint for an unknown key: the keys whose name is, or is most like, the one in it."""
    known = list(leaves(default_config()))
    section, _, name = key.rpartition(".")
    names = {k.rpartition(".")[2] for k in known}
    near = difflib.get_close_matches(name, names, n=1)
    found = [k for k in known if k.rpartition(".")[2] in near]
    found = [k for k in found if k.startswith(f"{section}.")] or found
    if found:
        return f"; did you mean {' or '.join(prefix + k for k in found)}?"
    if inside := [k for k in known if k.startswith(f"{section}.")]:
        return f"; config.{section} has {', '.join(inside)}"
    return "; all keys are in mobilellm_jax/training/run_config.py"


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


def _check_keys(file: str, config: ml_collections.ConfigDict) -> None:
    """A file may unlock the config; it still may not add or lose keys."""
    known, found = leaves(default_config()), _in_file(file, leaves, config)
    for key in found:
        if key not in known:
            raise UserError(f"{file}: there is no key config.{key}{_near_keys(key, 'config.')}")
    for key in known:
        if key not in found:
            raise UserError(f"{file}: config.{key} is missing; start from default_config()")


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The architecture of a run config."""
    return ModelConfig.from_dict(config.model.to_dict())


_COMPARISONS = {
    "at least": operator.ge,
    "more than": operator.gt,
    "at most": operator.le,
    "less than": operator.lt,
}
_NEVER = 10**18  # a number of steps that is meant as "never"
# Key -> the numbers that make sense. What a run counts fits into 32 bits; sizes end where no model
# of this kind has been.
_LIMITS = {
    "seed": {"at least": 0, "less than": 2**31},
    "model.num_layers": {"at least": 1, "at most": 1000},
    "model.num_heads": {"at least": 1, "at most": 4096},
    "model.num_kv_heads": {"at least": 1, "at most": 4096},
    "model.embed_dim": {"at least": 1, "at most": 2**17},
    "model.ffn_dim": {"at least": 0, "at most": 2**20},
    "model.head_dim": {"at least": 0, "at most": 4096},
    "model.vocab_size": {"at least": 1, "at most": 2**24},
    "model.max_seq_len": {"at least": 1, "at most": 2**24},
    "model.num_repeats": {"at least": 1, "at most": 100},
    "model.rope_theta": {"at least": 1, "at most": 1e30},
    "model.norm_eps": {"more than": 0, "at most": 1},
    "model.init_std": {"more than": 0, "at most": 100},
    "train.num_steps": {"at least": 1, "less than": 2**31},
    "train.global_batch_size": {"at least": 1, "at most": 2**20},
    "train.accumulation_steps": {"at least": 1, "at most": 2**20},
    "log.every_steps": {"at least": 1, "at most": _NEVER},
    "eval.every_steps": {"at least": 0, "at most": _NEVER},
    "eval.num_records": {"at least": 1, "at most": _NEVER},
    "checkpoint.every_steps": {"at least": 1, "at most": _NEVER},
    "checkpoint.keep_last": {"at least": 1, "at most": _NEVER},
    "checkpoint.keep_every": {"at least": 0, "at most": _NEVER},
    "optimizer.warmup_steps": {"at least": 0, "less than": 2**31},
    "optimizer.peak_lr": {"more than": 0, "at most": 1e30},
    "optimizer.final_lr_fraction": {"at least": 0, "at most": 1},
    "optimizer.decay_fraction": {"at least": 0, "at most": 1},
    "optimizer.weight_decay": {"at least": 0, "at most": 1e30},
    "optimizer.beta1": {"at least": 0, "less than": 1},
    "optimizer.beta2": {"at least": 0, "less than": 1},
    "optimizer.epsilon": {"at least": 1e-30, "at most": 1},
    "optimizer.clip_norm": {"more than": 0, "at most": 1e30},
    "mesh.data": {"at least": -1, "at most": 2**20},
    "mesh.fsdp": {"at least": -1, "at most": 2**20},
    "mesh.tensor": {"at least": -1, "at most": 2**20},
}
_CHOICES = {
    "model.ffn": FFN_KINDS,
    "model.sharing": SHARING_ORDERS,
    "model.shared_kv": SHARED_KV_KINDS,
    "optimizer.schedule": SCHEDULES,
    "execution.dtype": ("auto", *DTYPES),
    "execution.remat": tuple(REMAT_POLICIES),
    "execution.attention": ("auto", *ATTENTION_KINDS),
    "mesh.gather": ("step", "layer"),
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses values that no run can have, whatever the machine and the data.

    Raises:
      UserError: naming the key, its value and what to use.
    """
    _check_keys("the config", config)
    values, defaults = leaves(config), leaves(default_config())
    for key, value in values.items():
        kind = type(defaults[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(
                f"config.{key} = {value!r:.100} is of type {type(value).__name__}: use "
                f"{_KINDS[kind]}"
            )
    for key, limits in _LIMITS.items():
        value = values[key]
        if not all(_COMPARISONS[name](value, limit) for name, limit in limits.items()):
            allowed = " and ".join(f"{name} {limit:.10g}" for name, limit in limits.items())
            raise UserError(f"config.{key} = {value}: use {allowed}")
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config.{key} = {values[key]!r:.100}: use one of {', '.join(choices)}")
    model_config(config)
    if config.train.global_batch_size % config.train.accumulation_steps:
        raise UserError(
            f"config.train.accumulation_steps = {config.train.accumulation_steps} does not divide "
            f"config.train.global_batch_size = {config.train.global_batch_size}"
        )
