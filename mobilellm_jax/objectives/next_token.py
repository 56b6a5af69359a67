"""Next-token prediction: the loss of a batch, for training and for evaluation."""

import jax

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution, cast_for_compute
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.objectives.cross_entropy import cross_entropy_sum
from mobilellm_jax.objectives.embedding_gradient import BatchShards, look_up, sharded_grad_table


def loss_sum(
    params: dict,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    execution: Execution,
    mask_documents: bool,
    shards: BatchShards = BatchShards(),
) -> jax.Array:
    """Sum of the weighted cross-entropy of a batch in nats; divide by the sum of its weights.

    Args:
      params: as `cast_for_compute` leaves them.
      batch: "inputs", "targets", "segment_ids" (int32 `[B, T]`) and "loss_weights" (fp32).
      mask_documents: whether a token attends to its own document only.
      shards: of the batch, on a mesh.
    """
    model = MobileLLM(config, execution)
    segment_ids = batch["segment_ids"] if mask_documents else None
    embedding = sharded_grad_table(params["embedding"], execution.dtype, shards)
    head = embedding
    if not config.tie_embeddings:
        head = sharded_grad_table(params["head"].T, execution.dtype, shards)
    with jax.named_scope("embed"):
        embedded = look_up(embedding, batch["inputs"])
    hidden = model.apply({"params": params}, embedded, segment_ids, method="transform")
    with jax.named_scope("loss"):
        return cross_entropy_sum(hidden, head, batch["targets"], batch["loss_weights"])


def make_eval_step(
    config: ModelConfig,
    execution: Execution,
    *,
    mask_documents: bool = False,
    shards: BatchShards = BatchShards(),
):
    """Builds `eval_step(params, batch) -> (sum of losses in nats, sum of weights)`, fp32."""

    def eval_step(params: dict, batch: dict[str, jax.Array]):
        weights = cast_for_compute(params, execution.dtype)
        total = loss_sum(weights, batch, config, execution, mask_documents, shards)
        return total, batch["loss_weights"].sum()

    return eval_step
