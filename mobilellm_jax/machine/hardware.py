"""What the hardware under a run could do at most: the denominator of MFU."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

MEASURE_SECONDS = 0.3

# Dense matmul peak in FLOP/s (no sparsity), at the boost clock, of what JAX counts as one device.
# The first pattern found in `device.device_kind` wins. "float32" is what JAX runs by default for
# fp32 matmuls on these GPUs: TF32. Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and
# NVIDIA's data sheets (A100, H100, H200, L4, L40S, B200 as in HGX, Ada GPU architecture), whose
# figures "with sparsity" are halved here. What is not listed is measured: TPU v2, v3 and v7x count
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


@dataclasses.dataclass(frozen=True)
class PeakFlops:
    """The most FLOP/s that one device can reach.

    Attributes:
      value: FLOP/s of one device.
      source: where the number is from, for the run's header: "published (NVIDIA H200, bfloat16)"
        or "measured matmul (cpu, float32)".
    """

    value: float
    source: str


def peak_flops(device: jax.Device, dtype: jax.typing.DTypeLike) -> PeakFlops:
    """Peak dense matmul rate of `device` for operands of `dtype`, accumulated in fp32.

    Published figures where the device is known, else the best of a short measurement (up to about
    half a second), which makes MFU on such a device a share of what XLA's own matmul reaches
    there. The CPU is measured in fp32 whatever `dtype`, because XLA emulates bf16 on it.
    """
    dtype = jnp.dtype(dtype)
    for pattern, peaks in PUBLISHED_PEAKS:
        if re.search(pattern, device.device_kind) and dtype.name in peaks:
            source = f"published ({device.device_kind}, {dtype.name})"
            return PeakFlops(peaks[dtype.name], source)
    if device.platform == "cpu":
        # Several CPU devices are virtual ones: they share the cores that the measurement uses.
        share = len(device.client.local_devices())
        rate = _measure_matmul(device, jnp.dtype(jnp.float32), size=1024) / share
        return PeakFlops(rate, "measured matmul (cpu, float32)")
    rate = _measure_matmul(device, dtype, size=4096)
    return PeakFlops(rate, f"measured matmul ({device.device_kind}, {dtype.name})")


def _measure_matmul(device: jax.Device, dtype: jnp.dtype, *, size: int) -> float:
    """Best FLOP/s of a `size` cubed matmul within `MEASURE_SECONDS`."""
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    operand = jax.device_put(values.astype(dtype), device)
    matmul = jax.jit(jnp.matmul)
    matmul(operand, operand).block_until_ready()
    best = float("inf")
    deadline = time.perf_counter() + MEASURE_SECONDS
    while (start := time.perf_counter()) < deadline:
        matmul(operand, operand).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
