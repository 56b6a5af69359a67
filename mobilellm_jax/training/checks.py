"""Whether the parts of a run go together, before the first step is compiled."""

import jax
from ml_collections import ConfigDict

from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig


def parse_mixture(path: str) -> list[tuple[str, float]]:
    """ "DIR" or "DIR=0.7,DIR=0.3" as (folder, weight) pairs."""
    if not path:
        raise UserError("config.data.path is empty: name a folder made by `mobilellm prepare`")
    pairs = []
    for part in path.split(","):
        folder, _, weight = part.partition("=")
        try:
            pairs.append((folder, float(weight or 1)))
        except ValueError as error:
            raise UserError(
                f"config.data.path: {part!r} has no number behind '='; write DIR=0.7,DIR=0.3"
            ) from error
    return pairs


def check_dataset(folder: str, header: DatasetHeader, model: ModelConfig) -> None:
    """Raises UserError if `model` cannot be trained on the dataset in `folder`."""
    if "train" not in header.splits:
        raise UserError(
            f"{folder}: has no train split, only {', '.join(header.splits)}; prepare it with "
            "--input FILES for training"
        )
    if header.vocab_size != model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {header.vocab_size} pieces, but config.model.vocab_size "
            f"= {model.vocab_size}; set --config.model.vocab_size={header.vocab_size}, or prepare "
            "the data with the model's tokenizer"
        )
    if header.sequence_length > model.max_seq_len:
        raise UserError(
            f"{folder}: sequences of {header.sequence_length} tokens, but config.model.max_seq_len "
            f"= {model.max_seq_len}; set --config.model.max_seq_len={header.sequence_length}, or "
            f"prepare the data with --sequence_length {model.max_seq_len}"
        )


def check_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the batch does not split over the mesh and the accumulation steps."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulation_steps
    if config.global_batch_size % parts:
        nearest = max(1, round(config.global_batch_size / parts)) * parts
        raise UserError(
            f"config.train.global_batch_size = {config.global_batch_size} does not split into "
            f"{mesh.shape['data']} (data) x {mesh.shape['fsdp']} (fsdp) x "
            f"{config.accumulation_steps} (accumulation) parts: use {nearest}"
        )
