"""A training step compiled for hardware that is not here, and what that says of it.

What is compiled is the very program that `train` runs (`training.program.TrainProgram`). Memory,
kernels, donation and collectives are read off the compiled program; time is a model, whose few
assumptions are named here and printed with every plan.
"""

import dataclasses
import re
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.hardware import peak_flops
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import count_params, matmul_params_per_token, train_flops_per_token
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.planning.collectives import Collective, collectives, traffic
from mobilellm_jax.planning.topologies import GIB, Topology
from mobilellm_jax.training import run_config
from mobilellm_jax.training.program import TrainProgram
from mobilellm_jax.training.sharding import make_mesh

# Shares of the published matmul peak that are assumed to be reached. No figure of ours stands
# behind them: narrow matmuls on a chip that throttles, and flash attention forward and backward.
MATMUL_SHARE = 0.75
ATTENTION_SHARE = {"cudnn": 0.4, "splash": 0.4, "xla": 0.1}
# Bytes of activations that elementwise work moves per token and visit of a block, in units of the
# embedding's and the feed-forward's width: forward pass, and three times that with the backward.
_MOVED_EMBED, _MOVED_FFN = 8, 4
# fp32 logits written and read twice, their gradient in 16 bits written and read twice.
_BYTES_PER_LOGIT = 16
# AdamW reads gradient, weight and two moments and writes all but the gradient.
_BYTES_PER_UPDATE = 28
# Forward passes done again by the backward pass.
_RECOMPUTED = {"none": 0.0, "dots": 0.1, "attention": 0.8, "full": 1.0}
# Elements kept of a token and a visit of a block for the backward pass, in units of the widths
# (embedding, feed-forward): what benchmarks/compiled_traffic.py shows for 125m.
_KEPT = {"none": (22, 8), "dots": (5, 2), "attention": (2, 0), "full": (1, 0)}
_KEPT_UNROLLED = (7, 3)
# A scan over layers keeps them in stacks: written twice on the way in, read and written on the way
# out.
_STACK_MOVES = 4

# With less of a chip's memory left than this share a plan warns: a run keeps more there than its
# step, the batches to come and the programs of evaluation among it.
MIN_HEADROOM = 0.03

