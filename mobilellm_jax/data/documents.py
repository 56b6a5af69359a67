"""Documents as readers hand them on, whole or in blocks, and the places where text may be cut."""

import dataclasses
from typing import Any

BLOCK_BYTES = 1 << 20  # Text is passed on in blocks of about this size.


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document, or one block of a long one: exactly one of ``text`` and ``token_ids`` is set.

    ``first`` and ``last`` tell where a document in several blocks begins and ends; ``split`` is
    'train', 'valid', 'test' or None where the input does not say; ``line`` counts lines or rows
    from 1.
    """

    text: str | None
    token_ids: list[int] | None
    split: str | None
    source: str
    line: int
    first: bool = True
    last: bool = True

    @property
    def where(self) -> str:
        return f"{self.source}, line {self.line}"


def cut(text: Any, start: int, stop: int, *separators: Any) -> int:
    """The place in (start, stop] to cut ``text``: after the last newline, else at the last space.

    Works on str and bytes; 0 where there is neither.
    """
    newline, space = separators
    if (found := text.rfind(newline, start, stop)) >= 0:
        return found + 1
    return max(text.rfind(space, start + 1, stop), 0)
