"""Cross-entropy that never holds the logits of the whole batch.

A vocabulary of 32,000 makes the fp32 logits of 64k tokens 8.4 GB, and the backward pass wants them
again. Here they are computed a slice of the sequence at a time, and each slice's gradient is taken
while its logits are at hand, so that nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mobilellm_jax.model.layers import constrain
from mobilellm_jax.objectives.embedding_gradient import ShardedGradTable

# Logits held at a time by one device, in elements (256 MB in fp32).
_MAX_LOGITS = 64 * 1024 * 1024


def num_slices(batch_size: int, seq_len: int, vocab_size: int, shards: int) -> int:
    """The fewest equal slices of the sequence whose logits stay within a device's budget."""
    rows = batch_size // shards
    for slices in range(1, seq_len + 1):
        if seq_len % slices == 0 and rows * (seq_len // slices) * vocab_size <= _MAX_LOGITS:
            return slices
    return seq_len


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    head: ShardedGradTable,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    slices: int | None = None,
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), in fp32 nats.

    Args:
      hidden_BTD: inputs of the head; their dtype is the dtype of the matrix products.
      head: output embedding, one row a token of the vocabulary, in the same dtype.
      targets_BT: int token ids.
      weights_BT: fp32; 0 leaves a token out.
      slices: number of parts, dividing T, in which the logits are computed; None is `num_slices`.
    """
    if slices is None:
        num_shards, vocab_size, _ = head.shards.shape
        slices = num_slices(*targets_BT.shape, vocab_size, num_shards)
    return _cross_entropy_sum(hidden_BTD, head, targets_BT, weights_BT, slices)


def cross_entropy(
    hidden_BTD: jax.Array, head: ShardedGradTable, targets_BT: jax.Array
) -> jax.Array:
    """-log p(target) of each token, fp32 nats `[B, T]`; for evaluation, arguments as above."""
    num_shards, vocab_size, _ = head.shards.shape
    slices = num_slices(*targets_BT.shape, vocab_size, num_shards)
    parts = _sequence_slices(slices, hidden_BTD, targets_BT)
    _, losses_SBC = lax.scan(lambda _, part: (None, _losses(head.values, *part)[0]), None, parts)
    return jnp.moveaxis(losses_SBC, 0, 1).reshape(targets_BT.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy_sum(hidden_BTD, head, targets_BT, weights_BT, slices):
    total, _ = lax.scan(
        lambda total, part: (total + _slice_loss(head.values, *part)[0], None),
        jnp.float32(0),
        _sequence_slices(slices, hidden_BTD, targets_BT, weights_BT),
    )
    return total


def _sequence_slices(slices, *arrays):
    """Splits axis 1 (T) of each array and puts the slices first: `[slices, B, T / slices, ...]`."""

    def split(x):
        x = x.reshape(x.shape[0], slices, x.shape[1] // slices, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    return tuple(split(x) for x in arrays)


def _losses(head_VD, hidden_BCD, targets_BC):
    with jax.named_scope("head"):
        logits = jnp.einsum(
            "BCD,VD->BCV",
            hidden_BCD,
            head_VD,
            preferred_element_type=jnp.float32,
        )
    normalizer_BC = jax.nn.logsumexp(logits, axis=-1)
    of_target_BC = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1)[..., 0]
    return normalizer_BC - of_target_BC, logits, normalizer_BC


def _slice_loss(head_VD, hidden_BCD, targets_BC, weights_BC):
    losses_BC, logits, normalizer_BC = _losses(head_VD, hidden_BCD, targets_BC)
    return jnp.sum(losses_BC * weights_BC), logits, normalizer_BC


def _forward(hidden_BTD, head, targets_BT, weights_BT, slices):
    head_VD, P = head.values, head.shards.shape[0]
    vocab = lax.iota(jnp.int32, head_VD.shape[0])

    def one_slice(carry, part):
        total, d_head_PDV = carry
        hidden, targets, weights = part
        loss, logits, normalizer = _slice_loss(head_VD, hidden, targets, weights)
        probabilities = jnp.exp(logits - normalizer[..., None])
        is_target = targets[..., None] == vocab[None, None, :]
        d_logits = ((probabilities - is_target) * weights[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("BCV,VD->BCD", d_logits, head_VD)
        # [D, V], so that XLA on CPU has the hidden states to transpose and not the logits.
        d_head_PDV += jnp.einsum(
            "PRCD,PRCV->PDV",
            hidden.reshape(P, -1, *hidden.shape[1:]),
            d_logits.reshape(P, -1, *d_logits.shape[1:]),
            preferred_element_type=jnp.float32,
        )
        return (total + loss, _by_shard(d_head_PDV)), d_hidden

    d_head_PDV = _by_shard(jnp.zeros((P, *head_VD.shape[::-1]), jnp.float32))
    parts = _sequence_slices(slices, hidden_BTD, targets_BT, weights_BT)
    (total, d_head_PDV), d_hidden = lax.scan(one_slice, (jnp.float32(0), d_head_PDV), parts)
    d_hidden_BTD = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BTD.shape)
    # The barrier keeps XLA from folding the transposition into the product, in a form that its CPU
    # backend does not have for bf16 (jaxlib 0.10.2: "Unsupported element type for DotThunk").
    d_head_PVD = lax.optimization_barrier(d_head_PDV).swapaxes(1, 2)
    return total, (d_hidden_BTD, constrain(d_head_PVD, ("batch", "vocab", "act_embed")))


def _by_shard(d_head_PDV):
    return constrain(d_head_PDV, ("batch", "act_embed", "vocab"))


def _backward(slices, residuals, d_total):
    d_hidden_BTD, d_head_PVD = residuals
    scale = d_total.astype(jnp.float32)
    d_hidden_BTD = (d_hidden_BTD * scale).astype(d_hidden_BTD.dtype)
    return d_hidden_BTD, ShardedGradTable(None, d_head_PVD * scale), None, None


_cross_entropy_sum.defvjp(_forward, _backward)