_KERNELS = {
    "cudnn": r"__cudnn\$fmha",
    "splash": r'custom_call_target="tpu_custom_call"',
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest chip.

    Attributes:
      weights: fp32 master weights.
      optimizer: moments and counters.
      batch: tokens, weights of the loss.
      temporaries: activations, gradients, gathered weights, what kernels work in; None if the
        compiler refused, who then counts nothing.
      capacity: what the chip has for a program.
      padding: what the three arguments above take beyond their elements, in tiles of 8 x 128.
      returned: what a step gives back beside the state that it updates in place.
      program: the compiled code.
    """

    weights: int
    optimizer: int
    batch: int
    temporaries: int | None
    capacity: int
    # A plan.json of before these were counted lacks them.
    padding: int = 0
    returned: int = 0
    program: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What takes memory, by name; without temporaries if they are not known."""
        return {
            field.name: size
            for field in dataclasses.fields(self)
            if field.name != "capacity" and (size := getattr(self, field.name)) is not None
        }

    @property
    def total(self) -> int | None:
        """All of it, None if the compiler refused."""
        return None if self.temporaries is None else sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.total is not None and self.total <= self.capacity

    @property
    def tight(self) -> bool:
        """Whether it fits with less than MIN_HEADROOM to spare."""
        return self.fits and self.total > (1 - MIN_HEADROOM) * self.capacity


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one chip, by what they are spent on.

    Attributes:
      matmul, attention, elementwise, vocabulary, optimizer: computing.
      network: axis -> seconds of collectives over it.
    """

    matmul: float
    attention: float
    elementwise: float
    vocabulary: float
    optimizer: float
    network: dict[str, float]

    @property
    def compute(self) -> float:
        """Seconds without the network."""
        return self.matmul + self.attention + self.elementwise + self.vocabulary + self.optimizer

    @property
    def slowest(self) -> float:
        """Seconds if no collective is hidden behind computing."""
        return self.compute + sum(self.network.values())

    @property
    def fastest(self) -> float:
        """Seconds if all are, as far as there is something to hide behind."""
        return max(self.compute, sum(self.network.values()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What compiling told, and what follows.

    Attributes:
      topology: name of the hardware.
      num_chips: devices as JAX counts them.
      mesh: axis -> size.
      settings: what of the config decides memory and speed.
      sequence_length: T.
      tokens_per_step: over all chips.
      attention: the kernel, as found in the compiled program.
      memory: of the fullest chip.
      donated: bytes that are updated in place, tile padding included.
      state: bytes of the state on one chip.
      collectives: all of one step.
      step: predicted seconds.
      flops_per_token: "causal" of `train_flops_per_token`.
      peak: published FLOP/s of one chip.
      compile_seconds: here.
      refused: the compiler's own words, if it found that memory does not suffice.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    settings: dict
    sequence_length: int
    tokens_per_step: int
    attention: str
    memory: Memory
    donated: int
    state: int
    collectives: list[Collective]
    step: StepTime
    flops_per_token: int
    peak: float
    compile_seconds: float
    refused: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it runs at all."""
        return self.refused is None and self.memory.fits

    @property
    def verdict(self) -> str:
        """For tables: "fits", "fits, tight", "does not fit"."""
        if not self.fits:
            return "does not fit"
        return "fits, tight" if self.memory.tight else "fits"

    @property
    def share_of_memory(self) -> str:
        """For tables: "82.1%" of what a chip has, "over 100%" if the compiler refused."""
        total = self.memory.total
        return "over 100%" if total is None else f"{total / self.memory.capacity:.1%}"

    def tokens_per_second(self, seconds: float) -> float:
        """Over all chips, for a step of `seconds`."""
        return self.tokens_per_step / seconds

    def mfu(self, seconds: float) -> float:
        """Share of the published peak, attention counted as causal, for a step of `seconds`."""
        rate = self.tokens_per_second(seconds) / self.num_chips
        return rate * self.flops_per_token / self.peak


def make_plan(config: ConfigDict, hardware: Topology, sequence_length: int) -> Plan:
    """Compiles the training step of `config` for `hardware`.

    Raises:
      UserError: settings, mesh, batch or kernel that do not go together; a batch whose tokens
        alone are more than a chip holds.
    """
    model = run_config.model_config(config)
    mesh = make_mesh(config.mesh, model, hardware.devices)
    program = TrainProgram(config, model, mesh, sequence_length)
    rows = config.train.global_batch_size * sequence_length * 4 * 4
    batch = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    if batch > hardware.chip.memory_bytes:  # compilers abort the process when sizes overflow
        raise UserError(
            f"config.train.global_batch_size = {config.train.global_batch_size}: its tokens alone "
            f"take {batch / GIB:,.0f} GiB of a chip, which has "
            f"{hardware.chip.memory_bytes / GIB:.0f}"
        )
    lowered = program.lower()
    start, refused, text = time.monotonic(), None, ""
    try:
        compiled = lowered.compile()
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = _first_sentence(str(error))
    seconds = time.monotonic() - start
    state = program.abstract_state()
    found = [] if refused else collectives(text, mesh)
    sizes = None if refused else compiled.memory_analysis()
    memory = _memory(
        _bytes_on_a_chip(state.params),
        _bytes_on_a_chip(state.opt_state),
        batch,
        sizes,
        hardware.chip.memory_bytes,
    )
    return Plan(
        topology=hardware.name,
        num_chips=mesh.size,
        mesh=dict(mesh.shape),
        settings={
            "dtype": program.execution.dtype,
            "remat": program.execution.remat,
            "unroll_layers": program.execution.unroll_layers,
            "gather": config.mesh.gather,
            "global_batch_size": config.train.global_batch_size,
            "accumulation_steps": config.train.accumulation_steps,
        },
        sequence_length=sequence_length,
        tokens_per_step=config.train.global_batch_size * sequence_length,
        attention=_kernel_found(text, program.execution.attention, refused),
        memory=memory,
        donated=0 if refused else sizes.alias_size_in_bytes,
        state=memory.weights + memory.optimizer + 4,
        collectives=found,
        step=step_time(
            model,
            hardware,
            mesh,
            tokens_per_chip=config.train.global_batch_size * sequence_length / mesh.size,
            sequence_length=sequence_length,
            execution=program.execution,
            found=found,
        ),
        flops_per_token=train_flops_per_token(model, sequence_length).causal,
        peak=_peak(mesh, program.execution.dtype),
        compile_seconds=seconds,
        refused=refused,
    )


def step_time(
    model: ModelConfig,
    hardware: Topology,
    mesh: jax.sharding.Mesh,
    *,
    tokens_per_chip: float,
    sequence_length: int,
    execution: Execution,
    found: list[Collective],
) -> StepTime:
    """The time model: published rates of the chip, times the shares assumed above."""
    chip, tokens = hardware.chip, tokens_per_chip
    peak = _peak(mesh, execution.dtype)
    again = 1 + _RECOMPUTED[execution.remat] / 3  # a forward pass is a third of the FLOPs
    vocabulary = 6 * model.vocab_size * model.embed_dim
    matmul = 6 * matmul_params_per_token(model) - vocabulary
    scores = train_flops_per_token(model, sequence_length)
    attention = scores.causal - scores.matmul
    width = 4 if execution.dtype == "float32" else 2
    moved = _MOVED_EMBED * model.embed_dim + _MOVED_FFN * model.ffn_dim
    elementwise = 3 * again * model.depth * width * moved
    if not execution.unroll_layers:
        elementwise += _STACK_MOVES * kept_bytes(model, execution)
    logits = _BYTES_PER_LOGIT * model.vocab_size / mesh.shape["tensor"]
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    network = {}
    for collective in found:
        seconds = traffic(collective) / _bandwidth(collective, hardware, mesh)
        name = "+".join(collective.axes)
        network[name] = network.get(name, 0.0) + seconds
    return StepTime(
        matmul=tokens * matmul * again / (peak * MATMUL_SHARE),
        attention=tokens * attention * again / (peak * ATTENTION_SHARE[execution.attention]),
        elementwise=tokens * elementwise / chip.memory_bandwidth,
        vocabulary=tokens * (vocabulary / (peak * MATMUL_SHARE) + logits / chip.memory_bandwidth),
        optimizer=count_params(model) * _BYTES_PER_UPDATE / shards / chip.memory_bandwidth,
        network=network,
    )


def kept_bytes(model: ModelConfig, execution: Execution) -> int:
    """Bytes per token that all visits of blocks keep for the backward pass, roughly."""
    unrolled = execution.unroll_layers and execution.remat in ("none", "dots")
    embed, ffn = _KEPT_UNROLLED if unrolled else _KEPT[execution.remat]
    width = 4 if execution.dtype == "float32" else 2
    return model.depth * width * (embed * model.embed_dim + ffn * model.ffn_dim)


def _bandwidth(collective: Collective, hardware: Topology, mesh: jax.sharding.Mesh) -> float:
    """Of the slowest link that a group of the collective crosses."""
    if hardware.chip.platform == "tpu":
        return hardware.chip.fast_bandwidth
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    axes = tuple(i for i, name in enumerate(mesh.axis_names) if name in collective.axes)
    crosses = (hosts.max(axis=axes) != hosts.min(axis=axes)).any()
    return hardware.chip.slow_bandwidth if crosses else hardware.chip.fast_bandwidth


def _peak(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Published; XLA's fp32 products on TPUs are one pass of bfloat16 by default."""
    device = mesh.devices.flat[0]
    return peak_flops(device, "bfloat16" if device.platform == "tpu" else dtype)


def _memory(weights: int, optimizer: int, batch: int, sizes, capacity: int) -> Memory:
    """Memory as the compiler counts it (`compiled.memory_analysis()`): more than the elements.

    TPUs keep an array in tiles, so the compiler's arguments are wider than ours; its program lies
    in the same memory, and so does what is returned beside the donated state. Its temporaries err
    on the safe side: for 125m with 17 rows on a v5e libtpu 0.0.42 counts 14.35 GiB, of which its
    own buffer assignment (`xla_dump_to`) takes 13.48.

    Args:
      sizes: `jaxlib`'s CompiledMemoryStats, None if the compiler refused.
    """
    if sizes is None:
        return Memory(weights, optimizer, batch, None, capacity)
    return Memory(
        weights,
        optimizer,
        batch,
        sizes.temp_size_in_bytes,
        capacity,
        padding=max(0, sizes.argument_size_in_bytes - weights - optimizer - batch),
        returned=max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        program=sizes.generated_code_size_in_bytes,
    )


def _bytes_on_a_chip(tree) -> int:
    def size(array):
        return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _kernel_found(text: str, chosen: str, refused: str | None) -> str:
    """The kernel that was asked for, if it is in the program."""
    if refused or chosen not in _KERNELS or re.search(_KERNELS[chosen], text):
        return chosen
    raise UserError(
        f"the compiled program has no {chosen} attention in it; set config.execution.attention = "
        "'xla', and please report this with your versions of jax"
    )


def _first_sentence(error: str) -> str:
    line = next((part for part in error.splitlines() if "memory" in part.lower()), error)
    return line.strip()[:300]
