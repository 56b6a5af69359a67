"""`ModelBundle`: a model with all that it takes to use it, read once and handed on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

_KNOWN = (
    "bos",
    "chat_template",
    "stop_ids",
    "step",
    "mask_documents",
    "loss_version",
    "sequence_length",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a text is put to the model.

    Attributes:
      bos: whether documents began with BOS in training; None where that is not known.
      chat_template: Jinja text that makes a prompt of a conversation.
      stop_ids: the ids that end an answer; None is the tokenizer's EOS.
    """

    bos: bool | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] | None = None

    @property
    def begins_with_bos(self) -> bool:
        """Whether to put BOS in front of a text; true where nothing is known."""
        return self.bos is not False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts about the training, as far as they are known.

    Attributes:
      step: updates done.
      mask_documents: whether attention was confined to one document.
      loss_version: `objectives.next_token.LOSS_VERSION` of the training.
      sequence_length: tokens of a training sequence.
      other: further JSON values that came with the model and go along with it.
    """

    step: int | None = None
    mask_documents: bool | None = None
    loss_version: int | None = None
    sequence_length: int | None = None
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A model with all that it takes to use it.

    Attributes:
      config: of the model.
      params: its parameters, a nested dict for `MobileLLM(config).apply`.
      tokenizer: None where it came without one.
      prompt: how a text is put to it.
      provenance: what is known of its training.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    prompt: PromptFormat = PromptFormat()
    provenance: Provenance = Provenance()

    @property
    def bos_id(self) -> int | None:
        """The id in front of each text; None if there is to be none."""
        if self.tokenizer is None or not self.prompt.begins_with_bos:
            return None
        return self.tokenizer.bos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        if self.prompt.stop_ids is not None:
            return self.prompt.stop_ids
        if self.tokenizer is None or self.tokenizer.eos_id is None:
            return ()
        return (self.tokenizer.eos_id,)

    def to_record(self) -> dict[str, Any]:
        """Prompt format and provenance as JSON values, without what is not known.

        Goes into the metadata of checkpoints and exports; `read_record` is the inverse.
        """
        known = dataclasses.asdict(self.prompt) | dataclasses.asdict(self.provenance)
        other = known.pop("other")
        if self.prompt.stop_ids is not None:
            known["stop_ids"] = list(self.prompt.stop_ids)
        return other | {key: value for key, value in known.items() if value is not None}


def check_stop_ids(ids: Any, vocab_size: int, where: str) -> None:
    """Raises UserError for anything but a list of ids of the vocabulary, or None.

    Args:
      where: file and key, for the message.
    """
    if ids is None:
        return
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)):
        raise UserError(
            f"{where} = {ids!r:.120}: expected ids of the vocabulary, 0 to {vocab_size - 1}; "
            "correct it, or remove it to stop at the tokenizer's EOS"
        )


def read_record(
    record: Mapping[str, Any], *, keep_other: bool = False
) -> tuple[PromptFormat, Provenance]:
    """Prompt format and provenance from metadata of any origin.

    Args:
      record: JSON values; "stop_ids" has passed `check_stop_ids`.
      keep_other: whether keys that mean nothing here become `Provenance.other`.
    """

    def value(key: str, kind: type) -> Any:
        found = record.get(key)
        return found if type(found) is kind else None

    ids = value("stop_ids", list)
    return (
        PromptFormat(
            bos=value("bos", bool),
            chat_template=value("chat_template", str),
            stop_ids=None if ids is None else tuple(ids),
        ),
        Provenance(
            step=value("step", int),
            mask_documents=value("mask_documents", bool),
            loss_version=value("loss_version", int),
            sequence_length=value("sequence_length", int),
            other={k: v for k, v in record.items() if k not in _KNOWN} if keep_other else {},
        ),
    )
