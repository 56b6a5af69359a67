"""Weight files in the safetensors format: written as a stream, read with suspicion.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header
(little endian), the header {name: {dtype, shape, data_offsets}}, then the raw arrays. The library
writes only from arrays that all lie in memory at once, which for expanded layers is several times
the model; hence our own writer.
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mobilellm_jax.conversion.folders import MAX_JSON_BYTES, inside, read_json, strict_json
from mobilellm_jax.conversion.huggingface.names import DTYPES
from mobilellm_jax.errors import UserError

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes one file; `arrays` come one by one, in the order of `shapes`, and are not kept.

    Raises:
      OSError: the disk is full.
    """
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape and array.dtype == DTYPES[dtype], name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class WeightFiles(contextlib.AbstractContextManager):
    """The tensors of the safetensors files of a folder; use it in a `with` statement.

    `shapes` has the shape of each tensor. Opening reads headers only.
    """

    def __init__(self, folder: Path):
        """Raises UserError for missing, damaged, ambiguous or unsupported files."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._stack.close)
            index = _find_files(folder)
            for name in sorted(set(index.values())) if index else ["model.safetensors"]:
                self._open(inside(folder, name))
            _check_index(folder, index, {k: path.name for k, (path, _) in self._files.items()})
            on_error.pop_all()

    def __exit__(self, *_) -> None:
        self._stack.close()

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._files[name][0]

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as a new contiguous fp32 array; UserError if any value is not finite."""
        path, file = self._files[name]
        try:
            array = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, cannot read {name} ({error})") from error
        array = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {name} contains NaN or infinity")
        return array

    def _open(self, path: Path) -> None:
        _check_unique_names(path)
        try:
            file = self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            described = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); get it again"
            ) from error
        for name, (code, shape) in described.items():
            if code not in _CODES.values():
                raise UserError(
                    f"{path}: tensor {name} has dtype {code}: only {', '.join(_CODES.values())} "
                    "are read; use weights that are not quantised"
                )
            if name in self._files:
                raise UserError(f"{path}: tensor {name} is also in {self.path(name)}")
            self._files[name] = path, file
            self.shapes[name] = shape


def _check_unique_names(path: Path) -> None:
    """The library accepts a header that describes a tensor twice and takes the last one."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise UserError(f"{path}: damaged, its header would have {length} bytes")
            header = file.read(length)
        strict_json(header)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged safetensors header ({str(error)[:200]})") from error


def _find_files(folder: Path) -> dict[str, str] | None:
    """The index {tensor: file} of a sharded model; None where there is one file."""
    single = (folder / "model.safetensors").exists()
    index_path = inside(folder, "model.safetensors.index.json")
    if not index_path.exists():
        if single:
            return None
        if pickles := sorted(p.name for p in folder.glob("*.bin")):
            raise UserError(
                f"{folder}: has only {pickles[0]}, a pickle, which is not read because it can run "
                "code; convert it to model.safetensors first"
            )
        raise UserError(f"{folder}: has neither model.safetensors nor {index_path.name}")
    index = read_json(index_path).get("weight_map")
    if not (isinstance(index, dict) and index):
        raise UserError(f"{index_path}: has no weight_map")
    for name, file in index.items():
        if not (isinstance(file, str) and file.endswith(".safetensors")):
            raise UserError(f"{index_path}: {name:.120} is in {file!r:.120}, no safetensors file")
    if single and "model.safetensors" not in index.values():
        raise UserError(
            f"{folder}: has model.safetensors and {index_path.name}, which does not name it; "
            "remove the one that is out of date"
        )
    return index


def _check_index(folder: Path, index: dict[str, str] | None, found: Mapping[str, str]) -> None:
    if index is None:
        return
    for name in sorted(index.keys() | found.keys()):
        if index.get(name) != found.get(name):
            raise UserError(
                f"{folder}: model.safetensors.index.json puts tensor {name:.120} in "
                f"{index.get(name)}, it is in {found.get(name)}"
            )
