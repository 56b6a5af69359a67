"""AdamW and schedules against their formulas."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.training.optimizer import decayed_params, learning_rate_schedule, make_optimizer
from mobilellm_jax.training.run_config import default_config

RTOL = 1e-5


def settings(**changes):
    config = default_config().optimizer
    config.update(peak_lr=1e-2, warmup_steps=10, **changes)
    return config


def test_cosine_warms_up_from_zero_and_ends_at_a_tenth():
    rate = learning_rate_schedule(settings(), 110)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(5), 5e-3, rtol=RTOL)
    np.testing.assert_allclose(rate(10), 1e-2, rtol=RTOL)
    halfway = 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi / 2)) / 2
    np.testing.assert_allclose(rate(60), halfway, rtol=RTOL)
    np.testing.assert_allclose([rate(110), rate(500)], 1e-3, rtol=RTOL)


def test_wsd_is_constant_between_warmup_and_decay():
    rate = learning_rate_schedule(settings(schedule="wsd", decay_fraction=0.2), 100)
    np.testing.assert_allclose([rate(10), rate(50), rate(80)], 1e-2, rtol=RTOL)
    np.testing.assert_allclose(rate(90), (1e-2 + 1e-3) / 2, rtol=RTOL)
    np.testing.assert_allclose([rate(100), rate(200)], 1e-3, rtol=RTOL)


def test_wsd_decays_after_a_warmup_that_reaches_into_the_decay():
    rate = learning_rate_schedule(settings(schedule="wsd", decay_fraction=0.8), 20)
    np.testing.assert_allclose([rate(5), rate(10)], [5e-3, 1e-2], rtol=RTOL)
    np.testing.assert_allclose([rate(15), rate(20)], [(1e-2 + 1e-3) / 2, 1e-3], rtol=RTOL)


def test_bad_schedules_are_refused():
    with pytest.raises(UserError, match="schedule = 'linear': use one of cosine, wsd"):
        learning_rate_schedule(settings(schedule="linear"), 100)
    with pytest.raises(UserError, match="warmup_steps = 10 leaves nothing of .*num_steps = 10"):
        learning_rate_schedule(settings(), 10)


def test_only_a_gradient_above_the_norm_is_scaled():
    """By the first update, -rate * g / (|g| + epsilon), in which a large epsilon shows the size."""
    config = settings(clip_norm=1.0, epsilon=1.0, weight_decay=0.0)
    config.warmup_steps = 0
    optimizer = make_optimizer(config, learning_rate_schedule(config, 100))
    params = {"up": jnp.zeros(2)}
    for grad, clipped in (([0.3, -0.4], [0.3, -0.4]), ([3.0, -4.0], [0.6, -0.8])):
        grads = {"up": jnp.array(grad)}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        expected = [-1e-2 * g / (abs(g) + 1) for g in clipped]
        np.testing.assert_allclose(updates["up"], expected, rtol=RTOL)


def test_updates_equal_adamw_written_out():
    config = settings(weight_decay=0.3, clip_norm=0.5)
    rate = learning_rate_schedule(config, 110)
    optimizer = make_optimizer(config, rate)
    rng = np.random.default_rng(0)
    params = {"up": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "n": {"scale": jnp.ones(4)}}
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    first = jax.tree.map(np.zeros_like, expected)
    second = jax.tree.map(np.zeros_like, expected)
    state = optimizer.init(params)
    for step in range(15):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)

        squares = sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
        scale = min(1, 0.5 / math.sqrt(squares))
        clipped = jax.tree.map(functools.partial(np.multiply, scale), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, clipped)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, clipped)
        for path, decay in ((("up",), 0.3), (("n", "scale"), 0.0)):
            p, m, v = expected, first, second
            for key in path[:-1]:
                p, m, v = p[key], m[key], v[key]
            key = path[-1]
            m_hat = m[key] / (1 - 0.9 ** (step + 1))
            v_hat = v[key] / (1 - 0.95 ** (step + 1))
            p[key] = p[key] - float(rate(step)) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p[key])
    chex.assert_trees_all_close(params, jax.tree.map(np.float32, expected), rtol=1e-4)


def test_decay_covers_everything_but_the_norms():
    params = init_params(tiny(tie_embeddings=False), jax.random.key(0))
    flat = {
        "/".join(key.key for key in path): decays
        for path, decays in jax.tree.leaves_with_path(decayed_params(params))
    }
    assert sorted(name for name, decays in flat.items() if not decays) == [
        "blocks/attention_norm/scale",
        "blocks/ffn_norm/scale",
        "final_norm/scale",
    ]
    assert len(flat) == 12
