"""What compilers of TPUs make of a training step: memory, kernels, padding; no TPU is needed.

  python -m benchmarks.compiled_tpu remat=dots remat=attention remat=full --preset 125m \
      --chips v5e:2x2 v5p:2x2x1 v6e:2x2

Each argument is one `Execution`, compiled for every slice of `--chips` with `--rows` sequences of
2048 tokens on each chip, data parallel; needs the extra `tpu`. A TPU stores arrays in tiles, of 8 x
128 values mostly, and pads what does not fill them: "padding" is what that adds to the state and to
the stacks that are kept for the backward pass. `--write` keeps the figures for docs/performance.md.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator

import jax

from benchmarks.compiled_traffic import ROOT, SEQUENCE_LENGTH, compile_step
from benchmarks.speed.columns import compiled_tpu_table
from mobilellm_jax.model.costs import count_params
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.hlo import executed, parse
from mobilellm_jax.storage.atomic import write_file

_STATE_BYTES_PER_PARAM = 12  # fp32 weight and two moments


def padded_arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Type, dimensions, bytes and bytes with padding of the arrays of an HLO shape."""
    pattern = r"\b([a-z]+\d+|pred)\[([\d,]*)\]\{([\d,]*)(?::T\(([\d,]+)\))?"
    for dtype, dims, minor_to_major, tile in re.findall(pattern, shape):
        sizes = [int(size) for size in dims.split(",") if size]
        num_bytes = 1 if dtype == "pred" else max(1, int(re.search(r"\d+", dtype)[0]) // 8)
        order = [int(axis) for axis in minor_to_major.split(",") if axis]
        padded = list(sizes)
        tile_sizes = [int(size) for size in tile.split(",") if size]
        for axis, size in zip(order, reversed(tile_sizes), strict=False):
            padded[axis] = -(-sizes[axis] // size) * size
        yield dtype, tuple(sizes), math.prod(sizes) * num_bytes, math.prod(padded) * num_bytes


def figures(compiled: jax.stages.Compiled, preset: str, rows: int) -> dict:
    """What is to be known of a compiled step."""
    computations, entry = parse(compiled.as_text())
    sizes, config = compiled.memory_analysis(), PRESETS[preset]
    tokens = rows * SEQUENCE_LENGTH
    kernels = dict.fromkeys(("fwd", "dq", "dkv"), 0)  # parts of Splash's names
    plain, padded = 1, 1
    for times, _, name, instruction in executed(computations, entry):
        if found := re.match(r"splash_mha_(\w+?)_", name):
            kernels[found[1]] += times
        if instruction.opcode == "while":
            stacks = [
                (size, with_padding)
                for _, dims, size, with_padding in padded_arrays(instruction.shape)
                if dims[:1] == (config.num_layers,) and SEQUENCE_LENGTH in dims
            ]
            plain, padded = max((plain, padded), tuple(map(sum, zip(*stacks, strict=True))))
    return {
        "temporaries_per_token": sizes.temp_size_in_bytes / tokens,
        "kept_per_token": plain / tokens,
        "kept_padding": padded / plain - 1,
        "state_bytes": sizes.argument_size_in_bytes,
        "state_padding": sizes.argument_size_in_bytes
        / (_STATE_BYTES_PER_PARAM * count_params(config))
        - 1,
        "donated": sizes.alias_size_in_bytes / sizes.argument_size_in_bytes,
        "splash_kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("executions", nargs="+", metavar="KEY=VALUE,...")
    add("--chips", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"], metavar="SLICE")
    add("--preset", default="125m", choices=PRESETS)
    add("--rows", type=int, default=4, help="sequences of 2048 tokens on a chip")
    add("--write", action="store_true", help="keep the figures in docs/performance")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    results = {}
    for chips in args.chips:
        for execution in args.executions:
            compiled = compile_step(args.preset, args.rows, execution.split(","), chips)
            results[f"{chips}, {execution}"] = figures(compiled, args.preset, args.rows)
            print(f"{chips}, {execution}: compiled", flush=True)
    values = {
        "preset": args.preset,
        "rows": args.rows,
        "sequence_length": SEQUENCE_LENGTH,
        "jax": jax.__version__,
        "steps": results,
    }
    print(compiled_tpu_table(values))
    if args.write:
        path = ROOT / "docs" / "performance" / "compiled" / f"tpu-{args.preset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
