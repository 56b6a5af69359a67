"""Which mesh, accumulation and rematerialisation to take on a given hardware."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import count_params
from mobilellm_jax.model.execution import Execution, compute_dtype
from mobilellm_jax.planning.plan import Plan, kept_bytes, make_plan, step_time
from mobilellm_jax.planning.topologies import Topology
from mobilellm_jax.training import run_config
from mobilellm_jax.training.program import resolved_execution
from mobilellm_jax.training.sharding import make_mesh, mesh_shapes

# What is tried of (remat, unroll_layers). Unrolled layers keep little by themselves, but the
# compiler of TPUs takes minutes for them.
_EXECUTIONS = {
    "cuda": (("none", True), ("dots", False), ("attention", False), ("full", False)),
    "tpu": (("dots", False), ("attention", False), ("full", False)),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to try, and the time model's opinion of them with a rough count of the network."""

    changes: dict
    seconds: float


def search(
    config: ConfigDict, hardware: Topology, sequence_length: int, *, num_fitting: int = 3
) -> Iterator[tuple[ConfigDict, Plan]]:
    """Compiles settings from the most promising on, until `num_fitting` of them fit.

    Left as they are: the model, the global batch (the result of training depends on it), dtype and
    kernel. Tried: every mesh that divides model and batch, when weights are gathered, accumulation
    and rematerialisation.

    Yields:
      Config and plan of everything that was compiled, as soon as it is, whether it fits or not.
    """
    fitting = 0
    for candidate in candidates(config, hardware, sequence_length):
        changed = _changed(config, candidate.changes)
        plan = make_plan(changed, hardware, sequence_length)
        yield changed, plan
        fitting += plan.fits
        if fitting == num_fitting:
            return


def candidates(config: ConfigDict, hardware: Topology, sequence_length: int) -> list[Candidate]:
    """What may fit by a rough count of memory, the fastest by the time model first.

    Of equally fast ones the simplest first: whole weights before gathering by layer, less sharding.
    One mesh and way to gather appears once, with its fastest accumulation and rematerialisation.

    Raises:
      UserError: no mesh of the hardware divides model and batch.
    """
    model, found = run_config.model_config(config), {}
    batch = config.train.global_batch_size
    dtype = compute_dtype(config.execution.dtype, hardware.chip.platform)
    shapes = [
        shape
        for shape in mesh_shapes(len(hardware.devices), model)
        if shape[1] <= 64 and shape[2] <= 8
    ]
    splits = sorted({shape[0] * shape[1] for shape in shapes})
    if not any(batch % parts == 0 for parts in splits):
        raise UserError(
            f"config.train.global_batch_size = {batch} does not split over the "
            f"{len(hardware.devices)} chips of {hardware.name}: use a multiple of "
            f"{' or '.join(map(str, splits))}"
        )
    for shape in shapes:
        parts = shape[0] * shape[1]
        if batch % parts:
            continue
        gathers = ("step", "layer") if shape[1] > 1 else ("step",)
        steps = [n for n in range(1, batch // parts + 1) if (batch // parts) % n == 0]
        executions = _EXECUTIONS[hardware.chip.platform]
        for gather, (remat, unroll), accumulation in itertools.product(gathers, executions, steps):
            changes = {
                "mesh": dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
                | {"gather": gather},
                "execution": {"remat": remat, "unroll_layers": unroll},
                "train": {"accumulation_steps": accumulation},
            }
            tokens = batch // parts // accumulation * sequence_length
            execution = Execution(dtype=dtype, remat=remat, unroll_layers=unroll)
            if _rough_memory(model, shape, gather, execution, tokens) > hardware.chip.memory_bytes:
                continue
            key = (shape, gather)
            candidate = _candidate(config, model, hardware, sequence_length, changes)
            if key not in found or _rank(candidate) < _rank(found[key]):
                found[key] = candidate
    return sorted(found.values(), key=_rank)


def _rank(candidate: Candidate):
    changes = candidate.changes
    return (
        float(f"{candidate.seconds:.2g}"),
        changes["mesh"]["tensor"],
        changes["train"]["accumulation_steps"],
        changes["mesh"]["gather"] == "layer",
        changes["mesh"]["fsdp"],
    )


def _candidate(config, model: ModelConfig, hardware, sequence_length, changes) -> Candidate:
    changed = _changed(config, changes)
    mesh = make_mesh(changed.mesh, model, hardware.devices)
    step = step_time(
        model,
        hardware,
        mesh,
        tokens_per_chip=changed.train.global_batch_size * sequence_length / mesh.size,
        sequence_length=sequence_length,
        execution=resolved_execution(changed, model, mesh, sequence_length),
        found=[],
    )
    # Every part of an accumulated batch sums its gradients over the network again.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    sent = 4 * count_params(model) / mesh.shape["tensor"] * (shards > 1)
    sent *= changed.train.accumulation_steps * (1.5 if changed.mesh.gather == "layer" else 1)
    # With `tensor`, activations are summed up four times per visit of a block.
    tensor, tokens = mesh.shape["tensor"], changed.train.global_batch_size * sequence_length
    sums = 4 * model.depth * 2 * model.embed_dim * tokens / shards
    sent += 2 * sums * (tensor - 1) / tensor
    fast = hardware.num_hosts == 1 or hardware.chip.platform == "tpu"
    rate = hardware.chip.fast_bandwidth if fast else hardware.chip.slow_bandwidth
    return Candidate(changes, step.compute + sent / rate)


def _rough_memory(model: ModelConfig, shape, gather: str, execution, tokens: int) -> float:
    """Bytes: state, whole weights and gradients, what the backward pass needs, logits."""
    _, fsdp, tensor = shape
    params = count_params(model)
    state = 16 * params / (fsdp * tensor)
    whole = 4 * (params if gather == "step" else model.vocab_size * model.embed_dim) / tensor
    kept = kept_bytes(model, execution) * tokens / tensor
    return 0.8 * (state + whole + kept)


def _changed(config: ConfigDict, changes: dict) -> ConfigDict:
    changed = copy.deepcopy(config)
    for section, values in changes.items():
        changed[section].update(values)
    return changed
