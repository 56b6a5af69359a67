"""One way to read a model from wherever it is: a workdir, a checkpoint or a Hugging Face folder."""

import dataclasses
from pathlib import Path

import jax

from mobilellm_jax.checkpoints.files import load_checkpoint
from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import read_hf
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.tokenizers.files import load_tokenizer
from mobilellm_jax.tokenizers.tokenizer import check_vocabulary


def load(path: str | Path) -> tuple[ModelConfig, dict]:
    """Reads a model's config and its fp32 parameters.

    Args:
      path: a run's workdir (its newest valid checkpoint is taken), the folder of one step, or a
        Hugging Face folder.

    Returns:
      The config and the parameters, a nested dict for `MobileLLM(config).apply`.

    Raises:
      UserError: nothing to read there, or something damaged.
    """
    model = load_model(path)
    return model.config, model.params


def load_model(path: str | Path) -> ModelBundle:
    """Reads all that was saved of a model but the optimizer's state; arguments as for `load`."""
    path = local_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    of_run = ("checkpoints", "manifest.json", "metrics.jsonl")
    if any((path / name).exists() for name in of_run) or not (path / "config.json").exists():
        return load_checkpoint(path)
    model = read_hf(path)
    return dataclasses.replace(model, params=jax.device_put(model.params))


def load_text_model(path: str | Path, tokenizer: str | Path | None = None) -> ModelBundle:
    """Reads a model together with its tokenizer.

    Args:
      path: as for `load`.
      tokenizer: file of a tokenizer, for a folder that has none.

    Raises:
      UserError: as for `load`; or there is no tokenizer, or one that is not the model's.
    """
    own = None if tokenizer is None else load_tokenizer(tokenizer)  # before what takes long
    model = load_model(path)
    theirs = model.tokenizer
    if own is not None and type(own) is type(theirs) and own.sha256 != theirs.sha256:
        raise UserError(
            f"{tokenizer}: is another tokenizer than that of {path}, whose ids it would misread; "
            "leave --tokenizer out"
        )
    if own is not None:
        model = dataclasses.replace(model, tokenizer=own)
    if model.tokenizer is None:
        raise UserError(f"{path} has no tokenizer.model: name one with --tokenizer FILE")
    check_vocabulary(model.tokenizer, model.config.vocab_size, str(tokenizer or path))
    return model
