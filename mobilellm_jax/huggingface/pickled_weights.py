"""Weight files in PyTorch's own format (`.bin`), read without running what is in them.

Such a file is a zip archive of raw arrays with a pickle that describes them, and a pickle can run
code. PyTorch's weights-only loader, an unpickler that knows tensors and nothing else, refuses what
would (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.safetensors_io import WeightFiles
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.storage.untrusted import refuse_lfs_pointer

_FIRST_SAFE = (2, 6)  # before, the weights-only loader could be made to run code (CVE-2025-32434)


class PickledWeightFiles(WeightFiles):
    """The tensors of the `.bin` files of a folder: mapped from disk, not held in memory."""

    SINGLE_FILE = "pytorch_model.bin"

    def _open(self, path: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
        try:
            torch = import_extra("torch", "torch")
        except UserError as error:
            raise UserError(f"{path}: is read by PyTorch, but {error}") from error
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < _FIRST_SAFE:
            raise UserError(
                f"{path}: is not opened by torch {torch.__version__}, whose weights-only loader "
                "can be made to run code; install a newer torch"
            )
        try:
            with open(path, "rb") as file:
                refuse_lfs_pointer(path, file.read(100))
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UserError:
            raise
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: is refused because it asks for code to be run, or is damaged "
                f"({_first_line(error)}); convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # a damaged pickle can make the loader raise anything
            raise UserError(
                f"{path}: cannot be read as PyTorch weights ({_first_line(error)}); get it again"
            ) from error
        if not (isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)):
            raise UserError(f"{path}: holds {type(tensors).__name__}, not tensors by name")
        for name, tensor in tensors.items():
            _check_tensor(torch, path, name, tensor)
        return tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def _read(self, path: Path, opened: Any, name: str) -> np.ndarray:
        return opened[name].float().numpy(force=True)  # a view may stand for its negative


def _check_tensor(torch, path: Path, name: str, tensor: Any) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UserError(f"{path}: {name:.120} is a {type(tensor).__name__}, not a tensor")
    if tensor.device.type != "cpu":
        raise UserError(
            f"{path}: tensor {name:.120} has no values (device {tensor.device}); get it again"
        )
    if tensor.dtype not in kinds or tensor.layout is not torch.strided:
        raise UserError(
            f"{path}: tensor {name:.120} has dtype {tensor.dtype} ({tensor.layout}): only "
            f"{', '.join(map(str, kinds))} are read; use weights that are not quantised"
        )
    # A stride of 0 makes a tensor of any size out of one number.
    if tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise UserError(f"{path}: tensor {name:.120} is larger than the file; get it again")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
