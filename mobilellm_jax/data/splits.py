"""Assigning documents to the train and valid splits."""

import dataclasses
import hashlib
from collections.abc import Iterator

from mobilellm_jax.data.documents import BLOCK_BYTES, Document
from mobilellm_jax.data.sources import Source


def split_documents(
    sources: list[Source],
    *,
    field: str,
    split_field: str | None,
    valid_fraction: float,
    num_valid_inputs: int,
) -> Iterator[Document]:
    """The documents of all inputs, each with its split.

    Args:
      field, split_field: as for `Source.documents`.
      valid_fraction: share of the documents to hold out, drawn by a hash of their content; of a
        long plain-text file, or of one alone, its end instead.
      num_valid_inputs: how many of the sources, the last ones, are held out whole.
    """
    first_valid = len(sources) - num_valid_inputs
    split = "train"
    for number, source in enumerate(sources):
        whole = source.kind != "text" or (len(sources) > 1 and source.size <= BLOCK_BYTES)
        tail = 0.0 if whole else valid_fraction
        for document in source.documents(field, split_field, tail):
            if document.first and document.last and document.text == "":
                continue
            if number >= first_valid:
                split = "valid"
            elif document.split is not None:
                split = document.split
            elif document.first:  # a further block goes where the first one went
                split = "valid" if _draw(document) < valid_fraction else "train"
            yield dataclasses.replace(document, split=split)


def _draw(document: Document) -> float:
    """A number in [0, 1) that depends on the content alone."""
    content = document.text.encode() if document.text else repr(document.token_ids).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
