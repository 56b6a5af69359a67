"""Bytes that the kernels of a training step move through a GPU's memory, ahead of time.

  python -m benchmarks.compiled_traffic --preset 125m --rows 16 \
      remat=none remat=dots remat=none,unroll_layers=true

Each argument is one `Execution`, compiled for 8 H100s with `--rows` sequences of 2048 tokens each;
needs the extra `cuda` and no GPU. A kernel's bytes are its operands once and its results once; of a
stack that a loop reads or writes one layer of, that layer. Prints sums by what kernels do, and with
`--kernels 20` the twenty that move most. `--write` keeps the figures for docs/performance.md.
Without a GPU, XLA takes its matmul kernels untuned; their bytes stay the same.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks.speed.columns import compiled_traffic_table
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.hlo import Instruction, executed, parse
from mobilellm_jax.planning.topologies import topology
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.training import run_config
from mobilellm_jax.training.program import TrainProgram
from mobilellm_jax.training.run_config import load_config
from mobilellm_jax.training.sharding import make_mesh

ROOT = Path(__file__).parents[1]
TOPOLOGY, SEQUENCE_LENGTH = "h100:8", 2048
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "partition-id",
    "replica-id", "after-all", "while", "call", "async-start",
)  # fmt: skip


class Kernel(NamedTuple):
    """One kernel of a program: what it does, how often, and the bytes of one run."""

    kind: str
    times: int
    bytes: int
    name: str
    where: str


def kernels(hlo_text: str) -> list[Kernel]:
    """Every kernel of a program compiled for a GPU."""
    computations, entry = parse(hlo_text)
    found = []
    for times, around, name, instruction in executed(computations, entry):
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            moved = _bytes(computations, around, instruction)
            where = instruction.attribute(r'op_name="([^"]*)"') or ""
            found.append(Kernel(_kind(name, instruction), times, moved, name, where))
    return found


def _kind(name: str, instruction: Instruction) -> str:
    if instruction.opcode.startswith(("all-", "reduce-scatter", "collective")):
        return "network"
    if "cudnn$fmha" in instruction.rest:
        return "attention"
    if "gemm" in name or "cublas" in instruction.rest or instruction.opcode == "dot":
        return "matmul"
    return "other"


def _bytes(computations, around, instruction) -> int:
    if instruction.opcode == "fusion":
        callee = computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
        return _read(around, instruction, callee) + _written(callee, callee["ROOT"])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(around[instruction.operands[1]])
    operands = [around[name] for name in instruction.operands if name in around]
    if instruction.opcode == "dynamic-slice":
        operands = [instruction]
    return _size(instruction) + sum(map(_size, operands))


def _size(instruction: Instruction) -> int:
    return sum(size for _, _, size in instruction.arrays)


def _read(around, fusion, callee) -> int:
    """Bytes of a fusion's operands: of one that is only sliced, the slices."""
    inner = {k: i for k, i in callee.items() if k != "ROOT"}
    total = 0
    for key, parameter in inner.items():
        if parameter.opcode != "parameter":
            continue
        uses = list(_uses(inner, key))
        if all(use.opcode == "dynamic-update-slice" and use.operands[0] == at for at, use in uses):
            continue
        whole = _size(around[fusion.operands[int(parameter.rest.partition(")")[0])]])
        if all(use.opcode in ("dynamic-slice", "slice", "gather") for _, use in uses):
            whole = min(whole, sum(_size(use) for _, use in uses))
        total += whole
    return total


def _uses(inner, key):
    for name, instruction in inner.items():
        if key in instruction.operands:
            if instruction.opcode == "bitcast":
                yield from _uses(inner, name)
            else:
                yield key, instruction


def _written(callee, result: Instruction) -> int:
    if result.opcode == "tuple":
        return sum(_written(callee, callee[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written(callee, callee[result.operands[0]])
    if result.opcode == "dynamic-update-slice":
        return _size(callee[result.operands[1]])
    return _size(result)


def compile_step(
    preset: str, rows: int, settings: list[str], chips: str = TOPOLOGY
) -> jax.stages.Compiled:
    """The training step of a preset, `rows` sequences on each chip, data parallel."""
    hardware = topology(chips)
    num_chips = len(hardware.devices)
    overrides = [
        f"--config.train.global_batch_size={rows * num_chips}",
        f"--config.mesh.data={num_chips}",
        "--config.mesh.fsdp=1",
        *(f"--config.execution.{setting}" for setting in settings),
    ]
    config = load_config(str(ROOT / "configs" / f"{preset}.py"), overrides)
    model = run_config.model_config(config)
    mesh = make_mesh(config.mesh, model, hardware.devices)
    return TrainProgram(config, model, mesh, SEQUENCE_LENGTH).lower().compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("executions", nargs="+", metavar="KEY=VALUE,...")
    parser.add_argument("--preset", default="125m", choices=PRESETS)
    parser.add_argument("--rows", type=int, default=16, help="sequences of 2048 tokens on a chip")
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels too")
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/performance")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    tokens = args.rows * SEQUENCE_LENGTH
    results = {}
    for execution in args.executions:
        compiled = compile_step(args.preset, args.rows, execution.split(","))
        found = kernels(compiled.as_text())
        moved = Counter()
        for kernel in found:
            moved[kernel.kind] += kernel.times * kernel.bytes
        results[execution] = {kind: total / tokens for kind, total in moved.items()} | {
            "temporaries": compiled.memory_analysis().temp_size_in_bytes / tokens
        }
        for kernel in sorted(found, key=lambda k: -k.times * k.bytes)[: args.kernels]:
            place = re.sub(r"jit\(\w+\)/|MobileLLM\.|while/body/|closed_call/", "", kernel.where)
            print(f"{kernel.times:4d} x {kernel.bytes / 1e6:8.1f} MB {kernel.name:40s} {place}")
    values = {
        "preset": args.preset,
        "topology": TOPOLOGY,
        "rows": args.rows,
        "sequence_length": SEQUENCE_LENGTH,
        "jax": jax.__version__,
        "bytes_per_token": results,
    }
    print(
        f"KB per token, {args.preset}, {args.rows} x {SEQUENCE_LENGTH} tokens on each of {TOPOLOGY}"
    )
    print(compiled_traffic_table(values))
    if args.write:
        path = ROOT / "docs" / "performance" / "compiled" / f"{args.preset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
