"""Export folders: written whole or not at all, sealed with checksums, read with suspicion."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import UserError

CHECKSUMS = "SHA256SUMS"  # in the form that `sha256sum -c` reads
REPORT = "report.json"
OWN_KEY = "mobilellm"  # in config.json and report.json: what is ours in a format of others
MAX_JSON_BYTES = 100_000_000  # the limit that safetensors has for its header


@contextlib.contextmanager
def new_export(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    All files in it are sealed with `SHA256SUMS` and forced to disk before it gets its name.

    Raises:
      UserError: `path` holds something that is no earlier export, or cannot be written.
    """
    target = Path(os.path.abspath(path))
    replaces = _is_replaceable(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        files = sorted(file for file in new.rglob("*") if file.is_file())
        sums = [f"{_sha256(file)}  {file.relative_to(new).as_posix()}\n" for file in files]
        (new / CHECKSUMS).write_text("".join(sums))
        for entry in (*new.rglob("*"), new):
            _sync(entry)
        if replaces:
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if replaces:
                os.rename(old, target)
            raise
        _sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def verify_checksums(folder: Path) -> None:
    """Compares the files with the checksums that our own exports carry, where there are any.

    The formats themselves notice no flipped bit in the weights.

    Raises:
      UserError: a file is missing or not what was exported.
    """
    path = inside(folder, CHECKSUMS)
    if not path.exists():
        return
    for name, digest in _read_checksums(path).items():
        file = inside(folder, name)
        if not file.is_file():
            raise UserError(f"{file}: is missing; get the folder again")
        if _sha256(file) != digest:
            raise UserError(
                f"{file}: is not the file that was exported (see {CHECKSUMS}); get it again, or if "
                f"you changed it on purpose delete {path}"
            )


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
        names = {entry.relative_to(target).as_posix() for entry in target.rglob("*")}
        if not names:
            return True
        with contextlib.suppress(UserError):
            marked = any(
                OWN_KEY in read_json(target / name)
                for name in ("config.json", REPORT)
                if name in names
            )
            if marked and names == {*_read_checksums(target / CHECKSUMS), CHECKSUMS}:
                return True
    raise UserError(
        f"{target}: already holds something that is not an earlier export; choose another folder, "
        "or empty this one"
    )


def inside(folder: Path, name: str) -> Path:
    """The path of file `name` directly in `folder`; UserError if it leads anywhere else.

    A link of the Hugging Face cache, snapshots/<revision>/<name> -> blobs/<hash>, is followed.
    """
    path = folder / name
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{folder}: refuses the file name {name!r:.120}, which leaves the folder")
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")
    if real.parent not in allowed:
        raise UserError(f"{path}: is a link to {real}, outside of the folder; copy the file here")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if it is missing, huge, malformed or no object."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path}: {size} bytes are too many for a JSON file")
        values = strict_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON ({str(error)[:200]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def strict_json(content: bytes) -> Any:
    """json.loads that raises ValueError for a key given twice, of which json keeps the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r:.120} is given twice")
        return values

    return json.loads(content, object_pairs_hook=unique)


def encode_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
