"""The sliced cross-entropy against the plain one, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_cases import tiny

from mobilellm_jax.objectives import cross_entropy as loss
from mobilellm_jax.objectives.cross_entropy import num_slices
from mobilellm_jax.objectives.embedding_gradient import BatchShards, sharded_grad_table
from mobilellm_jax.training import sharding
from mobilellm_jax.training.run_config import default_config

RTOL = 1e-5
B, T, D, V = 2, 12, 16, 37
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)))
WEIGHTS = jnp.asarray(RNG.random((B, T)) * (RNG.random((B, T)) > 0.3), jnp.float32)


def cross_entropy_sum(hidden, head_VD, targets, weights, slices, shards=BatchShards()):
    table = sharded_grad_table(head_VD, hidden.dtype, shards)
    return loss.cross_entropy_sum(hidden, table, targets, weights, slices)


def plain_loss(hidden, head):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    of_target = np.take_along_axis(logits, np.asarray(TARGETS)[..., None], -1)[..., 0]
    return ((np.log(np.exp(logits).sum(-1)) - of_target) * np.asarray(WEIGHTS)).sum()


@pytest.mark.parametrize("slices", [1, 3, 12])
def test_value_equals_the_plain_cross_entropy(slices):
    value = cross_entropy_sum(HIDDEN, HEAD, TARGETS, WEIGHTS, slices)
    np.testing.assert_allclose(value, plain_loss(HIDDEN, HEAD), rtol=RTOL)


@pytest.mark.parametrize("slices", [1, 3, 12])
def test_gradients_equal_those_of_the_plain_cross_entropy(slices):
    def plain(hidden, head):
        log_probs = jax.nn.log_softmax(hidden @ head.T)
        of_target = jnp.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0]
        return -0.5 * (of_target * WEIGHTS).sum()

    def sliced(hidden, head):
        return 0.5 * cross_entropy_sum(hidden, head, TARGETS, WEIGHTS, slices)

    expected = jax.grad(plain, (0, 1))(HIDDEN, HEAD)
    for actual, wanted in zip(jax.grad(sliced, (0, 1))(HIDDEN, HEAD), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=RTOL, atol=RTOL)


def test_tokens_of_weight_zero_leave_no_trace():
    other_targets = jnp.where(WEIGHTS == 0, (TARGETS + 1) % V, TARGETS)
    grad = jax.grad(cross_entropy_sum, (0, 1))
    for a, b in zip(
        grad(HIDDEN, HEAD, TARGETS, WEIGHTS, 3),
        grad(HIDDEN, HEAD, other_targets, WEIGHTS, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_inputs_are_accumulated_in_fp32():
    """Many equal small terms: a bf16 sum would stop growing at 256 terms."""
    hidden = jnp.zeros((4, 1024, 8), jnp.bfloat16)
    head = jnp.zeros((4, 8), jnp.bfloat16)
    targets, weights = jnp.zeros((4, 1024), jnp.int32), jnp.ones((4, 1024))
    value = cross_entropy_sum(hidden, head, targets, weights, 1024)
    np.testing.assert_allclose(value, 4096 * np.log(4), rtol=1e-4)


def test_bfloat16_inputs_have_fp32_logits():
    hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    value = cross_entropy_sum(hidden, head.astype(jnp.float32), TARGETS, WEIGHTS, 3)
    np.testing.assert_allclose(value, plain_loss(hidden, head), rtol=RTOL)


def test_bfloat16_inputs_have_an_fp32_gradient_of_the_head():
    """Equal logits, whose softmax has no rounding; the sum has more digits than bfloat16."""
    hidden = jnp.asarray(RNG.normal(size=(2, 512, 8)) + 1, jnp.bfloat16)
    targets, weights = jnp.asarray(RNG.integers(0, 4, (2, 512))), jnp.ones((2, 512))
    gradient = jax.grad(cross_entropy_sum, 1)(hidden, jnp.zeros((4, 8)), targets, weights, 2)
    d_logits = 1 / 4 - np.eye(4)[targets]
    expected = np.einsum("btd,btv->vd", np.asarray(hidden, np.float64), d_logits)
    np.testing.assert_allclose(gradient, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())


def test_logits_of_all_tokens_never_exist():
    """At a size where they would not fit the budget, no array of B x T x V is in the program."""
    batch, length, vocab = 8, 2048, 32_000
    slices = num_slices(batch, length, vocab, 1)
    program = (
        jax.jit(jax.grad(cross_entropy_sum, (0, 1)), static_argnums=4)
        .lower(
            jax.ShapeDtypeStruct((batch, length, 8), jnp.float32),
            jax.ShapeDtypeStruct((vocab, 8), jnp.float32),
            jax.ShapeDtypeStruct((batch, length), jnp.int32),
            jax.ShapeDtypeStruct((batch, length), jnp.float32),
            slices,
        )
        .compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 2


def test_number_of_slices_divides_and_fits():
    assert num_slices(2, 512, 32_000, 1) == 1
    slices = num_slices(64, 2048, 32_000, 1)
    assert 2048 % slices == 0 and 64 * 2048 // slices * 32_000 <= 64 * 1024 * 1024
    assert num_slices(1024, 2048, 32_000, 16) == slices  # 64 rows on each device
    assert num_slices(1_000_000, 7, 32_000, 1) == 7


def test_slices_of_a_sharded_batch_do_not_each_reduce_the_head_gradient(devices):
    """The all-reduce over the batch's parts is outside of the loop over the slices."""
    settings = default_config().mesh
    settings.data, settings.fsdp = 8, 1
    mesh = sharding.make_mesh(settings, tiny())
    rows = jax.NamedSharding(mesh, P("data"))
    shards = sharding.batch_shards(mesh)
    with sharding.on_mesh(mesh):
        step = jax.jit(
            jax.grad(cross_entropy_sum, (0, 1)),
            static_argnums=(4, 5),
            in_shardings=(rows, sharding.replicated(mesh), rows, rows),
            out_shardings=(rows, sharding.replicated(mesh)),
        )
        args = [np.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in (HIDDEN, TARGETS, WEIGHTS)]
        compiled = step.lower(args[0], HEAD, *args[1:], 4, shards).compile()
        grads = step(args[0], HEAD, *args[1:], 4, shards)
    loops = set(re.findall(r"body=%?([\w.]+)", compiled.as_text()))
    assert loops
    computations = re.split(r"\n(?=%|ENTRY)", compiled.as_text())
    in_loops = [c for c in computations if c.lstrip("%").split(" ")[0] in loops]
    assert in_loops and not any("all-reduce" in c for c in in_loops)
    assert any("all-reduce" in c for c in computations)
    expected = jax.grad(cross_entropy_sum, 1)(args[0], HEAD, *args[1:], 1)
    np.testing.assert_allclose(grads[1], expected, rtol=1e-4, atol=1e-4)
