"""``prepare``: text files in, a folder of packed token records out, whole or not at all."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax import __version__
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.documents import BLOCK_BYTES, Document
from mobilellm_jax.data.encoding import encode_in_order
from mobilellm_jax.data.packing import SplitWriter
from mobilellm_jax.data.progress import ProgressBar
from mobilellm_jax.data.records import HEADER_FILE, SPLITS, DatasetHeader, SourceFile
from mobilellm_jax.data.report import Report, warn_of_held_out
from mobilellm_jax.data.rows import BadRow, SkippedRows
from mobilellm_jax.data.settings import MAX_WORKERS, PrepareSettings, check_range
from mobilellm_jax.data.sources import Source, find_sources
from mobilellm_jax.data.splits import split_documents
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import atomic_folder
from mobilellm_jax.storage.hashing import sha256_file
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.tokenizers.files import load_tokenizer, write_tokenizer
from mobilellm_jax.tokenizers.sentencepiece import MAX_SAMPLE_BYTES, MODEL_FILE, train_tokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    valid_inputs: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    sequence_length: int = 2048,
    field: str = "text",
    split_field: str | None = None,
    keep_test: bool = False,
    document_separator: str | None = None,
    skip_bad: int = 0,
    valid_fraction: float = 0.0,
    bos: bool = True,
    eos: bool = True,
    num_workers: int | None = None,
    records_per_shard: int | None = None,
    progress: bool = True,
) -> DatasetHeader:
    """Turns documents into a dataset folder of packed records (format: ``records.py``).

    Every document is BOS, its tokens, EOS: the model learns to start from BOS alone and to stop by
    itself, and at a boundary inside a record it sees that the context before no longer counts. A
    plain-text file is one document, or has ``document_separator`` between its documents, which
    may stand in a line of its own or inside of one; line ends beside it go with it.

    What is held out as the 'valid' split is decided by one of: ``valid_inputs`` (whole files),
    ``split_field`` (each line says it; those of a 'test' split are left out, or are 'valid' with
    ``keep_test``), or ``valid_fraction``. The last one draws documents by a
    hash of their content, so copies of a document land on the same side; of a plain-text file that
    is one document, and larger than 1 MB or the only input, it takes the end instead. Lines with
    official MobileLLM ``token_ids`` become one record each.

    A bad row of JSON lines, Parquet or a Hugging Face dataset is an error, but for the first
    ``skip_bad`` of them all, which are left out with a warning.

    The result does not depend on ``num_workers`` (default: all cores). It is written to
    ``OUTPUT.partial`` and renamed when complete; an ``output`` that is already there from the same
    inputs and settings is only verified. Raises UserError for bad inputs or settings, a full disk,
    another dataset in ``output`` and a dead worker.
    """
    assert not isinstance(inputs, str) and not isinstance(valid_inputs, str), "pass lists"
    output = local_path(output)
    if num_workers is not None:
        check_range("workers", num_workers, 1, MAX_WORKERS)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    settings = PrepareSettings(
        sequence_length=sequence_length,
        tokenizer_sha256=loaded and loaded.sha256,
        vocab_size=vocab_size,
        field=field,
        split_field=split_field,
        valid_fraction=valid_fraction,
        num_valid_inputs=len(find_sources(valid_inputs)),
        bos=bos,
        eos=eos,
        records_per_shard=records_per_shard,
        document_separator=document_separator,
        keep_test=None if split_field is None and not keep_test else keep_test,
        skip_bad=skip_bad,
    )
    sources = find_sources([*inputs, *valid_inputs])
    if not sources:
        raise UserError("no input; name files, directories or patterns by --input")
    if (output / HEADER_FILE).exists():
        return _finished(output, settings, sources, progress)
    if split_field is None:
        warn_of_held_out(sources[: len(sources) - settings.num_valid_inputs])
    with _new_folder(output) as partial:
        if loaded is None:
            sample = _training_sample(find_sources(inputs or valid_inputs), settings)
            loaded = train_tokenizer(sample, vocab_size, partial / MODEL_FILE)
        else:
            write_tokenizer(partial, loaded)
        header = _write(partial, settings, sources, loaded, num_workers, progress)
    return header


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    if "=" in output.name or "," in str(output):
        raise UserError(
            f"{output}: config.data.path, 'DIR=0.7,DIR=0.3', could not name this --output; choose "
            "a name without '=' and ','"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output}: exists and is not a dataset; name another --output, or remove it"
        )
    target = Path(os.path.realpath(output))  # of a link, what it names
    if target.is_symlink():
        raise UserError(f"{output}: is a link that leads to itself; name another --output")
    try:
        with atomic_folder(target, writer="prepare") as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"{error.filename or output}: {error.strerror}; nothing was kept: free some space, "
            "or name an --output on another disk"
        ) from error


def _write(
    partial: Path,
    settings: PrepareSettings,
    sources: list[Source],
    tokenizer: Tokenizer,
    num_workers: int | None,
    progress: bool,
) -> DatasetHeader:
    """Encodes, packs and writes everything, the header last."""
    for mark in ("bos", "eos"):
        if getattr(settings, mark) and getattr(tokenizer, f"{mark}_id") is None:
            raise UserError(f"the tokenizer has no {mark.upper()}; pass --no-{mark}")
    writers = {
        split: SplitWriter(
            partial,
            split,
            sequence_length=settings.sequence_length,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            records_per_shard=settings.records_per_shard,
        )
        for split in SPLITS
    }
    report = Report(sources, settings.skip_bad)
    with ProgressBar(sources, enabled=progress) as bar:
        encoded = encode_in_order(
            _checked_documents(sources, settings, tokenizer.vocab_size, report),
            tokenizer,
            bos=settings.bos,
            eos=settings.eos,
            num_workers=_useful_workers(sources, num_workers),
        )
        with contextlib.closing(encoded):
            for document, tokens, num_bytes in encoded:
                writer = writers[document.split]
                if document.token_ids is None:
                    writer.add(tokens, num_bytes, document.first)
                else:
                    is_start = (tokens == tokenizer.bos_id) | (np.arange(len(tokens)) == 0)
                    writer.add_record(tokens, np.flatnonzero(is_start), num_bytes)
                report.add(document, len(tokens))
                bar.update(len(tokens))
    splits = {name: split for name in SPLITS if (split := writers[name].close()).num_records}
    report.warn(settings)
    _check_splits(splits, settings, len(sources))
    if progress:
        print(report.table())
    header = DatasetHeader(
        sequence_length=settings.sequence_length,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        bos=settings.bos,
        eos=settings.eos,
        splits=splits,
        sources=tuple(SourceFile(item.path, item.bytes_read, item.sha256) for item in sources),
        settings=dataclasses.asdict(settings),
        created_by=f"mobilellm_jax {__version__}",
    )
    header.save(partial)
    return header


def _checked_documents(
    sources: list[Source], settings: PrepareSettings, vocab_size: int, report: Report
) -> Iterator[Document]:
    """The documents to write, with their splits; UserError for ids that cannot be a record."""
    for document in split_documents(sources, settings, report.skipped):
        if document.split == "test":
            report.leave_out(document)
            continue
        try:
            if document.token_ids is not None:
                _check_line(document, settings.sequence_length, vocab_size)
        except BadRow as error:
            report.skipped.add(error)
            continue
        yield document


def _check_line(document: Document, sequence_length: int, vocab_size: int) -> None:
    ids = document.token_ids
    if len(ids) not in (sequence_length, sequence_length + 1):
        raise BadRow(
            f"{document.where}: {len(ids)} token_ids, but --sequence_length is {sequence_length}; "
            f"pass --sequence_length {len(ids)}"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        position = next(i for i, value in enumerate(ids) if not 0 <= value < vocab_size)
        raise BadRow(
            f"{document.where}: token_ids[{position}] is {ids[position]}, outside of the "
            f"tokenizer's [0, {vocab_size}); use the tokenizer that made this file"
        )


def _training_sample(sources: list[Source], settings: PrepareSettings) -> Iterator[str]:
    """Training text for the tokenizer: the head of every input, in proportion to its size."""
    total = sum(source.size or 0 for source in sources)
    skipped = SkippedRows(settings.skip_bad)  # those of `_write` are counted and shown
    for source in sources:
        share = 1 / len(sources) if source.size is None else source.size / total
        taken = 0
        for document in source.documents(
            settings.field, settings.split_field, settings.document_separator, skipped=skipped
        ):
            if document.text and document.split in ("train", None):
                taken += len(document.text)
                yield document.text
            if taken >= share * MAX_SAMPLE_BYTES:
                break


def _check_splits(splits: dict[str, Any], settings: PrepareSettings, num_sources: int) -> None:
    if not splits:
        raise UserError(
            "the input holds no text to train on or hold out: not one token to predict; look at "
            "the files"
        )
    train_files = num_sources > settings.num_valid_inputs
    if "train" not in splits and train_files and settings.split_field is None:
        raise UserError(
            f"--valid_fraction {settings.valid_fraction} left no text to train on; use a smaller "
            "one"
        )
    if "valid" not in splits and settings.valid_fraction > 0:
        raise UserError(
            f"--valid_fraction {settings.valid_fraction} held out no text, as the documents are "
            "few or a file has few lines; use a larger one, or --valid_input FILES"
        )


def _useful_workers(sources: list[Source], num_workers: int | None) -> int:
    """No more than there are batches: starting a process costs more than a batch."""
    wanted = num_workers or os.cpu_count() or 1
    if any(source.size is None for source in sources):
        return wanted
    # Compressed text is about four times as long.
    num_bytes = sum(source.size * (4 if source.compression else 1) for source in sources)
    return max(1, min(wanted, num_bytes // BLOCK_BYTES))


def _finished(
    output: Path, settings: PrepareSettings, sources: list[Source], progress: bool
) -> DatasetHeader:
    """The dataset that is already there, if it is what was asked for and undamaged."""
    try:
        header = Dataset.open(output).header
        header.verify_shards(output)
    except UserError as error:
        raise UserError(f"{error} (remove {output} first)") from error
    fix = f"; name another --output, or remove {output}"
    # How the datasets were made that do not record these settings.
    earlier = {"keep_test": None if settings.split_field is None else True, "skip_bad": 0}
    for name, value in dataclasses.asdict(settings).items():
        before = header.settings.get(name, earlier.get(name))
        if before != value:
            raise UserError(
                f"{output}: already made with {name} {before!r}, now asked for {value!r}{fix}"
            )
    before = [file.path if file.path.startswith("hf:") else file.sha256 for file in header.sources]
    for source, known in zip(sources, before, strict=False):
        if known != (source.path if source.kind == "hf" else sha256_file(source.path)):
            raise UserError(f"{output}: already made, but {source.path} was different{fix}")
    if len(sources) != len(before):
        raise UserError(
            f"{output}: already made from {len(before)} inputs, now {len(sources)}{fix}"
        )
    if progress:
        print(f"{output}: already prepared from these inputs; verified, nothing to do")
    return header
