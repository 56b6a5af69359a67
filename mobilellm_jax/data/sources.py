"""Streaming readers: files of every common format in, documents out.

Plain text, JSON lines (``text`` or official MobileLLM ``token_ids``), both also compressed with
gzip, bzip2, xz or Zstandard, Parquet, and Hugging Face datasets (``hf:NAME[:CONFIG[:SPLIT]]``).
Memory stays flat whatever the size of a file, and every complaint names the file and the line.
"""

import codecs
import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from mobilellm_jax.data.compression import COMPRESSIONS, decompressed
from mobilellm_jax.data.documents import Document
from mobilellm_jax.data.plain_text import one_document, separated_documents
from mobilellm_jax.data.rows import SkippedRows, hf_rows, json_rows, parquet_rows, row_documents
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.hashing import sha256_file
from mobilellm_jax.storage.paths import local_path

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def find_sources(inputs: Iterable[str | Path]) -> list["Source"]:
    """Every file that ``inputs`` (files, directories, patterns, ``hf:`` names) stand for, in order.

    Directories are searched recursively for the known kinds of file, sorted by path, hidden files
    left out. Raises UserError for what is missing, empty, no file, or listed twice.
    """
    sources = []
    for item in map(str, inputs):
        try:
            sources += [Source(name, _found_part(name, item)) for name in _expand(item)]
        except OSError as error:
            raise UserError(
                f"{error.filename or item}: {error.strerror}; name another --input"
            ) from error
    seen = set()
    for name in (source.path for source in sources):
        key = name if name.startswith("hf:") else Path(name).resolve()
        if key in seen:
            raise UserError(f"{name}: this input is listed twice; list it once")
        seen.add(key)
    return sources


def iter_documents(
    paths: Iterable[str | Path],
    field: str = "text",
    split_field: str | None = None,
    separator: str | None = None,
) -> Iterator[Document]:
    """Documents of all inputs, one after the other; see ``Source.documents``."""
    for source in find_sources(paths):
        yield from source.documents(field, split_field, separator)


class Source:
    """One input: its kind and size, its documents, and how much of it has been read.

    Attributes:
      path: the file, or the ``hf:`` name.
      kind: 'text', 'jsonl', 'parquet' or 'hf'.
      size: bytes on disk (compressed ones where it is compressed), None for ``hf:``.
      bytes_read: how many of them have been read so far; for ``hf:``, bytes of text.
      found: the part of its path that the user did not write, but a folder or pattern stood for.
    """

    def __init__(self, path: str, found: str = ""):
        self.path = path
        self.found = found
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
        status = name.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise UserError(
                f"{path}: is {kind}, not a file, and prepare reads its inputs more than once; "
                "write the text to a file (which may be compressed)"
            )
        self.size = status.st_size
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
        self,
        field: str = "text",
        split_field: str | None = None,
        separator: str | None = None,
        valid_tail: float = 0.0,
        skipped: SkippedRows | None = None,
    ) -> Iterator[Document]:
        """Streams the documents; an object can be read once.

        Args:
          field: key or column that holds the text of JSON lines, Parquet and ``hf:`` inputs.
          split_field: key or column that says 'train', 'valid' (or 'validation', 'val', 'dev') or
            'test'.
          separator: what stands between the documents of a plain-text file; without one, the file
            is a document.
          valid_tail: fraction of a plain-text file that is one document, at its end, that becomes a
            'valid' document.
          skipped: gets the bad rows; without it, none may be bad.

        Raises:
          UserError: anything wrong with the file, with the line or byte and what to do.
        """
        skipped = SkippedRows() if skipped is None else skipped
        if self.kind == "text" and separator is not None:
            return separated_documents(self.path, self._chunks(), separator)
        if self.kind == "text":
            tail = int((1 - valid_tail) * self._text_bytes()) if valid_tail > 0 else None
            return one_document(self.path, self._chunks(), tail)
        if self.kind == "jsonl":
            rows = json_rows(self.path, self._chunks())
        elif self.kind == "parquet":
            rows = parquet_rows(self.path, field, split_field, self._note_fraction)
        else:
            rows = hf_rows(self.path, field, self._note)
        return row_documents(self.path, rows, field, split_field, skipped)

    def _note(self, raw: bytes) -> None:
        self.bytes_read += len(raw)
        self._hash.update(raw)

    def _note_fraction(self, fraction: float) -> None:
        self.bytes_read = int(fraction * self.size)

    def _chunks(self) -> Iterator[bytes]:
        """The decompressed bytes; counts and hashes the raw ones on their way."""
        chunks = decompressed(self.path, self.compression, self._note)
        first = next(chunks, b"")
        if encoding := _other_encoding(first):
            raise UserError(
                f"{self.path}: is text in {encoding}, not in UTF-8; convert it: iconv -f "
                f"{encoding} -t UTF-8 OLD > NEW"
            )
        yield first
        yield from chunks

    def _text_bytes(self) -> int:
        """Size of the text: of a compressed file by decompressing it once more."""
        if not self.compression:
            return self.size
        return sum(map(len, decompressed(self.path, self.compression, lambda raw: None)))


def _other_encoding(head: bytes) -> str | None:
    """Name of the encoding of a text that begins so, if it has units of two or four bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = head[0:1000:2], head[1:1000:2]
    if b"\0" not in even and odd.count(0) > 0.7 * len(odd):
        return "UTF-16LE"
    if b"\0" not in odd and even.count(0) > 0.7 * len(even):
        return "UTF-16BE"
    return None


def _expand(item: str) -> list[str]:
    """The files that one input stands for."""
    if item.startswith("hf:"):
        return [item]
    path = local_path(item)
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{item}: is a link to {os.readlink(path)}, which is not there; bring that back, or "
            "remove the link"
        )
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_known(file, path))
        if not files:
            kinds = ", ".join((*_TEXT, *_JSON_LINES, ".parquet"))
            raise UserError(
                f"{item}: no file to read in this directory; known kinds are {kinds}, the text "
                f"ones also with {', '.join(COMPRESSIONS)}"
            )
        return [name for file in files for name in _expand(str(file))]
    if path.exists():
        return [item]
    found = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else []
    if not found:
        what = "no file matches this pattern" if glob.has_magic(item) else "no such file"
        raise UserError(f"{item}: {what}; look for a typing mistake in the path")
    return [name for match in found for name in _expand(match)]


def _found_part(name: str, item: str) -> str:
    """The part of a file's name that is not in the folder or pattern that led to it."""
    name, item = os.path.normpath(name), os.path.normpath(item)
    found = name[len(os.path.commonprefix([name, item])) :]
    ending = os.path.commonprefix([found[::-1], item[::-1]])
    return found[: len(found) - len(ending)]


def _is_known(file: Path, top: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(top).parts):
        return False
    if not file.is_file() and not (file.is_symlink() and not file.exists()):
        return False
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in (*_TEXT, *_JSON_LINES, ".parquet")
