"""Rows of JSON lines, Parquet files and Hugging Face datasets, and the documents in them."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from mobilellm_jax.data.documents import BLOCK_BYTES, Document, cut
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.untrusted import refuse_lfs_pointer, strict_json

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
_FEW = 20  # names that an error message lists


class BadRow(UserError):
    """One row that is not as it should be, in a file that can be read on."""


class SkippedRows:
    """The bad rows that are left out, of which there may be so many.

    Attributes:
      limit: how many may be left out.
      count: how many have been.
      first: what is wrong with the first few.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.count = 0
        self.first: list[str] = []

    def add(self, error: BadRow) -> None:
        """Leaves a row out; raises UserError, with what is wrong in it, if it is one too many."""
        self.count += 1
        if self.count > self.limit:
            hint = f"this is bad row {self.count}, and --skip_bad is {self.limit}"
            if self.limit == 0:
                hint = "--skip_bad N leaves out up to N bad rows"
            raise UserError(f"{error}; {hint}") from error
        if self.count <= 5:
            self.first.append(str(error))


def row_documents(
    path: str,
    rows: Iterable[tuple[str, int, Any]],
    field: str,
    split_field: str | None,
    skipped: SkippedRows,
) -> Iterator[Document]:
    """The documents of rows, each in blocks.

    Args:
      path: the input, for messages.
      rows: (its place, number from 1, value) of each; the value of a row that cannot be read is a
        BadRow.
      field: key of the text.
      split_field: key that says 'train', 'valid' or 'test'.
      skipped: gets the bad rows.

    Raises:
      UserError: one bad row too many.
    """
    for where, line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            text, token_ids, split = _read_row(path, where, row, field, split_field)
        except BadRow as error:
            skipped.add(error)
            continue
        if text is None:
            yield Document(None, token_ids, split, path, line)
        else:
            yield from _blocks(text, split, path, line)


def _read_row(
    path: str, where: str, row: Any, field: str, split_field: str | None
) -> tuple[str | None, list[int] | None, str | None]:
    """Text or token ids, and the split."""
    if not isinstance(row, dict):
        fix = "write one JSON object per line"
        if isinstance(row, list):
            fix += f": jq -c '.[]' {path} > NEW.jsonl"
        raise BadRow(
            f'{where}: expected an object such as {{"{field}": "..."}}, found {_short(row)}; {fix}'
        )
    split = None if split_field is None else _row_split(where, row, split_field)
    if row.get(field) is None and row.get("token_ids") is not None:
        return None, _check_ids(where, row["token_ids"]), split
    if field not in row:
        raise BadRow(
            f"{where}: no field {field!r:.100}; it has {_short_list(row)}; "
            "name the one with the text by --field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise BadRow(
            f"{where}: field {field!r} is {_short(text)}, which is not text; name another field by "
            "--field, or fix the line"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(
            f"{where}: {half} at character {error.start} of field {field!r} is half of a surrogate "
            "pair, which is no character; remove it"
        ) from None
    return text, None, split


def _blocks(text: str, split: str | None, path: str, line: int) -> Iterator[Document]:
    """A text in blocks of at most BLOCK_BYTES characters, cut at line ends or spaces."""
    start, first = 0, True
    while len(text) - start > BLOCK_BYTES:
        stop = start + BLOCK_BYTES
        stop = cut(text, start, stop, "\n", " ") or stop
        yield Document(text[start:stop], None, split, path, line, first, False)
        start, first = stop, False
    yield Document(text[start:], None, split, path, line, first, True)


def json_rows(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[str, int, Any]]:
    """(place, line from 1, value or BadRow) of each line of a file's bytes that is not blank."""
    for line, raw in enumerate(_lines(chunks), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = strict_json(raw)
        except (ValueError, RecursionError) as error:
            fix = "write one JSON object per line"
            if line == 1 and raw.strip() in (b"[", b"{"):
                each = ".[]" if raw.strip() == b"[" else "."
                fix = f"this is pretty-printed JSON; run: jq -c '{each}' {path} > NEW.jsonl"
            text = _short(raw.decode("utf-8", "replace"), str)
            row = BadRow(f"{where}: not valid JSON ({error}): {text}; {fix}")
        yield where, line, row


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        head, *lines = chunk.split(b"\n")
        pending.append(head)
        if lines:
            yield b"".join(pending).removeprefix(b"\xef\xbb\xbf")
            yield from lines[:-1]
            pending = lines[-1:]
    if last := b"".join(pending):
        yield last.removeprefix(b"\xef\xbb\xbf")


def parquet_rows(
    path: str, field: str, split_field: str | None, note: Callable[[float], None]
) -> Iterator[tuple[str, int, Any]]:
    """(place, number from 1, row or BadRow) of each row; ``note`` hears which part is read."""
    try:
        import pyarrow  # heavy, and only this format needs it
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow; pip install 'mobilellm_jax[data]'"
        ) from error

    line = 0
    try:
        with open(path, "rb") as file:
            refuse_lfs_pointer(path, file.read(100))
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = {field, split_field, "token_ids"}
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted]
            if not {field, "token_ids"} & set(columns):
                columns = names[:_FEW]  # for the message that lists them
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                    for row in _batch_rows(batch):
                        line += 1
                        where = f"{path}, row {line}"
                        if isinstance(row, ValueError):
                            row = BadRow(f"{where}: cannot be read ({row}); write it as UTF-8")
                        yield where, line, row
                note((group + 1) / file.num_row_groups)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged or not a Parquet file after row {line} ({error}); fetch it again"
        ) from error


