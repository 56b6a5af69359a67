"""Next-token prediction: the loss of a batch, for training and for evaluation."""

from typing import NamedTuple

import jax

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution, cast_for_compute
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.objectives.cross_entropy import cross_entropy, cross_entropy_sum
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
    hidden, head = _hidden_and_head(params, batch, config, execution, mask_documents, shards)
    with jax.named_scope("loss"):
        return cross_entropy_sum(hidden, head, batch["targets"], batch["loss_weights"])


def _hidden_and_head(params, batch, config, execution, mask_documents, shards):
    model = MobileLLM(config, execution)
    segment_ids = batch["segment_ids"] if mask_documents else None
    embedding = sharded_grad_table(params["embedding"], execution.dtype, shards)
    head = embedding
    if not config.tie_embeddings:
        head = sharded_grad_table(params["head"].T, execution.dtype, shards)
    with jax.named_scope("embed"):
        embedded = look_up(embedding, batch["inputs"])
    hidden = model.apply({"params": params}, embedded, segment_ids, method="transform")
    return hidden, head


# What `predicts_across_documents` goes by; saved with a model, which had 1 where none is saved.
LOSS_VERSION = 2


def predicts_across_documents(mask_documents: bool, loss_version: int) -> bool:
    """Whether the last token of a document is to predict the first of the next one.

    Not where attention is confined to a document, as the next one cannot be known from it; but loss
    version 1 had it so there, too.
    """
    return not mask_documents or loss_version < 2


class EvalSums(NamedTuple):
    """Sums over the targets of a batch, fp32 scalars.

    Attributes:
      loss: weighted nats of all targets.
      num_tokens: their weights.
      text_loss: weighted nats of the targets that stand for text: control tokens do not.
      num_text_tokens: their weights.
      num_bytes: weighted UTF-8 bytes of the targets.
    """

    loss: jax.Array
    num_tokens: jax.Array
    text_loss: jax.Array
    num_text_tokens: jax.Array
    num_bytes: jax.Array


def make_eval_step(
    config: ModelConfig,
    execution: Execution,
    *,
    mask_documents: bool = False,
    shards: BatchShards = BatchShards(),
):
    """Builds `eval_step(params, batch) -> EvalSums`.

    The batch is one of `data.loader.eval_batches`: what `loss_sum` takes, with "text_weights" (fp32
    `[B, T]`) and "target_bytes" (int32).
    """

    def eval_step(params: dict, batch: dict[str, jax.Array]) -> EvalSums:
        params = cast_for_compute(params, execution.dtype)
        hidden, head = _hidden_and_head(params, batch, config, execution, mask_documents, shards)
        losses = cross_entropy(hidden, head, batch["targets"])
        weights, text_weights = batch["loss_weights"], batch["text_weights"]
        return EvalSums(
            loss=(losses * weights).sum(),
            num_tokens=weights.sum(),
            text_loss=(losses * text_weights).sum(),
            num_text_tokens=text_weights.sum(),
            num_bytes=(batch["target_bytes"] * text_weights).sum(),
        )

    return eval_step
