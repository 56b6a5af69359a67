"""What moves between chips: read out of a compiled program, and derived from the model.

A compiled program lists every collective with its shapes, its groups of devices and the loops
around it (`planning.hlo`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import count_block_params, matmul_params_per_token
from mobilellm_jax.planning.hlo import Instruction, parse, trip_count

_OPERATIONS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CALLS = {
    "fusion": r"calls=%?([\w.\-]+)",
    "async-start": r"calls=%?([\w.\-]+)",
    "call": r"to_apply=%?([\w.\-]+)",
    "conditional": r"(?:true|false)_computation=%?([\w.\-]+)",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, or several of one kind.

    Attributes:
      operation: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute".
      dtype: XLA's name of the type of most of its bytes: "bf16", "f32".
      bytes: of the tensors as they are whole, once: the operands of an all-reduce, reduce-scatter,
        all-to-all or permute, the results of an all-gather.
      axes: the mesh axes that it runs over.
      group_size: the chips that take part in it together.
      count: how often it runs in one step.
      where: the place in the model, for people.
    """

    operation: str
    dtype: str
    bytes: int
    axes: tuple[str, ...]
    group_size: int
    count: int = 1
    where: str = ""


def traffic(collective: Collective) -> float:
    """Bytes that each chip sends for it in one step, by a ring.

    (n - 1) / n of the tensor; twice for an all-reduce, which is a reduce-scatter and an all-gather;
    all of it for a permute.
    """
    n = collective.group_size
    rounds = {"all-reduce": 2, "collective-permute": n / (n - 1)}.get(collective.operation, 1)
    return collective.count * collective.bytes * rounds * (n - 1) / n


def traffic_by_axes(found: list[Collective]) -> dict[tuple[str, ...], float]:
    """Sum of the `traffic` over each combination of mesh axes."""
    totals = {}
    for collective in found:
        totals[collective.axes] = totals.get(collective.axes, 0.0) + traffic(collective)
    return totals


