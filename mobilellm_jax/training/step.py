"""One step of training, as a pure function of state and batch."""

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution, cast_for_compute
from mobilellm_jax.model.layers import compute_axes, constrain
from mobilellm_jax.model.transformer import logical_axes
from mobilellm_jax.objectives.embedding_gradient import BatchShards
from mobilellm_jax.objectives.next_token import loss_sum


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


def _constrain_as_stored(tree: dict, config: ModelConfig) -> dict:
    """Lays weights or gradients out as the weights are stored."""
    return _map_axes(constrain, tree, config)


def _constrain_for_compute(weights: dict, config: ModelConfig) -> dict:
    """Gathers weights along `embed`, but for the tables, which `sharded_grad_table` gathers."""

    def gather(weight, axes):
        # First as stored, or XLA carries the gathered layout through the cast and gathers fp32.
        return constrain(constrain(weight, axes), compute_axes(axes))

    tables = {name: weights[name] for name in ("embedding", "head") if name in weights}
    return _map_axes(gather, weights, config) | tables


def _map_axes(function, tree: dict, config: ModelConfig) -> dict:
    """`function(array, its logical axes)` of every array in the tree of the parameters."""
    return jax.tree.map(
        lambda axes, array: function(array, tuple(axes)),
        logical_axes(config),
        tree,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def make_train_step(
    config: ModelConfig,
    execution: Execution,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int = 1,
    mask_documents: bool = False,
    gather: str = "step",
    shards: BatchShards = BatchShards(),
):
    """Builds `train_step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    The gradient is that of the mean over the whole batch's tokens, whatever the number of
    accumulation steps. Metrics are fp32 scalars: loss, grad_norm (before clipping),
    learning_rate.

    Args:
      gather: when the weights that a mesh splits over `fsdp` are brought together: "step" (once,
        in the compute dtype: ZeRO-2, arXiv 1910.02054) or "layer" (each block's as it is visited:
        ZeRO-3, "fully sharded").
      shards: of the batch, on a mesh.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        weights = cast_for_compute(state.params, execution.dtype)
        if gather == "step":
            weights = _constrain_for_compute(weights, config)
        # The mean over the whole batch is taken here and not of the gradients: a pass less over
        # an array of every parameter.
        num_tokens = jnp.maximum(batch["loss_weights"].sum(), 1.0)
        batch = batch | {"loss_weights": batch["loss_weights"] / num_tokens}
        loss_and_grad = jax.value_and_grad(loss_sum)

        def add_microbatch(total, microbatch):
            new = loss_and_grad(weights, microbatch, config, execution, mask_documents, shards)
            return jax.tree.map(lambda t, n: t + n.astype(jnp.float32), total, new), None

        if accumulation_steps == 1:
            total = loss_and_grad(weights, batch, config, execution, mask_documents, shards)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), weights)
            zeros = _constrain_as_stored(zeros, config)
            microbatches = split_batch(batch, accumulation_steps)
            total, _ = jax.lax.scan(add_microbatch, (jnp.float32(0), zeros), microbatches)
        loss, grads = jax.tree.map(lambda x: x.astype(jnp.float32), total)
        grads = _constrain_as_stored(grads, config)

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


def all_finite(params: dict) -> jax.Array:
    """Whether no parameter is NaN or Inf."""
    return jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()
