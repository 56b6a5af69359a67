"""One way to read a model, wherever it lies: a workdir, a checkpoint or a Hugging Face folder."""

import dataclasses
from pathlib import Path

import jax

from mobilellm_jax.conversion.huggingface.folder import (
    load_hf,
    load_hf_metadata,
    load_hf_tokenizer,
)
from mobilellm_jax.data.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.checkpoint_files import SavedModel, load_checkpoint


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
    saved = load_saved(path)
    return saved.config, saved.params


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model with what it takes to read and write text with it.

    Attributes:
      bos: whether documents began with BOS in training.
      mask_documents: whether attention was confined to one document in training.
    """

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    bos: bool
    mask_documents: bool


def load_text_model(path: str | Path, tokenizer: str | Path | None = None) -> TextModel:
    """Reads a model together with its tokenizer.

    Args:
      path: as for `load`.
      tokenizer: file of a SentencePiece model, for a folder that has none.

    Raises:
      UserError: as for `load`; or there is no tokenizer, or one that does not fit the model.
    """
    saved = load_saved(path)
    if tokenizer is not None:
        read = Tokenizer.load(tokenizer)
    elif saved.tokenizer_model is not None:
        read = Tokenizer(saved.tokenizer_model, f"{path}: tokenizer.model")
    else:
        raise UserError(f"{path} has no tokenizer.model: name one with --tokenizer FILE")
    if read.vocab_size > saved.config.vocab_size:
        raise UserError(
            f"{tokenizer or path}: the tokenizer has {read.vocab_size} pieces, the model knows "
            f"{saved.config.vocab_size}: use the tokenizer that it was trained with"
        )
    return TextModel(
        saved.config,
        saved.params,
        read,
        bos=saved.bos,
        mask_documents=bool(saved.metadata.get("mask_documents", False)),
    )


def load_saved(path: str | Path) -> SavedModel:
    """Reads all that was saved of a model but the optimizer's state; arguments as for `load`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    has_steps = (path / "checkpoints").is_dir() or (path / "manifest.json").exists()
    if has_steps or not (path / "config.json").exists():
        return load_checkpoint(path)
    config, params = load_hf(path)
    metadata, tokenizer_model = load_hf_metadata(path), load_hf_tokenizer(path)
    return SavedModel(config, jax.device_put(params), metadata, tokenizer_model)
