"""The JAX model against an independent NumPy model, executed in every way."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from model_cases import ALL_KINDS, random_params, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.attention import apply_rope, rope_tables
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.model.layers import RMSNorm
from mobilellm_jax.model.transformer import MobileLLM, init_params

LOGITS_ATOL = 2e-5  # fp32 against float64, logits of order 1 to 10
SAME_MATHS_ATOL = 1e-5  # two orders of the same fp32 operations
BFLOAT16_RTOL = 2**-8 * 1.001  # one rounding, of a result in fp32
ROPE_ATOL = 1e-4  # fp32 angles up to 300

TOKENS = np.random.default_rng(0).integers(0, 53, (2, 11))
kinds = pytest.mark.parametrize("config", ALL_KINDS.values(), ids=ALL_KINDS)
FEW = ["immediate-x2-own", "reverse-x3-first_visit"]
few_kinds = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, config in ALL_KINDS.items()
    ],
)


def logits_of(config, params, segments=None, execution=Execution()):
    return jax.jit(MobileLLM(config, execution).apply)({"params": params}, TOKENS, segments)


@kinds
def test_logits_equal_the_reference(config):
    params = random_params(config)
    logits = logits_of(config, params)
    chex.assert_shape(logits, (2, 11, config.vocab_size))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits, reference.forward(config, params, TOKENS), atol=LOGITS_ATOL, rtol=LOGITS_ATOL
    )


def test_segments_confine_attention_to_a_document():
    config = tiny("immediate", 2)
    params = random_params(config)
    segments = np.array([[1] * 4 + [2] * 7, [1] * 1 + [2] * 5 + [3] * 5])
    logits = logits_of(config, params, segments)
    expected = reference.forward(config, params, TOKENS, segments)
    np.testing.assert_allclose(logits, expected, atol=LOGITS_ATOL, rtol=LOGITS_ATOL)
    # Rotary positions are relative: a document alone gives the same as inside a record.
    alone = MobileLLM(config).apply({"params": params}, TOKENS[:1, 4:])
    np.testing.assert_allclose(logits[:1, 4:], alone, atol=LOGITS_ATOL, rtol=LOGITS_ATOL)


@few_kinds
def test_execution_changes_neither_logits_nor_gradients(config):
    params = random_params(config)

    def loss(params, execution):
        logits = MobileLLM(config, execution).apply({"params": params}, TOKENS)
        return jax.nn.logsumexp(logits, axis=-1).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = value_and_grad(params, Execution())
    for execution in (
        Execution(remat="none"),
        Execution(remat="none", unroll_layers=True),
        Execution(remat="full"),
        Execution(remat="dots", unroll_layers=True),
    ):
        actual = value_and_grad(params, execution)
        chex.assert_trees_all_close(actual, expected, atol=SAME_MATHS_ATOL)


@few_kinds
def test_gradient_equals_finite_differences_of_the_reference(config):
    """Along one random direction: shared blocks collect the gradients of all their visits."""
    params = random_params(config)
    direction = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape) / 10, params
    )
    weights = np.random.default_rng(1).normal(size=(2, 11, config.vocab_size))

    @jax.jit
    def loss(params):
        return (logits_of(config, params) * weights).sum()

    def moved(step):
        params64 = jax.tree.map(
            lambda p, d: np.asarray(p, np.float64) + step * np.asarray(d, np.float64),
            params,
            direction,
        )
        return (reference.forward(config, params64, TOKENS) * weights).sum()

    numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
    slope = sum(
        (np.asarray(g, np.float64) * np.asarray(d, np.float64)).sum()
        for g, d in zip(
            jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(direction), strict=True
        )
    )
    np.testing.assert_allclose(slope, numeric, rtol=1e-3)


def test_shared_weights_exist_once():
    single, shared = tiny(), tiny("reverse", 3)
    chex.assert_trees_all_equal_shapes(
        random_params(single),
        random_params(shared),
        random_params(tiny("immediate", 2, "first_visit")),
    )


def test_blocks_differ_after_initialisation_and_have_the_stated_spread():
    config = tiny(num_layers=4, embed_dim=64, ffn_dim=256, init_std=0.02, tie_embeddings=False)
    params = init_params(config, jax.random.key(0))
    up = np.asarray(params["blocks"]["ffn"]["up"])
    assert all(not np.array_equal(up[0], up[i]) for i in range(1, 4))
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.02, rtol=0.05)
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.05, err_msg=str(path))


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_computes_in_bfloat16_and_returns_fp32_logits(tied):
    config = tiny(tie_embeddings=tied)
    params = random_params(config)
    hidden = MobileLLM(config, Execution(dtype="bfloat16")).apply(
        {"params": params}, TOKENS, method="hidden_states"
    )
    assert hidden.dtype == jnp.bfloat16
    logits = MobileLLM(config, Execution(dtype="bfloat16")).apply({"params": params}, TOKENS)
    assert logits.dtype == jnp.float32
    exact = MobileLLM(config).apply({"params": params}, TOKENS)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_norms_of_bfloat16_are_computed_in_fp32():
    """One rounding, at the end."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 50, 64)) * 3, jnp.bfloat16)
    scale = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    normed = RMSNorm(1e-5).apply({"params": {"scale": scale}}, x)
    assert normed.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=BFLOAT16_RTOL)


def test_positions_of_bfloat16_are_turned_in_fp32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 300, 2, 8)), jnp.bfloat16)
    turned = apply_rope(x, rope_tables(jnp.arange(300)[None], 8, 1e4))
    assert turned.dtype == jnp.bfloat16
    exact = reference._rotate(np.asarray(x, np.float64)[0], 1e4)
    np.testing.assert_allclose(
        np.asarray(turned, np.float64)[0], exact, rtol=BFLOAT16_RTOL, atol=ROPE_ATOL
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "execution.dtype = 'float16'"),
        ({"remat": "some"}, "execution.remat = 'some'"),
        ({"attention": "flash"}, "execution.attention = 'flash'"),
    ],
)
def test_unknown_execution_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Execution(**changes)


def test_dots_keeps_the_results_of_the_weight_products():
    """Recomputing them too, as "full" does, is one matmul more for each weight."""
    config, tokens = tiny(), np.zeros((2, 16), np.int32)

    def products(remat):
        model = MobileLLM(config, Execution(remat=remat))

        def loss(params):
            return model.apply({"params": params}, tokens, method="hidden_states").sum()

        return str(jax.make_jaxpr(jax.grad(loss))(random_params(config))).count("dot_general")

    assert products("none") <= products("dots") < products("full") - 3
    # Scores, and values weighted by them: once in a block of queries.
    assert products("attention") == products("full") - 2


def test_recomputation_is_kept_apart_where_no_loop_does_it():
    """XLA would merge it with what it repeats, and keep the memory that it is to save."""
    config, tokens = tiny(num_layers=2), np.zeros((1, 4), np.int32)

    def barriers(**execution):
        def loss(params):
            return MobileLLM(config, Execution(**execution)).apply({"params": params}, tokens).sum()

        program = jax.jit(jax.grad(loss)).lower(random_params(config)).as_text()
        return program.count("optimization_barrier")

    assert barriers(remat="full", unroll_layers=True) >= config.num_layers
    assert barriers(remat="none", unroll_layers=True) == barriers(remat="full") == 0
