"""Export folders: written whole or not at all, sealed with SHA256SUMS, recognised again."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import atomic_folder
from mobilellm_jax.storage.hashing import sha256_file
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.storage.untrusted import read_json, refuse_lfs_pointer, safe_child

CHECKSUMS = "SHA256SUMS"  # in the form that `sha256sum -c` reads
REPORT = "report.json"
OWN_KEY = "mobilellm"  # our own entry in config.json and report.json, formats of others


@contextlib.contextmanager
def new_export(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    All files in it are sealed with `SHA256SUMS` and forced to disk before it gets its name.

    Raises:
      UserError: `path` holds something that is no earlier export, or cannot be written.
    """
    target = Path(os.path.abspath(local_path(path)))
    replace = _is_replaceable(target)
    try:
        with atomic_folder(target, writer="convert", replace=replace) as new:
            yield new
            _write_checksums(new)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from error


def verify_checksums(folder: Path) -> None:
    """Compares the files with the checksums that our own exports carry, where there are any.

    The formats themselves notice no flipped bit in the weights.

    Raises:
      UserError: a file is missing or not what was exported.
    """
    path = safe_child(folder, CHECKSUMS)
    if not path.exists():
        return
    for name, digest in _read_checksums(path).items():
        file = safe_child(folder, name)
        if not file.is_file():
            raise UserError(f"{file}: is missing; get the folder again")
        if _readable_sha256(file) != digest:
            with open(file, "rb") as opened:
                refuse_lfs_pointer(file, opened.read(100))
            raise UserError(
                f"{file}: is not the file that was exported (see {CHECKSUMS}); get it again, or if "
                f"you changed it on purpose delete {path}"
            )


def _write_checksums(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = [f"{_readable_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(sums))


def _readable_sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    sums = {}
    for line in content.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or name in sums:
            raise UserError(f"{path}: is damaged in the line {line!r:.120}; get the folder again")
        sums[name] = digest
    return sums


def _is_replaceable(target: Path) -> bool:
    """Whether `target` exists and may be replaced; UserError if it holds anything but an export."""
    if not (target.exists() or target.is_symlink()):
        return False
    if target.is_dir() and not target.is_symlink():
        if not any(target.iterdir()):
            return True
        with contextlib.suppress(UserError):
            marked = any(
                OWN_KEY in read_json(target / name)
                for name in ("config.json", REPORT)
                if (target / name).exists()
            )
            sealed = {*_read_checksums(target / CHECKSUMS), CHECKSUMS} if marked else set()
            if marked and sealed == {f.relative_to(target).as_posix() for f in target.rglob("*")}:
                return True
    raise UserError(
        f"{target}: already holds something that is not an earlier export; choose another folder, "
        "or empty this one"
    )
