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

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.names import DTYPES
from mobilellm_jax.storage.untrusted import (
    MAX_JSON_BYTES,
    read_json,
    refuse_lfs_pointer,
    safe_child,
    strict_json,
)

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
    """The tensors of the weight files of a folder, by lazy reading; use it in a `with` statement.

    This one reads safetensors files; a subclass reads another format.

    Attributes:
      shapes: of each tensor. Opening reads no more than that.
    """

    SINGLE_FILE = "model.safetensors"

    def __init__(self, folder: Path):
        """Raises UserError for missing, damaged, ambiguous or unsupported files."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple[Path, Any, str]] = {}  # the last is the name in the file
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._stack.close)
            index = _find_files(folder, self.SINGLE_FILE)
            for file in sorted(set(index.values())) if index else [self.SINGLE_FILE]:
                path = safe_child(folder, file)
                opened, shapes = self._open(path)
                for name, shape in shapes.items():
                    if name in self._files:
                        raise UserError(f"{path}: tensor {name} is also in {self.path(name)}")
                    self._files[name] = path, opened, name
                    self.shapes[name] = shape
            if index is not None:
                _check_index(folder / index_name(self.SINGLE_FILE), index, self._files)
            on_error.pop_all()

    def __exit__(self, *_) -> None:
        self._stack.close()

    @classmethod
    def are_in(cls, folder: Path) -> bool:
        """Whether the folder has files of this format."""
        return any((folder / n).exists() for n in (cls.SINGLE_FILE, index_name(cls.SINGLE_FILE)))

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._files[name][0]

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name."""
        self.shapes[new], self._files[new] = self.shapes.pop(old), self._files.pop(old)

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as a new contiguous fp32 array; UserError if any value is not finite."""
        path, opened, stored_name = self._files[name]
        array = np.ascontiguousarray(self._read(path, opened, stored_name), dtype=np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {stored_name} contains NaN or infinity")
        return array

    def _open(self, path: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
        """What `_read` takes, and the shapes of the tensors in it."""
        _check_unique_names(path)
        try:
            file = self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            described = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); get it again"
            ) from error
        for name, (code, _) in described.items():
            if code not in _CODES.values():
                raise UserError(
                    f"{path}: tensor {name} has dtype {code}: only {', '.join(_CODES.values())} "
                    "are read; use weights that are not quantised"
                )
        return file, {name: shape for name, (_, shape) in described.items()}

    def _read(self, path: Path, opened: Any, name: str) -> np.ndarray:
        try:
            return opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, cannot read {name} ({error})") from error


def index_name(single_file: str) -> str:
    """The file that says where the tensors are when one file became several."""
    return f"{single_file}.index.json"


def _check_unique_names(path: Path) -> None:
    """The library accepts a header that describes a tensor twice and takes the last one."""
    try:
        with open(path, "rb") as file:
            refuse_lfs_pointer(path, file.read(100))
            file.seek(0)
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


def _find_files(folder: Path, single_file: str) -> dict[str, str] | None:
    """The index {tensor: file} of a sharded model; None where there is one file."""
    single = (folder / single_file).exists()
    index_path = safe_child(folder, index_name(single_file))
    if not index_path.exists():
        if single:
            return None
        raise UserError(f"{folder}: has neither {single_file} nor {index_path.name}")
    index = read_json(index_path).get("weight_map")
    if not (isinstance(index, dict) and index):
        raise UserError(f"{index_path}: has no weight_map")
    suffix = Path(single_file).suffix
    for name, file in index.items():
        if not (isinstance(file, str) and file.endswith(suffix)):
            raise UserError(f"{index_path}: {name:.120} is in {file!r:.120}, no {suffix} file")
    if single and single_file not in index.values():
        raise UserError(
            f"{folder}: has {single_file} and {index_path.name}, which does not name it; "
            "remove the one that is out of date"
        )
    return index


def _check_index(
    index_path: Path, index: Mapping[str, str], files: Mapping[str, tuple[Path, Any, str]]
) -> None:
    found = {name: path.name for name, (path, *_) in files.items()}
    for name in sorted(index.keys() | found.keys()):
        if index.get(name) != found.get(name):
            raise UserError(
                f"{index_path}: puts tensor {name:.120} in {index.get(name)}, it is in "
                f"{found.get(name)}"
            )
