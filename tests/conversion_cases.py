"""What the JAX model says of the small models of every kind, computed once for all tests."""

import functools

import numpy as np
import pytest
from model_cases import ALL_KINDS, random_params

from mobilellm_jax.model.transformer import MobileLLM

EVERY_KIND = pytest.mark.parametrize("kind", list(ALL_KINDS))
TOKENS = np.random.default_rng(0).integers(0, 53, (3, 17))


@functools.cache
def jax_logits(kind: str) -> np.ndarray:
    """`[B, T, V]` of TOKENS."""
    config = ALL_KINDS[kind]
    return np.asarray(MobileLLM(config).apply({"params": random_params(config)}, TOKENS))


def assert_same_logits(ours: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))
