"""How a model is computed: dtype, recomputation, kernels. The weights do not depend on it."""

import dataclasses
from typing import Any

import jax

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.attention_kernels import (
    ATTENTION_KINDS,
    attention_saveable,
    choose_attention,
)
from mobilellm_jax.model.config import ModelConfig

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention_saveable
    ),
    "attention": attention_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed; none of it changes the weights or, but for rounding, the result.

    Attributes:
      dtype: of activations and matrix products, "float32" or "bfloat16".
      remat: what the backward pass recomputes: "none" (keep all), "dots" (keep only the results
        of weight matmuls and of attention), "attention" (only the latter and the input of each
        block visit) or "full" (keep only the input of each block visit). In a scan over layers
        "dots" is faster than "none" everywhere: what is kept has to be written to memory twice.
      unroll_layers: unroll the scan over layers (faster on GPUs, slower to compile).
      attention: "xla", or the fused kernel of the device that the program is for, "cudnn" or
        "splash" (`execution_for` chooses).
    """

    dtype: str = "float32"
    remat: str = "dots"
    unroll_layers: bool = False
    attention: str = "xla"

    def __post_init__(self):
        for name, choices in (
            ("dtype", DTYPES),
            ("remat", tuple(REMAT_POLICIES)),
            ("attention", ATTENTION_KINDS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"execution.{name} = {value!r}: use one of {', '.join(choices)}")


def execution_for(
    device: Any,
    config: ModelConfig,
    num_tokens: int,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    **settings: Any,
) -> Execution:
    """How a model is computed best on a device.

    Args:
      device: a `jax.Device` of this machine, or the description of one that is not here.
      num_tokens: T, tokens that attend to each other.
      dtype: "auto" is that of `compute_dtype`.
      attention: "auto" is the device's kernel if it can run, else "xla".
      **settings: the other fields of `Execution`.

    Raises:
      UserError: a setting that does not exist, or a kernel that does not run there.
    """
    dtype = compute_dtype(dtype, device.platform)
    attention = choose_attention(attention, device, config, dtype=dtype, num_tokens=num_tokens)
    return Execution(dtype=dtype, attention=attention, **settings)


def compute_dtype(requested: str, platform: str) -> str:
    """The dtype that "auto" is: bfloat16, but float32 on the platform "cpu", which emulates it."""
    if requested != "auto":
        return requested
    return "float32" if platform == "cpu" else "bfloat16"


def cast_for_compute(params: dict, dtype: str) -> dict:
    """Matrices in the compute dtype, once per step.

    Norms stay fp32, they are tiny; so do embedding and head, which `embedding_gradient` casts:
    their gradients are sums over all places where a token stands (a bf16 sum of ones ends at 256).
    """
    keep = ("scale", "embedding", "head")
    return jax.tree.map_with_path(
        lambda path, p: p if path[-1].key in keep else p.astype(dtype), params
    )
