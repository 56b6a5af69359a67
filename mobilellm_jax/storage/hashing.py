"""SHA-256 of files."""

import hashlib
import os
from pathlib import Path

_READ_BYTES = 4 << 20


def sha256_file(path: str | Path, *, sync: bool = False) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Args:
      path: the file.
      sync: also force the file to disk.

    Raises:
      OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
