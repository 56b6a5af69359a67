"""What the hardware under a run could do at most: the denominator of MFU."""

import re

import jax
import jax.numpy as jnp

# Dense matmul peak in FLOP/s (no sparsity), at the boost clock, of what JAX counts as one device.
# The first pattern found in `device.device_kind` wins. "float32" is what JAX runs by default for
# fp32 matmuls on these GPUs: TF32. Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and
# NVIDIA's data sheets (A100, H100, H200, L4, L40S, B200 as in HGX, Ada GPU architecture), whose
# figures "with sparsity" are halved here. Not listed: TPU v2, v3 and v7x, which count
# a core as a device; fp32 on TPU depends on the matmul precision.
PUBLISHED_PEAKS = (
    (r"TPU v4$", {"bfloat16": 275e12}),
    (r"TPU v5 lite|TPU v5e", {"bfloat16": 197e12}),
    (r"TPU v5p?$", {"bfloat16": 459e12}),
    (r"TPU v6 lite|TPU v6e", {"bfloat16": 918e12}),
    (r"\bA100\b(?!.*MIG)", {"bfloat16": 312e12, "float32": 156e12}),
    (r"\bH100 PCIe\b", {"bfloat16": 756e12, "float32": 378e12}),
    (r"\bH100 \d+GB HBM3$", {"bfloat16": 989e12, "float32": 494e12}),
    (r"\bH200$", {"bfloat16": 989e12, "float32": 494e12}),
    (r"\bB200$", {"bfloat16": 2250e12}),
    (r"\bL40S$", {"bfloat16": 362e12, "float32": 183e12}),
    (r"\bL4$", {"bfloat16": 121e12, "float32": 60e12}),
    (r"\bRTX 4090$", {"bfloat16": 165e12, "float32": 83e12}),
)


def peak_flops(device: jax.Device, dtype: jax.typing.DTypeLike) -> float | None:
    """FLOP/s of `device` for dense products of `dtype`, accumulated in fp32, as its maker says.

    None where nothing is published, as of CPUs: a rate that is measured depends on what else runs
    at that moment, so a share of it can be more than all.
    """
    dtype = jnp.dtype(dtype).name
    for pattern, peaks in PUBLISHED_PEAKS:
        if re.search(pattern, device.device_kind) and dtype in peaks:
            return peaks[dtype]
    return None
