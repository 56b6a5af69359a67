"""Our side of a comparison, built as `mobilellm train` builds its step."""

import argparse
import dataclasses
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.cases import (
    NUM_STEPS,
    OPTIMIZER,
    random_tokens,
    random_weights,
)
from benchmarks.speed.measure import Workload, peak_resident_bytes
from mobilellm_jax.machine.hardware import peak_flops
from mobilellm_jax.model.attention_kernels import ATTENTION_KINDS
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution, execution_for
from mobilellm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.training.step import TrainState, make_train_step

_PEAK_SECONDS = 0.3


def device_facts(_: dict) -> dict:
    """The device that jax would run on; called in a process of its own, which then lets it go."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", ""),
        "memory_bytes": stats.get("bytes_limit"),
    }


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `Execution`."""
    where = "see Execution in mobilellm_jax/model/execution.py"
    for field in dataclasses.fields(Execution):
        if field.name == "dtype":
            parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16")
        elif field.name == "attention":
            kinds = ", ".join(ATTENTION_KINDS)
            parser.add_argument("--attention", default="auto", help=f"auto (default), {kinds}")
        elif field.type is bool:
            parser.add_argument(
                f"--{field.name}", action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            parser.add_argument(
                f"--{field.name}",
                type=field.type,
                default=field.default,
                help=f"default %(default)s; {where}",
            )


def execution_settings(
    args: argparse.Namespace, config: ModelConfig, device: dict, num_tokens: int
) -> dict:
    """The fields of `Execution` that the flags ask for, with what "auto" means on the device."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Execution)}
    execution = execution_for(types.SimpleNamespace(**device), config, num_tokens, **settings)
    return dataclasses.asdict(execution)


def peak_bytes() -> int:
    """See the description of `measure`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_resident_bytes()


def peak_of(device: jax.Device, dtype: str) -> tuple[float, str]:
    """FLOP/s of a device and where they are from: published, else those of a large product.

    CPUs are measured in fp32 whatever `dtype`, because XLA emulates bf16 on them.
    """
    if peak := peak_flops(device, dtype):
        return peak, f"published ({device.device_kind}, {dtype})"
    cpu = device.platform == "cpu"
    dtype = "float32" if cpu else dtype
    rate = _measure_matmul(device, dtype, size=1024 if cpu else 4096)
    return rate, f"measured matmul ({device.device_kind}, {dtype})"


def _measure_matmul(device: jax.Device, dtype: str, *, size: int) -> float:
    """Best FLOP/s of a `size` cubed matmul within `_PEAK_SECONDS`."""
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    operand = jax.device_put(values.astype(jnp.dtype(dtype)), device)
    matmul = jax.jit(jnp.matmul)
    matmul(operand, operand).block_until_ready()
    best = float("inf")
    deadline = time.perf_counter() + _PEAK_SECONDS
    while (start := time.perf_counter()) < deadline:
        matmul(operand, operand).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def train_program(config: ModelConfig, execution: Execution, accumulation_steps: int):
    """The jitted training step, and a function from weights to its first state."""
    schedule = learning_rate_schedule(OPTIMIZER, NUM_STEPS)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    step = make_train_step(
        config, execution, optimizer, schedule, accumulation_steps=accumulation_steps
    )

    def first_state(params):
        return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))

    return jax.jit(step, donate_argnums=0), first_state


def train_batch(vocab_size: int, batch_size: int, sequence_length: int, step: int) -> dict:
    """The batch of a step number, as numpy arrays in the form that the loader gives."""
    tokens = random_tokens(vocab_size, (batch_size, sequence_length + 1), step)
    shape = (batch_size, sequence_length)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "loss_weights": np.ones(shape, np.float32),
    }


def build_train(settings: dict) -> Workload:
    """Whole training steps: forward, backward, clipping, AdamW; the state donated."""
    config = ModelConfig.from_dict(settings["model"])
    execution = Execution(**settings["execution"])
    if settings["exact_matmuls"] and execution.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    step, first_state = train_program(config, execution, settings["accumulation_steps"])
    state = first_state(jax.tree.map(jnp.array, random_weights(config)))
    shape = (settings["batch_size"], settings["sequence_length"])

    def prepare(first, count):
        batches = [train_batch(config.vocab_size, *shape, i) for i in range(first, first + count)]
        return jax.block_until_ready(jax.device_put(batches))

    start = time.perf_counter()
    compiled = step.lower(state, prepare(0, 1)[0]).compile()
    compile_seconds = time.perf_counter() - start

    def run(batches):
        nonlocal state
        losses = []
        for batch in batches:
            state, metrics = compiled(state, batch)
            losses.append(metrics["loss"])
        return [float(loss) for loss in jax.device_get(losses)]

    def facts():
        used, memory = peak_bytes(), compiled.memory_analysis()
        peak, source = peak_of(jax.local_devices()[0], execution.dtype)
        return {
            "peak_bytes": used,
            "temporary_bytes": memory.temp_size_in_bytes,
            "state_bytes": memory.alias_size_in_bytes,
            "compile_seconds": compile_seconds,
            "peak_flops": peak,
            "peak_flops_source": source,
        }

    return Workload(prepare, run, facts)
