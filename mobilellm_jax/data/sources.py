"""Streaming readers: files of every common format in, documents out.

Plain text, JSON lines (``text`` or official MobileLLM ``token_ids``), both also compressed with
gzip, bzip2, xz or Zstandard, Parquet, and Hugging Face datasets (``hf:NAME[:CONFIG[:SPLIT]]``).
Memory stays flat whatever the size of a file, and every complaint names the file and the line.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mobilellm_jax.data.compression import COMPRESSIONS, decompressed
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.hashing import sha256_file

BLOCK_BYTES = 1 << 20  # Text is passed on in blocks of about this size.
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(
    ("valid", "validation", "val", "dev", "test"), "valid"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document, or one block of a long one: exactly one of ``text`` and ``token_ids`` is set.

    ``first`` and ``last`` tell where a document in several blocks begins and ends; ``split`` is
    'train', 'valid' or None where the input does not say; ``line`` counts lines or rows from 1.
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


def find_sources(inputs: Iterable[str | Path]) -> list["Source"]:
    """Every file that ``inputs`` (files, directories, patterns, ``hf:`` names) stand for, in order.

    Directories are searched recursively for the known kinds of file, sorted by path, hidden files
    left out. Raises UserError for what is missing, empty, or listed twice.
    """
    names = [name for item in inputs for name in _expand(str(item))]
    seen = set()
    for name in names:
        key = name if name.startswith("hf:") else Path(name).resolve()
        if key in seen:
            raise UserError(f"{name}: this input is listed twice; list it once")
        seen.add(key)
    return [Source(name) for name in names]


def iter_documents(
    paths: Iterable[str | Path], field: str = "text", split_field: str | None = None
) -> Iterator[Document]:
    """Documents of all inputs, one after the other; see ``Source.documents``."""
    for source in find_sources(paths):
        yield from source.documents(field, split_field)


class Source:
    """One input: its kind and size, its documents, and how much of it has been read.

    Attributes:
      path: the file, or the ``hf:`` name.
      kind: 'text', 'jsonl', 'parquet' or 'hf'.
      size: bytes on disk (compressed ones where it is compressed), None for ``hf:``.
      bytes_read: how many of them have been read so far; for ``hf:``, bytes of text.
    """

    def __init__(self, path: str):
        self.path = path
        self.bytes_read = 0
        self.compression = ""
        self._hash = hashlib.sha256()
        if path.startswith("hf:"):
            self.kind, self.size = "hf", None
            return
        name = Path(path)
        self.compression = name.suffix.lower() if name.suffix.lower() in COMPRESSIONS else ""
        suffix = Path(name.stem if self.compression else name.name).suffix.lower()
        self.kind = "jsonl" if suffix in _JSON_LINES else suffix[1:]
        if self.kind not in ("jsonl", "parquet"):
            self.kind = "text"
        self.size = name.stat().st_size
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: no permission to read this file; change it with chmod")
        if self.size == 0:
            raise UserError(f"{path}: the file is empty; remove it from the input")

    @property
    def sha256(self) -> str:
        """Of the file as it lies on disk; for ``hf:`` of the text that was read."""
        if self.kind == "parquet":
            return sha256_file(self.path)
        return self._hash.hexdigest()

    def documents(
        self, field: str = "text", split_field: str | None = None, valid_tail: float = 0.0
    ) -> Iterator[Document]:
        """Streams the documents; an object can be read once.

        Args:
          field: key or column that holds the text of JSON lines, Parquet and ``hf:`` inputs.
          split_field: key or column that says 'train' or 'valid' ('validation', 'dev', 'test').
          valid_tail: fraction of a plain-text file, at its end, that becomes a 'valid' document.

        Raises:
          UserError: anything wrong with the file, with the line or byte and what to do.
        """
        if self.kind == "text":
            yield from self._text_documents(valid_tail)
            return
        rows = {"jsonl": self._json_rows, "parquet": self._parquet_rows, "hf": self._hf_rows}
        for line, row in rows[self.kind](field, split_field):
            yield from self._row_documents(line, row, field, split_field)

    # Rows -----------------------------------------------------------------------------------------

    def _row_documents(
        self, line: int, row: Any, field: str, split_field: str | None
    ) -> Iterator[Document]:
        where = f"{self.path}, line {line}"
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: expected an object such as {{"{field}": "..."}}, found '
                f"{_short(row)}; write one JSON object per line"
            )
        split = None if split_field is None else _row_split(where, row, split_field)
        if row.get(field) is None and row.get("token_ids") is not None:
            yield Document(None, _check_ids(where, row["token_ids"]), split, self.path, line)
            return
        if field not in row:
            raise UserError(
                f"{where}: no field {field!r}; it has {', '.join(map(repr, row)) or 'none at all'}"
                "; name the one with the text by --field"
            )
        text = row[field]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: field {field!r} is {_short(text)}, which is not text; name another "
                "field by --field, or mend the line"
            )
        yield from self._blocks_of(_without_surrogates(text), split, line)

    def _blocks_of(self, text: str, split: str | None, line: int) -> Iterator[Document]:
        """A text in blocks of at most BLOCK_BYTES characters, cut at line ends or spaces."""
        start, first = 0, True
        while len(text) - start > BLOCK_BYTES:
            stop = start + BLOCK_BYTES
            stop = _cut(text, start, stop, "\n", " ") or stop
            yield Document(text[start:stop], None, split, self.path, line, first, False)
            start, first = stop, False
        yield Document(text[start:], None, split, self.path, line, first, True)

    def _json_rows(self, field: str, split_field: str | None) -> Iterator[tuple[int, Any]]:
        line = 0
        for line, raw in enumerate(self._lines(), 1):
            if not raw.strip():
                continue
            try:
                yield line, json.loads(raw)
            except (ValueError, RecursionError) as error:
                mend = "write one JSON object per line"
                if line == 1 and raw.strip() in (b"[", b"{"):
                    mend = f"this is one pretty-printed JSON value; run: jq -c '.[]' {self.path}"
                raise UserError(
                    f"{self.path}, line {line}: not valid JSON ({error}): {_short(raw)}; {mend}"
                ) from error

    def _parquet_rows(self, field: str, split_field: str | None) -> Iterator[tuple[int, Any]]:
        try:
            import pyarrow  # heavy, and only this format needs it
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{self.path}: Parquet needs pyarrow; pip install 'mobilellm_jax[data]'"
            ) from error

        line = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                wanted = {field, split_field, "token_ids"}
                names = file.schema_arrow.names
                columns = [name for name in names if name in wanted]
                if not {field, "token_ids"} & set(columns):
                    columns = names[:20]  # for the message that lists them
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                        for row in batch.to_pylist():
                            line += 1
                            yield line, row
                    self.bytes_read = self.size * (group + 1) // file.num_row_groups
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: damaged or not a Parquet file after row {line} ({error}); fetch it "
                "again"
            ) from error

    def _hf_rows(self, field: str, split_field: str | None) -> Iterator[tuple[int, Any]]:
        try:
            import datasets  # optional dependency
        except ImportError as error:
            raise UserError(
                f"{self.path}: reading Hugging Face datasets needs the datasets library; run: "
                "pip install datasets"
            ) from error
        name, config, split = (self.path.removeprefix("hf:").split(":") + ["", ""])[:3]
        try:
            rows = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
            for line, row in enumerate(rows, 1):
                raw = str(row.get(field, "")).encode("utf-8", "replace")
                self._hash.update(raw)
                self.bytes_read += len(raw)
                yield line, row
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.path}: cannot read this dataset ({error}); write hf:NAME, hf:NAME:CONFIG "
                "or hf:NAME:CONFIG:SPLIT, and see that the network is there"
            ) from error

    # Bytes ----------------------------------------------------------------------------------------

    def _text_documents(self, valid_tail: float) -> Iterator[Document]:
        """The blocks of a plain-text file: one document, or two where ``valid_tail`` cuts it."""
        cut, split = -1, None
        if valid_tail > 0:
            cut, split = int((1 - valid_tail) * self._text_bytes()), "train"
        offset, line, first = 0, 1, True
        blocks = self._text_blocks()
        block = next(blocks)
        while block is not None:
            following = next(blocks, None)
            parts = [block]
            if offset <= cut < offset + len(block):
                stop = block.find(b"\n", cut - offset) + 1 or len(block)
                parts = [block[:stop], block[stop:]]
            for number, part in enumerate(parts):
                if number == 1:
                    split, first = "valid", True
                last = following is None or number < len(parts) - 1
                if part or last:
                    text = self._decode(part, offset)
                    yield Document(text, None, split, self.path, line, first, last)
                    first = False
                offset, line = offset + len(part), line + part.count(b"\n")
            block = following

    def _text_blocks(self) -> Iterator[bytes]:
        """The bytes of a text file, cut at line ends, else at spaces, else between characters."""
        pending = b""
        for chunk in self._chunks():
            pending += chunk
            while len(pending) > BLOCK_BYTES:
                stop = _cut(pending, 0, BLOCK_BYTES, b"\n", b" ")
                if not stop:
                    stop = BLOCK_BYTES
                    while stop > BLOCK_BYTES - 4 and pending[stop] & 0xC0 == 0x80:
                        stop -= 1
                yield pending[:stop]
                pending = pending[stop:]
        yield pending

    def _decode(self, block: bytes, offset: int) -> str:
        mend = "; this is not a text file: take it out of the input, or convert it to UTF-8"
        nul = block.find(b"\0")
        if nul >= 0:
            raise UserError(f"{self.path}: NUL byte at byte {offset + nul}{mend}")
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: byte 0x{block[error.start]:02x} at byte {offset + error.start} is "
                f"not valid UTF-8{mend}"
            ) from error
        return text.removeprefix("\ufeff") if offset == 0 else text

    def _lines(self) -> Iterator[bytes]:
        pending: list[bytes] = []
        for chunk in self._chunks():
            head, *lines = chunk.split(b"\n")
            pending.append(head)
            if lines:
                yield b"".join(pending).removeprefix(b"\xef\xbb\xbf")
                yield from lines[:-1]
                pending = lines[-1:]
        if last := b"".join(pending):
            yield last.removeprefix(b"\xef\xbb\xbf")

    def _chunks(self) -> Iterator[bytes]:
        """The decompressed bytes; counts and hashes the raw ones on their way."""

        def note(raw: bytes) -> None:
            self.bytes_read += len(raw)
            self._hash.update(raw)

        return decompressed(self.path, self.compression, note)

    def _text_bytes(self) -> int:
        """Size of the text: of a compressed file by decompressing it once more."""
        if not self.compression:
            return self.size
        return sum(map(len, decompressed(self.path, self.compression, lambda raw: None)))


def _expand(item: str) -> list[str]:
    """The files that one input stands for."""
    if item.startswith("hf:"):
        return [item]
    path = Path(item)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_known(file, path))
        if not files:
            kinds = ", ".join((*_TEXT, *_JSON_LINES, ".parquet"))
            raise UserError(
                f"{item}: no file to read in this directory; known kinds are {kinds}, the text "
                f"ones also with {', '.join(COMPRESSIONS)}"
            )
        return [str(file) for file in files]
    if path.exists():
        return [item]
    found = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else []
    if not found:
        what = "no file matches this pattern" if glob.has_magic(item) else "no such file"
        raise UserError(f"{item}: {what}; look for a typing mistake in the path")
    return [name for match in found for name in _expand(match)]


def _is_known(file: Path, top: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(top).parts) or not file.is_file():
        return False
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in (*_TEXT, *_JSON_LINES, ".parquet")


def _cut(text: Any, start: int, stop: int, *separators: Any) -> int:
    """Where to cut ``text`` in (start, stop]: after the last newline, else before the last space.

    Works on str and bytes; 0 where there is neither.
    """
    newline, space = separators
    if (found := text.rfind(newline, start, stop)) >= 0:
        return found + 1
    return max(text.rfind(space, start + 1, stop), 0)


def _row_split(where: str, row: dict[str, Any], split_field: str) -> str:
    value = row.get(split_field)
    split = _SPLITS.get(value.lower()) if isinstance(value, str) else None
    if split is None:
        raise UserError(
            f"{where}: split field {split_field!r} is {_short(value)}; it must be one of "
            f"{', '.join(_SPLITS)}"
        )
    return split


def _check_ids(where: str, ids: Any) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise UserError(f"{where}: token_ids is {_short(ids)}; it must be a list of integers")
    for position, value in enumerate(ids):
        if type(value) is not int:
            raise UserError(
                f"{where}: token_ids[{position}] is {_short(value)}; token ids are integers"
            )
    return ids


def _without_surrogates(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no encoding can: they become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _short(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
