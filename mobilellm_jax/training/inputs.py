"""The datasets that a run is trained on: read, checked against the model and each other."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax.data.loader import check_mixture, open_split
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.training import run_config
from mobilellm_jax.training.checks import check_dataset, parse_mixture


class Inputs:
    """What `config.data.path` names.

    Attributes:
      datasets: (folder, weight) of each.
      headers: of each.
      seq_len: T, the same in all.
      tokenizer_model: the SentencePiece model that all were made with.

    Raises:
      UserError: datasets that are incomplete or do not go with the model or each other.
    """

    def __init__(self, config: ConfigDict):
        self._config = config
        self.datasets = parse_mixture(config.data.path)
        self.headers = [DatasetHeader.load(folder) for folder, _ in self.datasets]
        model = run_config.model_config(config)
        for (folder, _), header in zip(self.datasets, self.headers, strict=True):
            check_dataset(folder, header, model)
        self.seq_len = self.headers[0].sequence_length
        check_mixture(
            [open_split(folder, "train") for folder, _ in self.datasets],
            [weight for _, weight in self.datasets],
            self.seq_len,
        )
        self.tokenizer_model = self.headers[0].tokenizer(self.datasets[0][0]).model_bytes

    def sample_order(self) -> dict:
        """All that decides which record stands at which position."""
        shards = [
            [shard.sha256 for shard in header.splits["train"].shards] for header in self.headers
        ]
        return {
            "data": _digest(shards),
            "weights": [weight for _, weight in self.datasets],
            "seed": self._config.seed,
            "global_batch_size": self._config.train.global_batch_size,
        }

    def check_continues(
        self, directory: Path, metadata: Mapping[str, Any], tokenizer_model: bytes | None
    ) -> None:
        """Refuses checkpoints whose order of samples this run would not go on with.

        Args:
          directory: of the checkpoints, for the message.
          metadata: that of the step to go on from.
          tokenizer_model: the one saved with it, if one was.

        Raises:
          UserError: naming what differs.
        """
        if tokenizer_model is not None and tokenizer_model != self.tokenizer_model:
            raise UserError(
                f"{directory} was trained with another tokenizer than that of "
                f"{self.datasets[0][0]}: prepare the data with its tokenizer.model, or use "
                "another workdir"
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

    def facts(self) -> dict:
        """What decides the run, to be compared between its processes."""
        return {
            "config": json.loads(self._config.to_json_best_effort()),
            "dataset": {
                folder: {
                    "tokenizer": header.tokenizer_sha256,
                    "splits": {
                        name: _digest([shard.sha256 for shard in split.shards])
                        for name, split in header.splits.items()
                    },
                }
                for (folder, _), header in zip(self.datasets, self.headers, strict=True)
            },
        }


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
