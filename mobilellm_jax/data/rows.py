"""Rows of JSON lines, Parquet files and Hugging Face datasets, and the documents in them."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mobilellm_jax.data.documents import BLOCK_BYTES, Document, cut
from mobilellm_jax.errors import UserError

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}


def row_documents(
    path: str, rows: Iterable[tuple[int, Any]], field: str, split_field: str | None
) -> Iterator[Document]:
    """The documents of rows, each in blocks.

    Args:
      path: the input, for messages.
      rows: (number from 1, value) of each.
      field: key of the text.
      split_field: key that says 'train', 'valid' or 'test'.

    Raises:
      UserError: a row that is not as described.
    """
    for line, row in rows:
        where = f"{path}, line {line}"
        text, token_ids, split = _read_row(where, row, field, split_field)
        if text is None:
            yield Document(None, token_ids, split, path, line)
        else:
            yield from _blocks(text, split, path, line)


def _read_row(
    where: str, row: Any, field: str, split_field: str | None
) -> tuple[str | None, list[int] | None, str | None]:
    """Text or token ids, and the split."""
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: expected an object such as {{"{field}": "..."}}, found {_short(row)}; write '
            "one JSON object per line"
        )
    split = None if split_field is None else _row_split(where, row, split_field)
    if row.get(field) is None and row.get("token_ids") is not None:
        return None, _check_ids(where, row["token_ids"]), split
    if field not in row:
        raise UserError(
            f"{where}: no field {field!r}; it has {', '.join(map(repr, row)) or 'none at all'}; "
            "name the one with the text by --field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} is {_short(text)}, which is not text; name another field by "
            "--field, or fix the line"
        )
    return _without_surrogates(text), None, split


def _blocks(text: str, split: str | None, path: str, line: int) -> Iterator[Document]:
    """A text in blocks of at most BLOCK_BYTES characters, cut at line ends or spaces."""
    start, first = 0, True
    while len(text) - start > BLOCK_BYTES:
        stop = start + BLOCK_BYTES
        stop = cut(text, start, stop, "\n", " ") or stop
        yield Document(text[start:stop], None, split, path, line, first, False)
        start, first = stop, False
    yield Document(text[start:], None, split, path, line, first, True)


def json_rows(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(line from 1, value) of each line of a file's bytes that is not blank."""
    for line, raw in enumerate(_lines(chunks), 1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw)
        except (ValueError, RecursionError) as error:
            fix = "write one JSON object per line"
            if line == 1 and raw.strip() in (b"[", b"{"):
                fix = f"this is one pretty-printed JSON value; run: jq -c '.[]' {path}"
            raise UserError(
                f"{path}, line {line}: not valid JSON ({error}): {_short(raw)}; {fix}"
            ) from error


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
) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of each row of a Parquet file; ``note`` hears which part is read."""
    try:
        import pyarrow  # heavy, and only this format needs it
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow; pip install 'mobilellm_jax[data]'"
        ) from error

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
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
                note((group + 1) / file.num_row_groups)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged or not a Parquet file after row {line} ({error}); fetch it again"
        ) from error


def hf_rows(path: str, field: str, note: Callable[[bytes], None]) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a dataset ``hf:NAME...``; ``note`` gets the text of each."""
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
            yield line, row
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot read this dataset ({error}); write hf:NAME, hf:NAME:CONFIG or "
            "hf:NAME:CONFIG:SPLIT, and see that the network is there"
        ) from error


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
