"""Files and folders that are written whole or not at all, by one process at a time."""

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError


@contextlib.contextmanager
def atomic_folder(target: Path, *, writer: str, replace: bool = False) -> Iterator[Path]:
    """Yields TARGET.partial; renamed to TARGET on success, deleted on error.

    All of it is forced to disk before the renaming. A leftover of a killed process is removed.

    Args:
      target: the folder to make.
      writer: what writes there, for the message of a second one that has to wait.
      replace: whether a TARGET that is there, with what is in it, gives way.

    Raises:
      UserError: another process is writing the same folder; a name that would be taken for what a
        killed process left.
      OSError: no permission, a full disk, or a TARGET that is there and may not be replaced.
    """
    if target.name.endswith(".partial"):
        raise UserError(
            f"{target}: folders called NAME.partial are unfinished ones, and removed when NAME is "
            "made; choose another name"
        )
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        leftover = _lock_partial(partial, writer)
        print(f"removing {partial}, left over from an interrupted run", file=sys.stderr)
        shutil.rmtree(partial)  # still locked: another process may find it, too
        os.close(leftover)
    others = False
    with (
        contextlib.ExitStack() as stack,
        no_new_parents_on_error(target),
        removed_on_error(lambda: others or shutil.rmtree(partial, ignore_errors=True)),
    ):
        try:
            partial.mkdir(parents=True)
            stack.callback(os.close, _lock_partial(partial, writer))
        except (OSError, UserError):
            others = True
            raise
        yield partial
        for entry in (*partial.rglob("*"), partial):
            sync_path(entry)
        _rename(partial, target, replace)
        sync_path(target.parent)


@contextlib.contextmanager
def no_new_parents_on_error(path: Path) -> Iterator[None]:
    """Removes the folders above `path` that are not there yet, if its body makes them and fails."""
    made = [folder for folder in path.parents if not folder.exists()]

    def remove() -> None:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in made:
                folder.rmdir()

    with removed_on_error(remove):
        yield


@contextlib.contextmanager
def removed_on_error(remove: Callable[[], object]) -> Iterator[None]:
    """Calls `remove` if its body fails, or if a signal ends the process without leaving it."""
    interrupts.clean_ups.append(remove)
    try:
        yield
    except BaseException:
        remove()
        raise
    finally:
        interrupts.clean_ups.remove(remove)


def _rename(partial: Path, target: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        os.rename(partial, target)  # over an empty folder, if at all
        return
    # A name that nobody has: NAME.old may be somebody's copy.
    place = Path(tempfile.mkdtemp(prefix=f"{target.name}.old-", dir=target.parent))
    try:
        os.rename(target, place / target.name)
        os.rename(partial, target)
    finally:
        if not target.exists():
            os.rename(place / target.name, target)
        shutil.rmtree(place, ignore_errors=True)


def _lock_partial(partial: Path, writer: str) -> int:
    message = f"{partial}: another {writer} is writing there; wait for it"
    lock = lock_folder(partial, message)
    # Between opening and locking, the folder may have been removed or renamed, and made anew.
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


def check_can_write(path: Path) -> None:
    """Whether `write_file` could write `path`, found out before the work that leads to its content.

    Nothing that is there is touched. Of a link, it is the file behind it that is asked about.

    Raises:
      UserError: no such folder, no permission, or no file to be replaced.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'device'}; name a file")
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY))  # a file without permission to write is kept
        behind = Path(os.path.realpath(path))
        temporary = behind.with_name(f".{behind.name}.tmp")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666))
        temporary.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name a file in a folder that is there "
            "and may be written to"
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Writes `path` so that it holds either what it held before or all of `content`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with removed_on_error(functools.partial(temporary.unlink, missing_ok=True)):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
