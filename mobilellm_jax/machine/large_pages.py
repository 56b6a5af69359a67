"""Memory in pages of 2 MB, for training on a CPU under Linux."""

import contextlib
import os
import signal
import sys

from mobilellm_jax import interrupts

_NAME, _VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def run_with_large_pages() -> None:
    """Starts this process's command again, in this process, with glibc asking for large pages.

    XLA on CPU allocates temporaries anew each step, page by page: in pages of 2 MB a step takes
    0.83 to 0.96 of its time (docs/cpu_step.md). glibc reads the setting only when a process starts.
    Where GLIBC_TUNABLES is set already, as in the process started again, nothing happens.
    """
    if sys.platform == "linux" and _NAME not in os.environ:
        os.environ[_NAME] = _VALUE
        with (
            contextlib.suppress(OSError),  # an embedded interpreter cannot be started again
            interrupts.blocked(
                signal.SIGINT, signal.SIGTERM
            ),  # the process started again takes them
        ):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
