"""All tests see eight CPU devices and strict array shapes."""

import os
import signal
import tempfile

import jax
import pytest

# Torch's threads shall not spin while XLA's or another process's work; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# transformers copies the code of compact folders to a place of its own: here, not the user's.
_HF_MODULES = tempfile.TemporaryDirectory(prefix="hf_modules_")
os.environ["HF_MODULES_CACHE"] = _HF_MODULES.name
# So does JAX with compiled programs.
_CACHES = tempfile.TemporaryDirectory(prefix="caches_")
os.environ["XDG_CACHE_HOME"] = _CACHES.name
# JAX_PLATFORMS=cpu,cuda lets the tests of cuDNN's attention run where there is a GPU.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes most of the time. Training as a process, in test_train.py, is fully optimised.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def devices():
    """The eight CPU devices."""
    assert jax.device_count() == 8
    return jax.devices()


@pytest.fixture
def as_in_a_terminal():
    """SIGINT acts, here and in processes that a test starts: it is ignored in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
