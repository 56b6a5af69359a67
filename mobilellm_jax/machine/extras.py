"""Optional packages: imported when they are needed, named with their extra if absent."""

import importlib
import logging
import os
from types import ModuleType

from mobilellm_jax.errors import UserError

# They warn, when they are imported, of kernels for GPUs and of their own deprecations.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def import_extra(name: str, extra: str) -> ModuleType:
    """Module `name`; UserError with the command that installs it if it is not there."""
    # torch's threads wait for each other at every operation. By default they spin, and where the
    # cores are busy with anything else, decoding takes thirty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for logger in _NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} is not installed: pip install 'mobilellm_jax[{extra}]' (in a checkout: "
            f"pip install -e '.[{extra}]')"
        ) from error
