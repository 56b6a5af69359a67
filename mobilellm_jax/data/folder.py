"""A folder that is written whole or not at all."""

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
            os.close(_lock(partial))
            print(f"removing {partial}, left over from an interrupted run", file=sys.stderr)
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        lock = _lock(partial)
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


def _lock(partial: Path) -> int:
    """Holds the folder against a second run; the system lets go when this process ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{partial}: another prepare is writing there; wait for it") from error
    return descriptor
