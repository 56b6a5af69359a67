"""Which document goes to which split, and the settings that decide what a dataset holds."""

import dataclasses
import hashlib
from collections.abc import Iterator

from mobilellm_jax.data.sources import BLOCK_BYTES, Document, Source
from mobilellm_jax.data.tokenizer import MAX_SAMPLE_BYTES, Tokenizer
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the content of a dataset besides the bytes of its inputs.

    Raises UserError for settings that cannot be.
    """

    sequence_length: int
    tokenizer_sha256: str | None
    vocab_size: int | None
    field: str
    split_field: str | None
    valid_fraction: float
    num_valid_inputs: int
    bos: bool
    eos: bool
    records_per_shard: int | None

    def __post_init__(self):
        if (self.tokenizer_sha256 is None) == (self.vocab_size is None):
            raise UserError("pass either --tokenizer FILE or --vocab_size N, which trains one")
        if self.sequence_length < 2:
            raise UserError(f"--sequence_length {self.sequence_length} is too short; 2048 is usual")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"--valid_fraction {self.valid_fraction} must be at least 0 and less than 1"
            )
        ways = (self.num_valid_inputs > 0, self.split_field is not None, self.valid_fraction > 0)
        if sum(ways) > 1:
            raise UserError("use only one of --valid_input, --split_field and --valid_fraction")


def batches_of(
    sources: list[Source], settings: Settings, tokenizer: Tokenizer
) -> Iterator[list[Document]]:
    """Documents, each with its split, in batches of about BLOCK_BYTES of text."""
    batch, size = [], 0
    for document in _documents(sources, settings):
        if document.token_ids is not None:
            _check_line(document, settings.sequence_length, tokenizer.vocab_size)
        batch.append(document)
        size += len(document.text) if document.text else 4 * len(document.token_ids or ())
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents(sources: list[Source], settings: Settings) -> Iterator[Document]:
    first_valid = len(sources) - settings.num_valid_inputs
    fraction, split = settings.valid_fraction, "train"
    for number, source in enumerate(sources):
        whole = source.kind != "text" or (len(sources) > 1 and source.size <= BLOCK_BYTES)
        tail = 0.0 if whole else fraction
        for document in source.documents(settings.field, settings.split_field, tail):
            if document.first and document.last and document.text == "":
                continue
            if number >= first_valid:
                split = "valid"
            elif document.split is not None:
                split = document.split
            elif document.first:  # a further block goes where the first one went
                split = "valid" if _draw(document) < fraction else "train"
            yield dataclasses.replace(document, split=split)


def _draw(document: Document) -> float:
    """A number in [0, 1) that depends on the content alone."""
    content = document.text.encode() if document.text else repr(document.token_ids).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64


def _check_line(document: Document, sequence_length: int, vocab_size: int) -> None:
    ids = document.token_ids
    if len(ids) not in (sequence_length, sequence_length + 1):
        raise UserError(
            f"{document.where}: {len(ids)} token_ids, but --sequence_length is {sequence_length}; "
            f"pass --sequence_length {len(ids)}"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        position = next(i for i, value in enumerate(ids) if not 0 <= value < vocab_size)
        raise UserError(
            f"{document.where}: token_ids[{position}] is {ids[position]}, outside of the "
            f"tokenizer's [0, {vocab_size}); use the tokenizer that made this file"
        )


def training_sample(sources: list[Source], field: str, split_field: str | None) -> Iterator[str]:
    """Training text for the tokenizer: the head of every input, in proportion to its size."""
    total = sum(source.size or 0 for source in sources)
    for source in sources:
        share = 1 / len(sources) if source.size is None else source.size / total
        taken = 0
        for document in source.documents(field, split_field):
            if document.text and document.split != "valid":
                taken += len(document.text)
                yield document.text
            if taken >= share * MAX_SAMPLE_BYTES:
                break
