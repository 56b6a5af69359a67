"""Reading files of unknown origin: paths that stay in their folder, JSON that means one thing."""

import json
import os
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import UserError

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors has for its header


def safe_child(folder: Path, name: str) -> Path:
    """The path of file `name` directly in `folder`; UserError if it leads anywhere else.

    A link of the Hugging Face cache, snapshots/<revision>/<name> -> blobs/<hash>, is followed.
    """
    path = folder / name
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{folder}: refuses the file name {name!r:.120}, which leaves the folder")
    real, home = (Path(os.path.realpath(p)) for p in (path, folder))  # survives cyclic links
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
        content = path.read_bytes()
        refuse_lfs_pointer(path, content)
        values = strict_json(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON ({str(error)[:200]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def refuse_lfs_pointer(path: str | Path, content: bytes) -> None:
    """Raises UserError for what lies in the place of a large file cloned without Git LFS.

    Args:
      path: the file, for the message.
      content: its beginning, or all of it.
    """
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(
            f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull where it was "
            "cloned, or download the file"
        )


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
    """A value as indented JSON with sorted keys and a final line end."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
