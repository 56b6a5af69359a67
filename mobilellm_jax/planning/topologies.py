"""Hardware that is not here: what a name like "v5e:16x16" or "h100:8x8" stands for.

The compilers of TPUs and GPUs run on any Linux machine that has their wheels: `libtpu`, or JAX's
CUDA plugin. They are told what to compile for by `jax.experimental.topologies`.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from mobilellm_jax.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device, as JAX counts them.

    Attributes:
      platform: "tpu" or "cuda".
      memory_bytes: what a program can use of it; of a GPU what CUDA reports, of which JAX takes a
        share (`_gpu_share`).
      memory_bandwidth: bytes/s.
      fast_bandwidth: bytes/s that a chip sends to its neighbours along one axis of the mesh: both
        directions of a ring of TPU links, one direction of NVLink.
      slow_bandwidth: of a GPU, bytes/s that it sends beyond its host; slices have only one kind.
      target: of a GPU, what differs between kinds in XLA's `GpuTargetConfigProto`.
    """

    platform: str
    memory_bytes: int
    memory_bandwidth: float
    fast_bandwidth: float
    slow_bandwidth: float | None = None
    target: dict | None = None


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for memory; one-way bandwidth of a link (45
# GB/s, on v5p and v6e 90) as in "How to Scale Your Model" (jax-ml.github.io/scaling-book), twice
# for the two directions of a ring.
# GPUs: NVIDIA's data sheets (SXM); beyond the host one 400 Gb/s adapter per GPU (A100: 200 Gb/s),
# as in NVIDIA's DGX systems. Their memory is what CUDA reports of them (79.1 of "80 GB").
CHIPS = {
    "v4": Chip("tpu", 32 * GIB, 1.2e12, 90e9),
    "v5e": Chip("tpu", int(15.75 * GIB), 0.82e12, 90e9),
    "v5p": Chip("tpu", 95 * GIB, 2.77e12, 180e9),
    "v6e": Chip("tpu", int(31.25 * GIB), 1.64e12, 180e9),
    "a100": Chip(
        "cuda",
        int(79.1 * GIB),
        2.04e12,
        300e9,
        25e9,
        {
            "name": "NVIDIA A100-SXM4-80GB",
            "capability": (8, 0),
            "cores": 108,
            "fpus": 64,
            "shared": 167936,
            "l2": 40 << 20,
            "clock": 1.41,
            "memory": 80 * GIB,
        },
    ),
    "h100": Chip(
        "cuda",
        int(79.1 * GIB),
        3.35e12,
        450e9,
        50e9,
        {
            "name": "NVIDIA H100 80GB HBM3",
            "capability": (9, 0),
            "cores": 132,
            "fpus": 128,
            "shared": 233472,
            "l2": 50 << 20,
            "clock": 1.98,
            "memory": 80 * GIB,
        },
    ),
    "h200": Chip(
        "cuda",
        int(139.7 * GIB),
        4.8e12,
        450e9,
        50e9,
        {
            "name": "NVIDIA H200",
            "capability": (9, 0),
            "cores": 132,
            "fpus": 128,
            "shared": 233472,
            "l2": 60 << 20,
            "clock": 1.98,
            "memory": 140 * GIB,
        },
    ),
}

# Dimensions of a slice and chips of the largest one, by the documents named above.
_SLICES = {"v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 6144), "v6e": (2, 256)}
_GPUS_OF_A_HOST, _MOST_GPUS = 8, 4096

# The names by which configs/ knows hardware.
PLATFORMS = {
    "v5e-256": "v5e:16x16",
    "v5p-256": "v5p:8x8x4",
    "h100-8": "h100:8",
    "h100-64": "h100:8x8",
}

# Of a GPU's memory, unless an environment variable says otherwise; the rest is CUDA's and NCCL's:
# docs.jax.dev/en/latest/gpu_memory_allocation.html.
_GPU_SHARE = 0.75
_GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

_TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as the user wrote it.
      chip: the kind of all of them.
      devices: compile-only `jax.Device`s, in the order in which a job on them sees them.
    """

    name: str
    chip: Chip
    devices: tuple

    @property
    def num_hosts(self) -> int:
        """Machines that the devices are in."""
        return len({device.process_index for device in self.devices})


def topology(name: str) -> Topology:
    """The hardware of a name: TPU "v5e:16x16" (chips along each axis), GPUs "h100:8", "h100:8x8".

    For GPUs, "h100:8" is one host, "h100:4x8" are four hosts of eight. PLATFORMS are names too.

    Raises:
      UserError: an unknown name, hardware that nobody has, or its compiler is not installed.
    """
    kind, _, layout = PLATFORMS.get(name, name).partition(":")
    size = r"[1-9][0-9]{0,5}"
    if kind not in CHIPS or not re.fullmatch(f"{size}(x{size})*", layout):
        raise UserError(
            f"--topology {name}: write KIND:SIZES, as in v5e:16x16, v5p:8x8x4, v6e:16x16, v4:4x4x4,"
            f" h100:8 or, for 8 hosts of 8, h100:8x8; the kinds are {', '.join(CHIPS)}"
        )
    sizes = [int(n) for n in layout.split("x")]
    chip = CHIPS[kind]
    if chip.platform == "cuda":
        chip = dataclasses.replace(chip, memory_bytes=int(_gpu_share() * chip.memory_bytes))
    name = f"{kind}:{layout}"
    make = _tpu_devices if chip.platform == "tpu" else _gpu_devices
    return Topology(name, chip, tuple(make(name, chip, sizes)))


def _tpu_devices(name: str, chip: Chip, sizes: list[int]):
    kind = name.partition(":")[0]
    dimensions, most = _SLICES[kind]
    if len(sizes) != dimensions:
        example = "2x2" if dimensions == 2 else "2x2x1"
        raise UserError(f"--topology {name}: {kind} has {dimensions} sizes, as in {kind}:{example}")
    if math.prod(sizes) > most:
        raise UserError(
            f"--topology {name}: a slice of {kind} has at most {most:,} chips, not "
            f"{math.prod(sizes):,}; jobs of several slices are not planned"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name} needs the TPU compiler: pip install '.[tpu]'")
    # It must not look for a TPU, its hosts or another process that has one.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0]}; slices come as 2x2, 2x4, 4x4, ... "
            "(v5e, v6e) or 2x2x1, 4x4x4, 8x8x4, ... (v4, v5p)"
        ) from error
    return found.devices


def _gpu_share() -> float:
    """The share of a GPU that JAX's allocator takes in the run, as in `jaxlib.xla_client`."""
    for variable in _GPU_SHARE_VARIABLES:
        if value := os.environ.get(variable):
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise UserError(f"{variable}={value}: use a share of a GPU's memory, as in 0.9")
            return share
    return _GPU_SHARE


def _gpu_devices(name: str, chip: Chip, sizes: list[int]):
    if len(sizes) > 2:
        raise UserError(f"--topology {name}: GPUs are KIND:GPUS or KIND:HOSTSxGPUS")
    hosts, gpus = (1, *sizes) if len(sizes) == 1 else sizes
    if gpus > _GPUS_OF_A_HOST or hosts * gpus > _MOST_GPUS:
        raise UserError(
            f"--topology {name}: a host has at most {_GPUS_OF_A_HOST} GPUs, as in h100:2x8 for 16, "
            f"and a plan at most {_MOST_GPUS:,}"
        )
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(f"--topology {name} needs the GPU compiler: pip install '.[cuda]'")
    target = dict(chip.target)
    major, minor = target.pop("capability")
    text = _TARGET.format(
        major=major,
        minor=minor,
        bandwidth=int(chip.memory_bandwidth),
        optin=target["shared"] - 1024,
        **target,
    )
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=text, topology=f"{hosts}x1x{gpus}"
    )
    assert len(found.devices) == math.prod(sizes)
    return found.devices
