"""Fused attention kernels of TPUs and NVIDIA GPUs, and the one rule that says where they run."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig

ATTENTION_KINDS = ("xla", "cudnn", "splash")
ATTENTION_RESIDUALS = "attention_residuals"  # the name of output and normaliser

_SPLASH_BLOCKS = (512, 384, 256, 128)
_NEEDS = {
    "cudnn": "an NVIDIA GPU from Ampere on, bfloat16 or float16, a head width divisible by 8 up to "
    "128 and an even number of tokens",
    "splash": "a TPU, bfloat16 or float32, a head width divisible by 8 up to 256 and a number of "
    "tokens divisible by 128",
}


def choose_attention(
    requested: str, device: Any, config: ModelConfig, *, dtype: Any, num_tokens: int
) -> str:
    """The kernel for attention of `num_tokens` tokens to each other: "xla", "cudnn" or "splash".

    A function of the device that the program is meant for, whatever runs in this process, so that
    what is planned is what runs. Numbers of heads do not matter: both kernels group query heads.

    "cudnn" is cuDNN's flash attention. It needs an even number of tokens where documents are
    masked; and jax checks head widths above 128 against this process's GPU, not the target.
    "splash" is jax's Pallas kernel; it works in blocks of a multiple of 128 tokens.

    Args:
      requested: one of ATTENTION_KINDS, or "auto": the device's kernel if it can run, else XLA.
      device: a `jax.Device`, of this machine or of a `jax.experimental.topologies` description.
      config: of the model.

    Raises:
      UserError: no such kernel, or one that was asked for by name where it cannot run.
    """
    if requested not in ("auto", *ATTENTION_KINDS):
        choices = ", ".join(("auto", *ATTENTION_KINDS))
        raise UserError(f"execution.attention = {requested!r}: use one of {choices}")
    has_kernel = {
        "cudnn": _cuda_capability(device) >= (8, 0),
        "splash": device.platform == "tpu",
        "xla": True,
    }
    runs = {
        kind: has_kernel[kind] and takes_shape(kind, dtype, config.head_dim, num_tokens)
        for kind in has_kernel
    }
    if requested == "auto":
        return next(kind for kind, can_run in runs.items() if can_run)
    if not runs[requested]:
        raise _unsuitable(requested, device.device_kind, dtype, config.head_dim, num_tokens)
    return requested


def takes_shape(kind: str, dtype: Any, head_dim: int, num_tokens: int) -> bool:
    """Whether a kernel takes operands of that dtype and size, on a device that has it."""
    dtype = np.dtype(dtype)
    if kind == "cudnn":
        dtypes, widest, tokens = (jnp.bfloat16, jnp.float16), 128, 2
    elif kind == "splash":
        dtypes, widest, tokens = (jnp.bfloat16, jnp.float32), 256, min(_SPLASH_BLOCKS)
    else:
        return True
    fits = head_dim % 8 == 0 and head_dim <= widest and num_tokens % tokens == 0
    return fits and dtype in dtypes


def check_shape(kind: str, dtype: Any, head_dim: int, num_tokens: int) -> None:
    """Raises UserError unless `takes_shape`."""
    if not takes_shape(kind, dtype, head_dim, num_tokens):
        raise _unsuitable(kind, "a call with", dtype, head_dim, num_tokens)


def _unsuitable(kind: str, where: str, dtype: Any, head_dim: int, num_tokens: int) -> UserError:
    return UserError(
        f"execution.attention = {kind!r} needs {_NEEDS[kind]}; here: {where}, "
        f"{np.dtype(dtype).name}, {head_dim}, {num_tokens}. Use 'auto'"
    )


def _cuda_capability(device: Any) -> tuple[int, int]:
    """Compute capability, (0, 0) if it is not an NVIDIA GPU (AMD's are names like "gfx942")."""
    digits = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (int(digits[1]), int(digits[2])) if digits else (0, 0)


def attention_saveable(prim, *avals, **params) -> bool:
    """A `jax.checkpoint` policy: attention's output and normaliser, `B T N (H + 2)` values.

    With them the backward pass does not run the forward kernel again. cuDNN's do not have a name;
    its forward pass is a primitive of its own.
    """
    named = jax.checkpoint_policies.save_only_these_names(ATTENTION_RESIDUALS)
    return named(prim, *avals, **params) or prim.name == "dot_product_attention_fwd_wrapper"


def cudnn_attention(
    q_BTNH: jax.Array,
    keys_BKSH: jax.Array,
    values_BKSH: jax.Array,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Causal attention by cuDNN, `[B, T, N, H]`; segments are a mask of B T^2 values.

    cuDNN's own way to pack documents, by offsets, is silently wrong with grouped heads in jax
    0.10.2 (jax issue 39521). The mask is the same for all layers and is kept once: 16 MB per row of
    2048 tokens, a quarter of what attention by XLA takes on top.
    """
    mask = None
    if segment_ids_BT is not None:
        mask = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    keys_BSKH, values_BSKH = keys_BKSH.swapaxes(1, 2), values_BKSH.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q_BTNH, keys_BSKH, values_BSKH, mask=mask, is_causal=True, implementation="cudnn"
    )


def splash_attention(
    q_BTNH: jax.Array,
    keys_BKSH: jax.Array,
    values_BKSH: jax.Array,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Causal attention by jax's Pallas kernel for TPUs, `[B, T, N, H]`.

    A kernel is opaque to the partitioner, which would gather its operands: under a mesh each device
    runs it on its own rows and heads, as the logical axis rules in force lay them out.
    """
    q_BNTH = (q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2)
    attend = _splash_on_one_device
    if not jax.sharding.get_abstract_mesh().empty:
        heads = nn.logical_to_mesh_axes(("batch", "act_heads", "seq", "head_dim"))
        rows = nn.logical_to_mesh_axes(("batch", "seq"))
        # check_vma: pallas_call does not say along which axes its results vary.
        attend = jax.shard_map(
            attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return attend(q_BNTH, keys_BKSH, values_BKSH, segment_ids_BT).swapaxes(1, 2)


def _splash_on_one_device(q_BNTH, keys_BKSH, values_BKSH, segment_ids_BT):
    _, N, T, _ = q_BNTH.shape
    block = next(size for size in _SPLASH_BLOCKS if T % size == 0)
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((T, T))] * N),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=ATTENTION_RESIDUALS,
    )
    if segment_ids_BT is None:
        return jax.vmap(kernel)(q_BNTH, keys_BKSH, values_BKSH)
    segments = SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    return jax.vmap(kernel)(q_BNTH, keys_BKSH, values_BKSH, segments)
