"""Files and folders that are written whole or not at all, by one process at a time."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mobilellm_jax.errors import UserError


@contextlib.contextmanager
def folder_in_the_making(output: Path) -> Iterator[Path]:
    """OUTPUT.partial, which becomes OUTPUT if all goes well and vanishes if not."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output}: exists and is not a dataset; name another --output, or remove it"
        )
    partial = output.with_name(output.name + ".partial")
    try:
        if partial.exists():
            leftover = _lock_to_prepare(partial)
            print(f"removing {partial}, left over from an interrupted run", file=sys.stderr)
            shutil.rmtree(partial)  # still locked: another prepare may find it, too
            os.close(leftover)
        partial.mkdir(parents=True)
        lock = _lock_to_prepare(partial)
    except OSError as error:
        raise UserError(f"{partial}: cannot write there ({error.strerror})") from error
    try:
        yield partial
        os.fsync(lock)
        os.replace(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{error.filename or output}: {error.strerror}; nothing was kept: free some space, "
                "or name an --output on another disk"
            ) from error
        raise
    finally:
        os.close(lock)


def _lock_to_prepare(partial: Path) -> int:
    message = f"{partial}: another prepare is writing there; wait for it"
    lock = lock_folder(partial, message)
    # What was opened may have been removed or renamed, and made anew, before it was locked.
    if not partial.exists() or not os.path.samestat(os.fstat(lock), partial.stat()):
        os.close(lock)
        raise UserError(message)
    return lock


def lock_folder(folder: Path, message: str) -> int:
    """Holds the folder against other processes until the descriptor is closed or we end.

    Raises:
      UserError: with `message`, if another process holds it; its file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(message) from error
        raise UserError(
            f"{folder}: cannot be locked ({error.strerror}), and two runs in it would destroy each "
            "other's files; mount its file system with locks (Lustre: -o flock), or use another"
        ) from error
    return descriptor


def write_file(path: Path, content: bytes) -> None:
    """Writes `path` so that it holds either what it held before or all of `content`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Forces the folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