def expected_collectives(
    model: ModelConfig,
    mesh_shape: dict[str, int],
    *,
    compute_dtype: str,
    gather: str,
    accumulation_steps: int = 1,
    remat: str = "none",
    tokens: int = 0,
) -> list[Collective]:
    """What a training step has to move, by `training.step` and `model.layers`; scalars left out.

    Gradients are summed after every microbatch and, of a shared block, after every visit: those of
    matrices in the compute dtype, those of embedding, head and norms in fp32. Over `fsdp` they are
    reduce-scattered, over `data` all-reduced (of `fsdp`, what a chip stores). Weights are gathered
    over `fsdp` in the compute dtype: once, or with gather="layer" in the forward and again in the
    backward pass of every sweep over the layers. Over `tensor` activations are summed (Megatron,
    arXiv 1909.08053): per visit of a block two in each direction.

    Args:
      mesh_shape: size by axis name.
      compute_dtype: of the execution, "bfloat16" or "float32".
      gather: `config.mesh.gather`.
      remat: `config.execution.remat`; "full" repeats the sum behind attention.
      tokens: of all microbatches, on one chip.
    """
    c, narrow = model, {"bfloat16": "bf16", "float32": "f32"}[compute_dtype]
    fsdp, tensor = mesh_shape.get("fsdp", 1), mesh_shape.get("tensor", 1)
    norms = (2 * c.num_layers + 1) * c.embed_dim
    # Elements of all blocks' matrices on a tensor shard: stored, and once for every visit.
    blocks = (count_block_params(c) - norms) // tensor
    visited = (matmul_params_per_token(c) - c.vocab_size * c.embed_dim) // tensor
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.embed_dim // tensor
    activation = tokens * c.embed_dim
    times = accumulation_steps
    gathers = 1 if gather == "step" else 2 * len(c.sweeps) * times
    sums = c.depth * (5 if remat == "full" else 4)
    rows = [
        ("all-gather", narrow, blocks, ("fsdp",), gathers, "weights"),
        ("all-gather", narrow, tables, ("fsdp",), 1 if gather == "step" else times, "embedding"),
        ("reduce-scatter", narrow, visited, ("fsdp",), times, "gradients"),
        ("reduce-scatter", "f32", tables, ("fsdp",), times, "gradient of embedding"),
        ("all-reduce", narrow, visited // fsdp, ("data",), times, "gradients"),
        ("all-reduce", "f32", tables // fsdp, ("data",), times, "gradient of embedding"),
        ("all-reduce", "f32", norms, ("data", "fsdp"), times, "gradients of norms"),
        ("all-reduce", narrow, activation, ("tensor",), sums, "activations"),
        ("all-reduce", narrow, activation, ("tensor",), 2, "embedding and head"),
        ("all-reduce", "f32", tokens, ("tensor",), 3, "maximum, sum and target of the logits"),
    ]
    found = []
    for operation, dtype, size, over, count, where in rows:
        axes = tuple(axis for axis in over if mesh_shape.get(axis, 1) > 1)
        n = math.prod(mesh_shape[axis] for axis in axes)
        if n > 1 and size:
            size *= 2 if dtype == "bf16" else 4
            found.append(Collective(operation, dtype, size, axes, n, count, where))
    return found


def collectives(hlo_text: str, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled program, in the order of the program.

    Those of loop bodies carry the number of their rounds in `count`. Asynchronous ones count where
    they start; of a conditional every branch counts. A TPU fusion of an all-reduce with the slicing
    of its result is what it is run as: a reduce-scatter. A matrix product that XLA has interleaved
    with its own reduce-scatter ("windowed einsum") appears as the permutes that it consists of,
    which send up to two shards more. Groups of one chip are left out.

    Args:
      hlo_text: `compiled.as_text()`.
      mesh: that the program was compiled for; its devices in flat order are XLA's 0, 1, 2...
    """
    computations, entry = parse(hlo_text)
    found = []
    for instruction, count, fused_by in _walk(computations, entry, 1, set()):
        groups = _groups(instruction, mesh.size)
        group_size = max(len(group) for group in groups)
        if group_size == 1:
            continue
        operation = instruction.opcode.removesuffix("-start")
        if operation == "all-reduce" and fused_by.startswith("all-reduce-scatter"):
            operation = "reduce-scatter"
        dtype, size = _whole(instruction, operation, group_size)
        axes = _axes(groups, mesh)
        where = _place(instruction)
        found.append(Collective(operation, dtype, size, axes, group_size, count, where))
    return found


def _walk(
    computations, name: str, times: int, started: set[str]
) -> Iterator[tuple[Instruction, int, str]]:
    """Collectives under a computation, how often each runs, and the fusion that it is in or "".

    On TPU one collective appears in the fusion that starts it, in those that advance it beside
    other work (which may be in a later loop) and in the one that ends it, under one channel:
    `started` holds the channels of those that have been met.
    """
    for key, instruction in computations[name].items():
        opcode = instruction.opcode
        if key == "ROOT":
            continue
        if opcode.removesuffix("-start") in _OPERATIONS:
            yield instruction, times, ""
        elif opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            rounds = trip_count(computations, computations[name], instruction)
            yield from _walk(computations, body, times * rounds, started)
        elif opcode in _CALLS:
            called = instruction.rest.partition(")")[2].partition("metadata=")[0]
            callees = re.findall(_CALLS[opcode], called)
            if branches := re.search(r"branch_computations=\{(.*?)\}", called):
                callees += re.findall(r"[\w.\-]+", branches[1])
            for callee in callees:
                if opcode != "fusion":
                    yield from _walk(computations, callee, times, started)
                    continue
                for inner, count, fused_by in _walk(computations, callee, times, started):
                    channel = inner.attribute(r"channel_id=(\d+)")
                    if fused_by or channel not in started:
                        yield inner, count, fused_by or callee
                    started.add(channel)


def _whole(instruction: Instruction, operation: str, n: int) -> tuple[str, int]:
    """XLA's type of most of the tensors' bytes and all their bytes, told by the result's shape."""
    asynchronous = instruction.opcode.endswith("-start")
    sizes = {}
    for dtype, dims, size in instruction.arrays:
        if operation == "collective-permute" and asynchronous and not dims:
            continue  # TPU: semaphores
        sizes[dtype] = sizes.get(dtype, 0) + size
    total = sum(sizes.values())
    if asynchronous and operation != "all-reduce":
        # The result is a pair of operand and result, one of which is n times the other.
        total = (
            total * n // (n + 1) if operation in ("all-gather", "reduce-scatter") else total // 2
        )
    elif instruction.opcode == "reduce-scatter":
        total *= n
    return max(sizes, key=sizes.get), total


def _groups(instruction: Instruction, num_devices: int) -> list[frozenset[int]]:
    """The sets of devices that exchange data among themselves, from any of XLA's notations."""
    text = instruction.rest
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _connected([[int(i) for i in p.split(",")] for p in _braces(pairs[1])])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [frozenset(int(i) for i in group.split(",")) for group in _braces(listed[1])]
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", text):
        rows = _iota(found[2], found[3]).reshape(_numbers(found[1]))
    elif found := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", text):
        order = re.search(r"device_ids=\(([\d,]+)\)", found[2])
        order = order and np.array(_numbers(order[1]))
        if permuted := re.search(rf"device_ids=\({iota}\)", found[2]):
            order = _iota(*permuted.groups())
        rows = _rows_of_mesh(found[1], found[3], order)
    else:
        rows = np.arange(num_devices)[None, :]
    return [frozenset(row) for row in rows.tolist()]


def _rows_of_mesh(mesh: str, taken: str, order: np.ndarray | None) -> np.ndarray:
    """Groups along some axes of XLA's own mesh: "'a'=2,'b'=8" and "'a','b':(2)4".

    The latter is the part of `b` of size 4 inside of its slowest 2.
    """
    sizes = {name: int(n) for name, n in (axis.split("=") for axis in mesh.split(","))}
    parts = {name: (1, 1) for name in sizes}  # before it and in it
    for axis in filter(None, taken.split(",")):
        name, _, part = axis.partition(":")
        before, _, size = part.strip("(").partition(")")
        parts[name] = (int(before), int(size)) if part else (1, sizes[name])
    shape = [m for name, (b, n) in parts.items() for m in (b, n, sizes[name] // (b * n))]
    grid = (np.arange(math.prod(shape)) if order is None else order).reshape(shape)
    inside = range(1, len(shape), 3)
    group_size = math.prod(shape[i] for i in inside)
    return np.moveaxis(grid, inside, range(-len(inside), 0)).reshape(-1, group_size)


def _braces(text: str) -> list[str]:
    return re.findall(r"\{([\d,]+)\}", text)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return grid.transpose(_numbers(permutation) if permutation else None).ravel()


def _connected(pairs: list[list[int]]) -> list[frozenset[int]]:
    groups = []
    for pair in map(frozenset, pairs):
        touched = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return groups


def _axes(groups: list[frozenset[int]], mesh: Mesh) -> tuple[str, ...]:
    """The fewest mesh axes along which all members of every group lie."""
    places = {i: place for i, place in enumerate(np.ndindex(mesh.devices.shape))}
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if any(len({places[device][axis] for device in group}) > 1 for group in groups)
    )


def _place(instruction: Instruction) -> str:
    """The end of JAX's name stack, without what JAX's transformations put into it."""
    names = instruction.attribute(r'op_name="([^"]*)"') or ""
    backward = "backward " if "transpose(" in names else ""
    noise = r"jit\(\w+\)|while|body|closed_call|checkpoint|rematted_computation|blocks\.\w+"
    parts = [part for part in names.split("/") if not re.fullmatch(noise, part)]
    return backward + "/".join(parts[-3:])
