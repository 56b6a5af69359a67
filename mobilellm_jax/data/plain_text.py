"""Plain-text files: bytes in, documents out, a block at a time."""

import re
from collections.abc import Iterable, Iterator

from mobilellm_jax.data.documents import BLOCK_BYTES, Document, cut
from mobilellm_jax.errors import UserError


def one_document(path: str, chunks: Iterable[bytes], valid_from: int | None) -> Iterator[Document]:
    """The blocks of a file that is one document, or two.

    Args:
      path: the file, for messages.
      chunks: its bytes.
      valid_from: from the first line end at or after this byte on, the text is a 'valid' document
        and what comes before is a 'train' one; None makes no split.

    Raises:
      UserError: bytes that are no text.
    """
    split = None if valid_from is None else "train"
    offset, line, first = 0, 1, True
    blocks = _blocks(chunks)
    block = next(blocks)
    while block is not None:
        following = next(blocks, None)
        parts = [block]
        if valid_from is not None and offset <= valid_from < offset + len(block):
            stop = block.find(b"\n", valid_from - offset) + 1 or len(block)
            parts = [block[:stop], block[stop:]]
        for number, part in enumerate(parts):
            if number == 1:
                split, first = "valid", True
            last = following is None or number < len(parts) - 1
            if part or last:
                text = _decode(path, part, offset)
                yield Document(text, None, split, path, line, first, last)
                first = False
            offset, line = offset + len(part), line + part.count(b"\n")
        block = following


def separated_documents(path: str, chunks: Iterable[bytes], separator: str) -> Iterator[Document]:
    """The documents of a file that has ``separator`` between them, each in blocks.

    The separator may stand in a line of its own or inside of a line; a line end in it is '\\n' or
    '\\r\\n'. It is no part of a document, and neither are line ends at a document's beginning and
    end; documents of nothing but white space are left out.

    Args:
      path: the file, for messages.
      chunks: its bytes.
      separator: what stands between documents, not empty.

    Raises:
      UserError: bytes that are no text.
    """
    offset, line, first = 0, 1, True
    for part, mark, last in _parts(chunks, separator):
        text = part.lstrip(b"\r\n") if first else part
        start = len(part) - len(text)
        if last:
            text = text.rstrip(b"\r\n")
        if text.strip() or not first or (text and not last):
            text_line = line + part.count(b"\n", 0, start)
            text = _decode(path, text, offset + start)
            yield Document(text, None, None, path, text_line, first, last)
            first = last
        offset += len(part) + len(mark)
        line += part.count(b"\n") + mark.count(b"\n")


def _parts(chunks: Iterable[bytes], separator: str) -> Iterator[tuple[bytes, bytes, bool]]:
    """(bytes, separator after them, whether a document ends there); a block of bytes at most.

    A cut inside of a document has something other than line ends on both sides, so that whoever
    removes those at a document's end finds all of them in its last part.
    """
    mark = re.compile(re.escape(separator.encode()).replace(b"\\\n", rb"\r?\n"))
    longest = len(separator.encode()) + separator.count("\n")
    pending = b""
    for chunk in chunks:
        begin, start = max(0, len(pending) - longest + 1), 0
        pending += chunk
        for match in mark.finditer(pending, begin):
            yield pending[start : match.start()], match[0], True
            start = match.end()
        pending = pending[start:]
        # The last bytes may be the beginning of a separator.
        while len(pending) > BLOCK_BYTES + longest and (
            pending[BLOCK_BYTES : len(pending) - longest].strip(b"\r\n")
            or len(pending) > 4 * BLOCK_BYTES  # nothing but line ends: memory counts for more
        ):
            stop = _cut_block(pending)
            yield pending[:stop], b"", False
            pending = pending[stop:]
    yield pending, b"", True


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a text file, cut at line ends, else at spaces, else between characters."""
    pending = b""
    for chunk in chunks:
        pending += chunk
        while len(pending) > BLOCK_BYTES:
            stop = _cut_block(pending)
            yield pending[:stop]
            pending = pending[stop:]
    yield pending


def _cut_block(pending: bytes) -> int:
    stop = cut(pending, 0, BLOCK_BYTES, b"\n", b" ")
    if not stop:
        stop = BLOCK_BYTES
        while stop > BLOCK_BYTES - 4 and pending[stop] & 0xC0 == 0x80:
            stop -= 1
    return stop


def _decode(path: str, block: bytes, offset: int) -> str:
    fix = "; this is not a text file: take it out of the input, or convert it to UTF-8"
    nul = block.find(b"\0")
    if nul >= 0:
        raise UserError(f"{path}: NUL byte at byte {offset + nul}{fix}")
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte 0x{block[error.start]:02x} at byte {offset + error.start} is not valid "
            f"UTF-8{fix}"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text
