"""Compiled programs are kept from one run to the next: JAX's persistent compilation cache."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps what takes JAX more than a second to compile, where a user's caches belong.

    `$XDG_CACHE_HOME/mobilellm_jax/compiled`, or `~/.cache/...`; JAX_COMPILATION_CACHE_DIR names
    another folder, JAX_ENABLE_COMPILATION_CACHE=false does without. A program is found again by its
    code, the devices and the versions of JAX and XLA; deleting the folder costs time only. See
    docs.jax.dev/en/latest/persistent_compilation_cache.html.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "mobilellm_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
