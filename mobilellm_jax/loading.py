"""One way to read a model, wherever it lies: a workdir, a checkpoint or a Hugging Face folder."""

import dataclasses
from pathlib import Path

import jax

from mobilellm_jax.conversion.huggingface import load_hf, load_hf_tokenizer
from mobilellm_jax.data.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training import checkpoints


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
    path = _existing(path)
    if _is_huggingface(path):
        config, params = load_hf(path)
        return config, jax.device_put(params)
    return checkpoints.load_params(path)


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
    path = _existing(path)
    config, params = load(path)
    if tokenizer is not None:
        read = Tokenizer.load(tokenizer)
    else:
        is_hf = _is_huggingface(path)
        model_bytes = load_hf_tokenizer(path) if is_hf else checkpoints.load_tokenizer(path)
        if model_bytes is None:
            raise UserError(f"{path} has no tokenizer.model: name one with --tokenizer FILE")
        read = Tokenizer(model_bytes, f"{path}: tokenizer.model")
    if read.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer or path}: the tokenizer has {read.vocab_size} pieces, the model knows "
            f"{config.vocab_size}: use the tokenizer that it was trained with"
        )
    metadata = {} if _is_huggingface(path) else checkpoints.load_metadata(path)
    data = metadata.get("run", {}).get("data", {})
    return TextModel(
        config,
        params,
        read,
        bos=metadata.get("bos", True),
        mask_documents=data.get("mask_documents", False),
    )


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    return path


def _is_huggingface(path: Path) -> bool:
    has_steps = (path / "checkpoints").is_dir() or (path / "manifest.json").exists()
    return (path / "config.json").exists() and not has_steps
