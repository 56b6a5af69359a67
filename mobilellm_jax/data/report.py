"""The report of `prepare` on its inputs: a table, and warnings of likely mistakes."""

import logging
import re

from mobilellm_jax.data.documents import Document
from mobilellm_jax.data.rows import SkippedRows
from mobilellm_jax.data.settings import PrepareSettings
from mobilellm_jax.data.sources import Source
from mobilellm_jax.tables import table

_MAX_ROWS = 20
# Strings that datasets and tokenizers put between documents.
_SEPARATORS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "<|eot_id|>", "<|im_end|>"),
    *("<eos>", "<EOS>", "<EOD>", "<s>", "</s>", "<｜end▁of▁sentence｜>"),
)
_HELD_OUT = re.compile(
    r"(?<![a-z])(tests?|valid|validation|val|evals?|evaluation|dev|held[ ._-]?out)(?![a-z])"
)


def warn_of_held_out(sources: list[Source]) -> None:
    """Warns of files for training that a folder or pattern stood for and that seem to be tests."""
    found = [source.path for source in sources if _HELD_OUT.search(source.found.lower())]
    if found:
        logging.warning(
            "goes into training, though the name says that it is for tests: %s; hold it out by "
            "--valid_input, or name the files for training one by one",
            ", ".join(found[:5]) + (f" and {len(found) - 5:,} more" if len(found) > 5 else ""),
        )


class Report:
    """Counts the documents and tokens of each input as they pass by.

    Attributes:
      skipped: the bad rows.
    """

    def __init__(self, sources: list[Source], skip_bad: int):
        self.skipped = SkippedRows(skip_bad)
        self._sources = sources
        # Path -> split -> documents, tokens.
        self._counts = {s.path: {"train": [0, 0], "valid": [0, 0]} for s in sources}
        self._num_test_rows = 0
        self._found: dict[str, tuple[int, str]] = {}  # separator -> how often, and where first

    def add(self, document: Document, num_tokens: int) -> None:
        """Counts a document, or a block of one, that goes into the dataset."""
        counts = self._counts[document.source][document.split]
        counts[0] += document.first
        counts[1] += num_tokens
        if document.text is None or "<" not in document.text:
            return
        for mark in _SEPARATORS:
            if number := document.text.count(mark):
                before, where = self._found.get(mark, (0, document.where))
                self._found[mark] = before + number, where

    def leave_out(self, document: Document) -> None:
        """Counts a row of a test set, or a block of one, that does not go into the dataset."""
        self._num_test_rows += document.first

    def table(self) -> str:
        """The inputs with their documents and tokens, of many the ones with the most tokens."""
        rows = [
            (source.path, [*counts["train"], *counts["valid"]])
            for source in self._sources
            for counts in [self._counts[source.path]]
        ]
        total = _sum(rows)
        if len(rows) > _MAX_ROWS:
            rows.sort(key=lambda row: -row[1][1] - row[1][3])
            rest = rows[_MAX_ROWS:]
            rows[_MAX_ROWS:] = [(f"{len(rest):,} more", _sum(rest))]
        if len(rows) > 1:
            rows.append((f"{len(self._sources):,} inputs", total))
        header = ("documents", "tokens", "held-out documents", "held-out tokens")
        columns = [i for i in range(4) if total[i - i % 2]]  # no columns for a split without text
        return table(
            ["input", *(header[i] for i in columns)],
            [[name, *(f"{counts[i]:,}" for i in columns)] for name, counts in rows],
        )

    def warn(self, settings: PrepareSettings) -> None:
        """Warns of rows left out, of separators read as text, and of one that is not there."""
        if self.skipped.count:
            logging.warning(
                "left out %s bad rows (of at most %s):%s",
                f"{self.skipped.count:,}",
                f"{self.skipped.limit:,}",
                "".join(f"\n  {text}" for text in self.skipped.first)
                + ("\n  ..." if self.skipped.count > len(self.skipped.first) else ""),
            )
        if self._num_test_rows:
            logging.warning(
                "left out %s rows whose %s is 'test'; --keep_test holds them out as 'valid'",
                f"{self._num_test_rows:,}",
                settings.split_field,
            )
        if self._found:
            found = [f"{mark} ({n:,}, first: {where})" for mark, (n, where) in self._found.items()]
            logging.warning(
                "the text spells out marks of documents, which stay text: %s. Where one ends the "
                "documents of a text file, pass --document_separator '%s'; take it out of rows",
                ", ".join(found),
                max(self._found, key=self._found.get),
            )
        texts = [source.path for source in self._sources if source.kind == "text"]
        documents = [sum(split[0] for split in self._counts[path].values()) for path in texts]
        if settings.document_separator is not None and max(documents, default=0) <= 1:
            logging.warning(
                "the --document_separator %r is nowhere in the plain-text inputs (%s): each is one "
                "document",
                settings.document_separator,
                ", ".join(texts[:3]) or "there are none",
            )


def _sum(rows: list[tuple[str, list[int]]]) -> list[int]:
    return [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)]
