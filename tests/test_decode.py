"""Prefill and cached decoding against the full forward pass."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import ALL_KINDS, random_params

from mobilellm_jax.model.costs import kv_cache_bytes_per_token
from mobilellm_jax.model.decoding import decode, decode_weights, make_cache
from mobilellm_jax.model.transformer import MobileLLM

ATOL = 2e-5  # fp32, two orders of the same operations, logits of order 1 to 10
CAPACITY = 16
LENGTHS = (7, 1, 4)

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 53, (3, CAPACITY)))
kinds = pytest.mark.parametrize("config", ALL_KINDS.values(), ids=ALL_KINDS)


@functools.partial(jax.jit, static_argnames=("config", "method", "capacity"))
def run(config, params, method, tokens, *args, **capacity):
    model = MobileLLM(config)
    if method == "prefill":
        hidden, fresh = model.apply({"params": params}, tokens, method="prefill")
        cache = make_cache(config, fresh, *args, **capacity)
    else:
        weights = decode_weights(params, "float32", num_rows=tokens.shape[0])
        hidden, cache = decode(config, weights, tokens, *args)
    return model.apply({"params": params}, hidden, method="logits"), cache


@functools.cache
def full_logits(config):
    return jax.jit(MobileLLM(config).apply)({"params": random_params(config)}, TOKENS)


@kinds
def test_prefill_and_decode_equal_the_full_pass_at_every_position(config):
    params = random_params(config)
    full = full_logits(config)
    lengths = jnp.array(LENGTHS)
    # What stands behind a prompt must not matter: it is not even a valid token here.
    prompts = jnp.where(jnp.arange(8)[None, :] < lengths[:, None], TOKENS[:, :8], -1)
    logits, cache = run(config, params, "prefill", prompts, lengths, capacity=CAPACITY)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=ATOL)
    rows = jnp.arange(3)
    for _ in range(CAPACITY - max(LENGTHS)):
        position = cache.lengths
        logits, cache = run(config, params, "decode", TOKENS[rows, position][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], full[rows, position], atol=ATOL)
    chex.assert_trees_all_equal(cache.lengths, lengths + CAPACITY - max(LENGTHS))


@kinds
def test_decoding_several_tokens_of_one_row_equals_the_full_pass(config):
    params = random_params(config)
    full = full_logits(config)[:1]
    tokens = TOKENS[:1]
    _, cache = run(config, params, "prefill", tokens[:, :5], jnp.full(1, 5), capacity=CAPACITY)
    logits, cache = run(config, params, "decode", tokens[:, 5:9], cache)
    np.testing.assert_allclose(logits, full[:, 5:9], atol=ATOL)
    logits, _ = run(config, params, "decode", tokens[:, 9:], cache)
    np.testing.assert_allclose(logits, full[:, 9:], atol=ATOL)


def test_weights_for_one_row_serve_several():
    config = ALL_KINDS["none-x1-own"]
    params = random_params(config)
    _, cache = run(config, params, "prefill", TOKENS[:, :5], jnp.full(3, 5), capacity=CAPACITY)
    step = jax.jit(functools.partial(decode, config))
    hidden = [
        step(decode_weights(params, "float32", num_rows=rows), TOKENS[:, 5:6], cache)[0]
        for rows in (1, 3)
    ]
    np.testing.assert_allclose(*hidden, atol=ATOL)


@kinds
def test_cache_has_the_size_that_the_config_says(config):
    params = random_params(config)
    _, cache = run(config, params, "prefill", TOKENS[:, :5], jnp.full(3, 5), capacity=CAPACITY)
    assert cache.capacity == CAPACITY
    held = sum(array.nbytes for array in (*cache.keys, *cache.values))
    assert held == 3 * CAPACITY * kv_cache_bytes_per_token(config, bytes_per_value=4)


def test_a_decode_step_reads_weights_and_cache_where_they_lie():
    config = ALL_KINDS["none-x1-own"]
    weights = decode_weights(random_params(config), "float32", num_rows=1)
    _, cache = run(config, random_params(config), "prefill", TOKENS[:1, :5], 5, capacity=64)
    cache = cache._replace(lengths=jnp.full(1, 5))
    step = jax.jit(functools.partial(decode, config), donate_argnums=2)
    compiled = step.lower(weights, TOKENS[:1, :1], cache).compile()
    donated = jax.tree.leaves(cache)
    assert compiled.memory_analysis().alias_size_in_bytes == sum(a.nbytes for a in donated)
    copied = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:copy|transpose|dynamic-slice)\(", compiled.as_text()
    )
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in copied]
    assert max(sizes, default=0) <= config.embed_dim
