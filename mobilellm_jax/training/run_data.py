"""The datasets that a run is trained on: read, checked against the model and each other."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import RecordSource, check_mixture
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.objectives.next_token import LOSS_VERSION, predicts_across_documents
from mobilellm_jax.storage.paths import local_path


class RunData:
    """The datasets that `config.data.path` names.

    Attributes:
      datasets: (dataset, weight) of each.
      seq_len: T, the same in all.
      tokenizer: the one that all were made with.
      loss_version: decides on `across_documents`; a run keeps that which it began with.

    Args:
      config: a run config.
      model: its architecture.

    Raises:
      UserError: datasets that are incomplete or do not go with the model or each other.
    """

    def __init__(self, config: ConfigDict, model: ModelConfig):
        self._config = config
        self.datasets = [
            (Dataset.open(folder), weight) for folder, weight in parse_mixture(config.data.path)
        ]
        for dataset, _ in self.datasets:
            check_dataset(dataset, model)
        _check_distinct([dataset for dataset, _ in self.datasets])
        self.loss_version = LOSS_VERSION
        first, _ = self.datasets[0]
        self.seq_len, self.tokenizer = first.header.sequence_length, first.tokenizer
        check_mixture(
            [RecordSource(dataset, "train") for dataset, _ in self.datasets],
            [weight for _, weight in self.datasets],
            self.seq_len,
        )

    @property
    def first(self) -> Dataset:
        """The dataset that decides on BOS, and whose valid split is evaluated on."""
        return self.datasets[0][0]

    @property
    def across_documents(self) -> bool:
        """Whether the last token of a document is to predict the first of the next one."""
        return predicts_across_documents(self._config.data.mask_documents, self.loss_version)

    @property
    def num_train_tokens(self) -> int:
        """Targets of the train splits together."""
        return sum(dataset.header.splits["train"].num_tokens for dataset, _ in self.datasets)

    @property
    def num_train_records(self) -> int:
        """Records of the train splits together."""
        return sum(dataset.header.splits["train"].num_records for dataset, _ in self.datasets)

    def sample_order(self) -> dict:
        """All that decides which record stands at which position."""
        shards = [
            [shard.sha256 for shard in dataset.header.splits["train"].shards]
            for dataset, _ in self.datasets
        ]
        return {
            "data": _digest(shards),
            "weights": [weight for _, weight in self.datasets],
            "seed": self._config.seed,
            "global_batch_size": self._config.train.global_batch_size,
        }

    def check_continues(self, directory: Path, metadata: Mapping[str, Any]) -> None:
        """Refuses checkpoints whose samples this run would not go on with as they were.

        Args:
          directory: of the checkpoints, for the message.
          metadata: that of the step to go on from.

        Raises:
          UserError: naming what differs.
        """
        if metadata.get("tokenizer_sha256") not in (None, self.tokenizer.sha256):
            raise UserError(
                f"{directory} was trained with another tokenizer than that of "
                f"{self.first.directory}: prepare the data with its tokenizer.model, or use "
                "another workdir"
            )
        masked = metadata.get("mask_documents", self._config.data.mask_documents)
        if "run" in metadata and masked != self._config.data.mask_documents:
            raise UserError(
                f"{directory} was trained with config.data.mask_documents = {masked}: set it so, "
                "or use another workdir"
            )
        saved, now = metadata.get("sample_order"), self.sample_order()
        if saved is not None and saved != now:
            different = [
                f"{key} was {saved.get(key)}, is {now[key]}"
                for key in now
                if saved.get(key) != now[key]
            ]
            raise UserError(
                f"{directory}: the order of samples would change: {'; '.join(different)}. Restore "
                "these settings, or use another workdir"
            )

    def keep_loss(self, step: int, metadata: Mapping[str, Any]) -> str:
        """Takes on the loss of a run that goes on after `step`; words for a person, or ""."""
        if step and metadata.get("mask_documents"):
            self.loss_version = metadata.get("loss_version", 1)
        if not (self.across_documents and self._config.data.mask_documents):
            return ""
        return (
            "this run began when the last token of a document was still trained to predict the "
            "first of the next one; it keeps that loss, a run in a new workdir leaves it out"
        )

    def facts(self) -> dict:
        """All that decides the run, to be compared between its processes."""
        return {
            "config": json.loads(self._config.to_json_best_effort()),
            "dataset": {
                dataset.directory: {
                    "tokenizer": dataset.header.tokenizer_sha256,
                    "splits": {
                        name: _digest([shard.sha256 for shard in split.shards])
                        for name, split in dataset.header.splits.items()
                    },
                }
                for dataset, _ in self.datasets
            },
        }


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def parse_mixture(path: str) -> list[tuple[str, float]]:
    """ "DIR" or "DIR=0.7,DIR=0.3" as (folder, weight) pairs.

    What is an existing folder in its whole length is that folder, even with '=' or ',' in its name.

    Raises:
      UserError: no folder, a weight that is no number, or a name that could be either.
    """
    if not path:
        raise UserError("config.data.path is empty: name a folder made by `mobilellm prepare`")
    parts = [path] if os.path.isdir(path) else path.split(",")
    pairs = [_folder_and_weight(path, part) for part in parts]
    for folder, _ in pairs:
        try:
            local_path(folder)
        except UserError as error:
            raise UserError(f"config.data.path: {error}") from error
    return pairs


def _folder_and_weight(path: str, part: str) -> tuple[str, float]:
    folder, equals, text = part.rpartition("=")
    try:
        weight = float(text) if equals else None
    except ValueError:
        weight = None
    if os.path.isdir(part):
        if weight is not None and os.path.isdir(folder):
            raise UserError(
                f"config.data.path: {part!r} and {folder!r} are folders both; write '{part}=1' for "
                f"the first, or rename it to give the second the weight {text}"
            )
        return part, 1.0
    if not equals and part:
        return part, 1.0
    if not folder or weight is None:
        problem = "names no folder" if not folder else "has no number behind '='"
        raise UserError(f"config.data.path: {part!r} in {path!r} {problem}; write DIR=0.7,DIR=0.3")
    return folder, weight


def _check_distinct(datasets: list[Dataset]) -> None:
    """Raises UserError if two are the same, be it by another path or as a copy."""
    seen = {}
    for dataset in datasets:
        key = tuple(shard.sha256 for shard in dataset.header.splits["train"].shards)
        if key in seen:
            raise UserError(
                f"config.data.path: {seen[key]} and {dataset.directory} hold the same records; "
                "name one of them, with the sum of both weights"
            )
        seen[key] = dataset.directory


def check_dataset(dataset: Dataset, model: ModelConfig) -> None:
    """Raises UserError if `model` cannot be trained on the dataset."""
    folder, header = dataset.directory, dataset.header
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
