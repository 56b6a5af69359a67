"""A folder's manifest: the size and SHA-256 of every file in it, written last.

Orbax restores flipped bits in its data files without a complaint, so whether a checkpoint is whole
is ours to know. A manifest that is missing, damaged or in disagreement with the folder makes the
folder invalid; nothing in a manifest can make `find_damage` raise or look outside the folder.
"""

import concurrent.futures
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from mobilellm_jax.storage.atomic import sync_path, write_file
from mobilellm_jax.storage.hashing import sha256_file

MANIFEST_NAME = "manifest.json"
# Orbax writes these two between the last moment we can act and its renaming of the folder that
# commits it. They hold timestamps and the word "successful"; nothing here ever reads them.
UNLISTED_NAMES = frozenset({MANIFEST_NAME, "_CHECKPOINT_METADATA", "commit_success.txt"})

_FORMAT = 1
_MAX_MANIFEST_BYTES = 64 << 20  # some 400,000 files; checked before anything is read
_NUM_THREADS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def write_manifest(folder: Path, step: int) -> None:
    """Hashes every file below `folder`, forces them to disk, then writes the manifest.

    Args:
      folder: the finished folder; nobody writes into it any more.
      step: the training step it is of, so that a renamed folder is noticed.

    Raises:
      OSError: the disk is full or a file cannot be read.
    """
    names = sorted(_list_files(folder))
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = list(pool.map(lambda name: sha256_file(folder / name, sync=True), names))
    files = {
        name: {"sha256": digest, "size": (folder / name).stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    }
    for directory in {(folder / name).parent for name in names}:
        sync_path(directory)
    write_file(folder / MANIFEST_NAME, _encode(step, files))


def find_damage(folder: Path, step: int | None, *, sizes_only: str | None = None) -> list[str]:
    """Compares `folder` with its manifest.

    Args:
      folder: the folder to check.
      step: the training step that it is supposed to be of; None accepts any.
      sizes_only: a top-level name whose files are not hashed, only measured (for readers that
        will not read them).

    Returns:
      One line for each difference, beginning with the file's name; empty for a valid folder.
    """
    try:
        files = _read_manifest(folder, step)
    except (OSError, ValueError, RecursionError) as error:
        return [f"{MANIFEST_NAME}: {error}"]
    try:
        present = _list_files(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    damage = [f"{name}: missing" for name in sorted(files.keys() - present)]
    damage += [f"{name}: not in the manifest" for name in sorted(present - files.keys())]
    if damage:
        return damage

    def check(name: str) -> str | None:
        path, expected = folder / name, files[name]
        try:
            if (size := path.stat().st_size) != expected["size"]:
                return f"{name}: {size} bytes, the manifest says {expected['size']}"
            if sizes_only is not None and name.split("/")[0] == sizes_only:
                return None
            if (digest := sha256_file(path)) != expected["sha256"]:
                return (
                    f"{name}: sha256 {digest[:12]}.., the manifest says {expected['sha256'][:12]}.."
                )
        except OSError as error:
            return f"{name}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [line for line in pool.map(check, sorted(files)) if line]


def _encode(step: int, files: Mapping[str, Mapping[str, str | int]]) -> bytes:
    content = {"format": _FORMAT, "step": step, "files": files}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(folder: Path, step: int | None) -> dict[str, dict[str, str | int]]:
    """Raises ValueError for anything that `write_manifest` would not have written."""
    path = folder / MANIFEST_NAME
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError("missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{status.st_size} bytes, more than {_MAX_MANIFEST_BYTES}")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("lists no files")
    for name, entry in files.items():
        _check_entry(name, entry)
    found = content.get("step")
    if type(found) is not int or (step is not None and found != step):
        raise ValueError(f"of step {found!r:.40}, not {step}")
    # Byte for byte what we would write: a flip in white space or in a duplicated key counts too.
    if raw != _encode(found, files):
        raise ValueError("not in the form that it was written in")
    return files


def _check_entry(name: str, entry: object) -> None:
    if not name or name.startswith("/") or "\\" in name or not name.isprintable():
        raise ValueError(f"file name {name!r:.80} is not a relative path")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"file name {name!r:.80} leads out of the folder")
    if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
        raise ValueError(f"entry of {name!r:.80} is not a size and a sha256")
    digest, size = entry["sha256"], entry["size"]
    if not (isinstance(digest, str) and _SHA256.match(digest)):
        raise ValueError(f"sha256 of {name!r:.80} is not 64 hexadecimal digits")
    if type(size) is not int or size < 0:
        raise ValueError(f"size of {name!r:.80} is not a number of bytes")


def _list_files(folder: Path) -> set[str]:
    """Names, relative and with "/", of all files below `folder` that a manifest lists.

    Raises:
      ValueError: something that is neither a file nor a folder, such as a symbolic link.
    """
    names = set()
    stack = [(folder, "")]
    while stack:
        directory, prefix = stack.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    stack.append((Path(entry.path), name + "/"))
                elif not entry.is_file(follow_symlinks=False):
                    raise ValueError(f"{name}: neither a file nor a folder")
                elif name not in UNLISTED_NAMES:
                    names.add(name)
    return names