def _batch_rows(batch: Any) -> list[dict[str, Any] | ValueError]:
    """The rows of a pyarrow.RecordBatch; for one with bytes that are no UTF-8, what is wrong."""
    try:
        return batch.to_pylist()
    except ValueError as error:
        if batch.num_rows == 1:
            return [error]
        rows = range(batch.num_rows)
        return [row for number in rows for row in _batch_rows(batch.slice(number, 1))]


def hf_rows(path: str, field: str, note: Callable[[bytes], None]) -> Iterator[tuple[str, int, Any]]:
    """(place, number from 1, row) of a dataset ``hf:NAME...``; ``note`` gets the text of each."""
    try:
        import datasets  # optional dependency
    except ImportError as error:
        raise UserError(
            f"{path}: reading Hugging Face datasets needs the datasets library; run: pip install "
            "datasets"
        ) from error
    name, config, split = (path.removeprefix("hf:").split(":") + ["", ""])[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for line, row in enumerate(rows, 1):
            note(str(row.get(field, "")).encode("utf-8", "replace"))
            yield f"{path}, row {line}", line, row
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot read this dataset ({error}); write hf:NAME, hf:NAME:CONFIG or "
            "hf:NAME:CONFIG:SPLIT, and see that the network is there"
        ) from error


def _row_split(where: str, row: dict[str, Any], split_field: str) -> str:
    value = row.get(split_field)
    split = _SPLITS.get(value.lower()) if isinstance(value, str) else None
    if split is None:
        raise BadRow(
            f"{where}: split field {split_field!r} is {_short(value)}; it must be one of "
            f"{', '.join(_SPLITS)}"
        )
    return split


def _check_ids(where: str, ids: Any) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise BadRow(f"{where}: token_ids is {_short(ids)}; it must be a list of integers")
    for position, value in enumerate(ids):
        if type(value) is not int:
            raise BadRow(
                f"{where}: token_ids[{position}] is {_short(value)}; token ids are integers"
            )
    return ids


def _short(value: Any, show: Callable[[Any], str] = repr) -> str:
    text = show(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _short_list(names: Collection[str]) -> str:
    """The first names, each quoted."""
    first = ", ".join(map(_short, itertools.islice(names, _FEW))) or "none at all"
    return first + (f" and {len(names) - _FEW:,} more" if len(names) > _FEW else "")
