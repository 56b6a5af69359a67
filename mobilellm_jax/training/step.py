"""One step of training and one of evaluation, as pure functions of state and batch."""

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.layers import constrain, in_use
from mobilellm_jax.model.transformer import Execution, MobileLLM, logical_axes
from mobilellm_jax.model.vocabulary import batch_shards, look_up, make_table
from mobilellm_jax.training.loss import cross_entropy_sum, num_slices


@flax.struct.dataclass
class TrainState:
    """What training carries from step to step.

    Attributes:
      step: int32 scalar, updates done.
      params: fp32 master weights.
      opt_state: of the optax optimizer, fp32.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def loss_sum(
    params: dict,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    execution: Execution,
    mask_documents: bool,
) -> jax.Array:
    """Sum of the weighted cross-entropy of a batch in nats; divide by the sum of its weights.

    Args:
      batch: "inputs", "targets", "segment_ids" (int32 `[B, T]`) and "loss_weights" (fp32).
    """
    model = MobileLLM(config, execution)
    segment_ids = batch["segment_ids"] if mask_documents else None
    embedding = make_table(params["embedding"], execution.dtype)
    head = embedding if config.tie_embeddings else make_table(params["head"].T, execution.dtype)
    with jax.named_scope("embed"):
        embedded = look_up(embedding, batch["inputs"])
    hidden = model.apply(
        {"params": params}, batch["inputs"], segment_ids, embedded, method="hidden_states"
    )
    with jax.named_scope("loss"):
        return cross_entropy_sum(
            hidden,
            head,
            batch["targets"],
            batch["loss_weights"],
            num_slices(*batch["targets"].shape, config.vocab_size, batch_shards()),
        )


def cast_for_compute(params: dict, dtype: str) -> dict:
    """Matrices in the compute dtype, once per step.

    Norms stay fp32, they are tiny; so do embedding and head, which `vocabulary` casts: their
    gradients are sums over all places where a token stands (a bf16 sum of ones ends at 256).
    """
    keep = ("scale", "embedding", "head")
    return jax.tree.map_with_path(
        lambda path, p: p if path[-1].key in keep else p.astype(dtype), params
    )


def _lay_out(weights: dict, config: ModelConfig, *, whole: bool) -> dict:
    """Weights or gradients as they are stored, or whole along `embed`."""

    def lay_out(axes, weight):
        # First as stored, or XLA carries the whole layout back through the cast and gathers fp32.
        weight = constrain(weight, tuple(axes))
        return constrain(weight, in_use(tuple(axes))) if whole else weight

    is_axes = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lay_out, logical_axes(config), weights, is_leaf=is_axes)


def make_train_step(
    config: ModelConfig,
    execution: Execution,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int = 1,
    mask_documents: bool = False,
    gather: str = "step",
):
    """Builds `train_step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    The gradient is that of the mean over the whole batch's tokens, whatever the number of
    accumulation steps. Metrics are fp32 scalars: loss, grad_norm (before clipping),
    learning_rate.

    Args:
      gather: when the weights that a mesh splits over `fsdp` are brought together: "step" (once,
        in the compute dtype: ZeRO-2, arXiv 1910.02054) or "layer" (each block's as it is visited:
        ZeRO-3, "fully sharded").
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        weights = cast_for_compute(state.params, execution.dtype)
        if gather == "step":
            tables = {name: weights[name] for name in ("embedding", "head") if name in weights}
            weights = _lay_out(weights, config, whole=True) | tables
        # The mean over the whole batch is taken here and not of the gradients: a pass less over
        # an array of every parameter.
        num_tokens = jnp.maximum(batch["loss_weights"].sum(), 1.0)
        batch = batch | {"loss_weights": batch["loss_weights"] / num_tokens}
        loss_and_grad = jax.value_and_grad(loss_sum)

        def add_microbatch(total, microbatch):
            new = loss_and_grad(weights, microbatch, config, execution, mask_documents)
            return jax.tree.map(lambda t, n: t + n.astype(jnp.float32), total, new), None

        if accumulation_steps == 1:
            total = loss_and_grad(weights, batch, config, execution, mask_documents)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), weights)
            zeros = _lay_out(zeros, config, whole=False)
            microbatches = split_batch(batch, accumulation_steps)
            total, _ = jax.lax.scan(add_microbatch, (jnp.float32(0), zeros), microbatches)
        loss, grads = jax.tree.map(lambda x: x.astype(jnp.float32), total)
        grads = _lay_out(grads, config, whole=False)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def split_batch(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """`[B, T]` arrays as `[parts, B / parts, T]`.

    Row i goes to part i % parts: rows that lie on one device stay there, in equal numbers.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(config: ModelConfig, execution: Execution, *, mask_documents: bool = False):
    """Builds `eval_step(params, batch) -> (sum of losses in nats, sum of weights)`, fp32."""

    def eval_step(params: dict, batch: dict[str, jax.Array]):
        weights = cast_for_compute(params, execution.dtype)
        total = loss_sum(weights, batch, config, execution, mask_documents)
        return total, batch["loss_weights"].sum()

    return eval_step


def all_finite(params: dict) -> jax.Array:
    """Whether no parameter is NaN or Inf."""
    return jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()
