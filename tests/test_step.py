"""The training step: accumulation, token weights, precision, sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import random_params, tiny

from mobilellm_jax.model.execution import Execution, cast_for_compute
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.objectives import cross_entropy
from mobilellm_jax.objectives.next_token import loss_sum, make_eval_step
from mobilellm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.training.run_config import default_config
from mobilellm_jax.training.step import TrainState, all_finite, make_train_step, split_batch

ATOL = 2e-6  # fp32, sums taken in another order
CONFIG = tiny("immediate", 2, vocab_size=56)  # an even number, to be split over `tensor`
B, T = 8, 12


def make_batch(config=CONFIG):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    weights = (rng.random((B, T)) > 0.4).astype(np.float32)
    weights[0] = 0  # rows of very different numbers of tokens
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": segments,
        "text_weights": weights * (tokens[:, 1:] % 3 > 0),  # these two: of evaluation
        "target_bytes": tokens[:, 1:] % 5,
    }


def optimizer_and_schedule():
    settings = default_config().optimizer
    settings.update(peak_lr=1e-2, warmup_steps=1)
    schedule = learning_rate_schedule(settings, 10)
    return make_optimizer(settings, schedule), schedule


def make_state(config=CONFIG):
    params = random_params(config)
    return TrainState(jnp.int32(0), params, optimizer_and_schedule()[0].init(params))


def run_steps(config=CONFIG, execution=Execution(), steps=3, **options):
    optimizer, schedule = optimizer_and_schedule()
    chex.clear_trace_counter()
    step = make_train_step(config, execution, optimizer, schedule, **options)
    step = jax.jit(chex.assert_max_traces(step, n=1))
    state, losses = make_state(config), []
    for _ in range(steps):
        state, metrics = step(state, make_batch(config))
        losses.append(metrics["loss"])
    return state, np.array(losses), metrics


def test_metrics_are_those_of_the_mean_over_weighted_tokens_of_the_model():
    state, batch = make_state(), make_batch()

    def mean(params):
        logits = MobileLLM(CONFIG).apply({"params": params}, batch["inputs"])
        log_probs = jax.nn.log_softmax(logits)
        of_target = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return -(of_target * batch["loss_weights"]).sum() / batch["loss_weights"].sum()

    expected, grads = jax.jit(jax.value_and_grad(mean))(state.params)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    _, losses, metrics = run_steps(steps=1)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    # The rate that this update was made with: the warm-up begins at 0.
    assert metrics["learning_rate"] == 0
    assert set(metrics) == {"loss", "grad_norm", "learning_rate"}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_the_large_batch(parts):
    state, losses, metrics = run_steps()
    accumulated, parts_losses, parts_metrics = run_steps(accumulation_steps=parts)
    np.testing.assert_allclose(parts_losses, losses, atol=ATOL)
    np.testing.assert_allclose(parts_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    chex.assert_trees_all_close(accumulated.params, state.params, atol=2e-4)


def test_gradient_accumulates_to_the_same_gradient():
    """Before AdamW, which divides small differences by small numbers."""
    state, batch = make_state(), make_batch()
    grad = jax.jit(jax.grad(loss_sum), static_argnums=(2, 3, 4))
    whole = grad(state.params, batch, CONFIG, Execution(), False)
    parts = split_batch(batch, 4)
    total = None
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        new = grad(state.params, part, CONFIG, Execution(), False)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    chex.assert_trees_all_close(total, whole, atol=1e-4, rtol=1e-4)


def test_split_batch_takes_rows_in_turn():
    parts = split_batch({"x": jnp.arange(8)[:, None]}, 2)["x"]
    chex.assert_trees_all_equal(parts[:, :, 0], jnp.array([[0, 2, 4, 6], [1, 3, 5, 7]]))


def test_evaluation_sums_losses_with_the_weights_of_all_targets_and_of_text():
    """Weights of any size; in slices of the sequence as well as at once."""
    state, batch = make_state(), make_batch()
    scale = np.linspace(0.25, 2, T, dtype=np.float32)
    batch = batch | {name: batch[name] * scale for name in ("loss_weights", "text_weights")}
    logits = np.asarray(MobileLLM(CONFIG).apply({"params": state.params}, batch["inputs"]))
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    weights, text_weights = batch["loss_weights"], batch["text_weights"]
    expected = [
        (losses * weights).sum(),
        weights.sum(),
        (losses * text_weights).sum(),
        text_weights.sum(),
        (batch["target_bytes"] * text_weights).sum(),
    ]
    for max_logits in (B * T * CONFIG.vocab_size, B * 3 * CONFIG.vocab_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_entropy, "_MAX_LOGITS", max_logits)
            sums = jax.jit(make_eval_step(CONFIG, Execution()))(state.params, batch)
        np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_documents_are_masked_only_when_asked():
    state, batch = make_state(), make_batch()
    open_loss, masked = (
        make_eval_step(CONFIG, Execution(), mask_documents=mask)(state.params, batch).loss
        for mask in (False, True)
    )
    logits = MobileLLM(CONFIG).apply(
        {"params": state.params}, batch["inputs"], batch["segment_ids"]
    )
    of_target = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1
    )[..., 0]
    np.testing.assert_allclose(masked, -(of_target * batch["loss_weights"]).sum(), rtol=1e-5)
    assert abs(open_loss - masked) > 1e-3


def test_training_masks_documents_and_survives_a_batch_without_targets():
    config, (optimizer, schedule) = tiny(num_layers=1, vocab_size=56), optimizer_and_schedule()
    state, batch = make_state(config), make_batch(config)
    sums = make_eval_step(config, Execution(), mask_documents=True)(state.params, batch)
    for parts in (1, 2):
        options = {"mask_documents": True, "accumulation_steps": parts}
        step = jax.jit(make_train_step(config, Execution(), optimizer, schedule, **options))
        _, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], sums.loss / sums.num_tokens, rtol=1e-5)
        nothing = batch | {"loss_weights": np.zeros((B, T), np.float32)}
        after, metrics = step(state, nothing)
        assert metrics["loss"] == 0 and all_finite(after.params)


def test_bfloat16_keeps_fp32_master_weights_and_moments():
    state, losses, _ = run_steps(execution=Execution(dtype="bfloat16"))
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    _, exact, _ = run_steps()
    np.testing.assert_allclose(losses, exact, rtol=2e-2)
    assert not np.array_equal(losses, exact)


def test_bfloat16_sums_the_gradient_of_a_frequent_token_in_fp32():
    """A bf16 sum of equal terms stops growing; here one token stands at every position."""
    tokens = np.full((32, 64), 7, np.int32)
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "loss_weights": np.ones_like(tokens, np.float32),
        "segment_ids": np.ones_like(tokens),
    }
    config = tiny(num_layers=1, vocab_size=56, tie_embeddings=False)

    def embedding_grad(dtype):
        weights = cast_for_compute(random_params(config), dtype)
        grad = jax.grad(loss_sum)(weights, batch, config, Execution(dtype=dtype), False)
        return np.asarray(grad["embedding"], np.float32)[7]

    exact = embedding_grad("float32")
    error = np.abs(embedding_grad("bfloat16") - exact).max()
    assert error < 0.03 * np.abs(exact).max()


def test_tables_and_norms_stay_fp32_in_bfloat16():
    """The gradients of embedding and head are sums over all tokens."""
    weights = cast_for_compute(random_params(tiny(tie_embeddings=False)), "bfloat16")
    dtypes = {
        "/".join(key.key for key in path): str(weight.dtype)
        for path, weight in jax.tree.leaves_with_path(weights)
    }
    assert sorted(name for name, dtype in dtypes.items() if dtype == "float32") == [
        "blocks/attention_norm/scale",
        "blocks/ffn_norm/scale",
        "embedding",
        "final_norm/scale",
        "head",
    ]
    assert len(dtypes) == 12 and set(dtypes.values()) == {"float32", "bfloat16"}


def test_all_finite_sees_a_single_bad_weight():
    params = jax.tree.map(np.array, make_state().params)
    assert all_finite(params)
    params["blocks"]["ffn"]["up"][1, 2, 3] = np.inf
    assert not all_finite(params)
