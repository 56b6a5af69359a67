"""Assigning documents to the train and valid splits."""

import dataclasses
import hashlib
from collections.abc import Iterator

from mobilellm_jax.data.documents import BLOCK_BYTES, Document
from mobilellm_jax.data.rows import SkippedRows
from mobilellm_jax.data.settings import PrepareSettings
from mobilellm_jax.data.sources import Source


def split_documents(
    sources: list[Source], settings: PrepareSettings, skipped: SkippedRows
) -> Iterator[Document]:
    """The documents of all inputs, each with its split; ``skipped`` gets the bad rows.

    What ``valid_fraction`` holds out is drawn by a hash of a document's content; where a long
    plain-text file is one document, or the only input is, its end is held out instead. The last
    ``num_valid_inputs`` of the sources are held out whole. Rows of a test set are 'test', or with
    ``keep_test`` 'valid'.
    """
    first_valid = len(sources) - settings.num_valid_inputs
    split = "train"
    for number, source in enumerate(sources):
        one_document = source.kind == "text" and settings.document_separator is None
        is_cut = one_document and (len(sources) == 1 or source.size > BLOCK_BYTES)
        for document in source.documents(
            settings.field,
            settings.split_field,
            settings.document_separator,
            settings.valid_fraction if is_cut else 0.0,
            skipped,
        ):
            if document.first and document.last and document.text == "":
                continue
            if number >= first_valid:
                split = "valid"
            elif document.split is not None:
                is_kept = document.split == "test" and settings.keep_test
                split = "valid" if is_kept else document.split
            elif document.first:  # a further block goes where the first one went
                split = "valid" if _draw(document) < settings.valid_fraction else "train"
            yield dataclasses.replace(document, split=split)


def _draw(document: Document) -> float:
    """A number in [0, 1) that depends on the content alone."""
    content = document.text.encode() if document.text else repr(document.token_ids).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
