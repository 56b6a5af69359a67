"""`compile`: seconds from the start of the process to the end of its first training step.

"cold" with an empty folder for JAX's persistent compilation cache, "warm" with what a cold run left
in it (JAX_COMPILATION_CACHE_DIR, which any `mobilellm train` takes too). Every run is a fresh
process that imports, makes the weights on the device, compiles and does one step; with
`--compile_only` neither weights nor a step, where they would not fit. With them the seconds of
`import mobilellm_jax` and of `mobilellm --help`, whole processes too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from benchmarks.speed.measure import summary
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError

EPILOG = """\
examples:
  python -m benchmarks.speed compile --preset 125m
  python -m benchmarks.speed compile --preset 1.5b --batch_size 8 --sequence_length 2048
  python -m benchmarks.speed compile --preset 1.5b --compile_only
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    from benchmarks.speed import jax_side

    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    parser.add_argument(
        "--compile_only",
        action="store_true",
        help="no weights, no step: they take 16 bytes a weight",
    )


def measure(bench: Benchmark) -> None:
    """Runs the processes one after the other, cold ones first."""
    from benchmarks.speed import jax_side

    args, config = bench.args, bench.config
    length = args.sequence_length
    bench.settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": length,
        "compile_only": args.compile_only,
        "execution": jax_side.execution_settings(args, config, bench.device, length),
    }
    first_step = [sys.executable, "-m", "benchmarks.speed.startup", json.dumps(bench.settings)]
    runs = {
        "cold": first_step,
        "warm": first_step,
        "import mobilellm_jax": [sys.executable, "-c", "import mobilellm_jax"],
        "mobilellm --help": [sys.executable, "-m", "mobilellm_jax", "--help"],
    }
    with tqdm(total=args.samples * len(runs), unit="process") as bar:
        for name, command in runs.items():
            bar.set_description(name)
            found = []
            for _ in range(args.samples):
                if name == "cold":
                    cache = tempfile.TemporaryDirectory(prefix="compilation-cache-")
                found.append(_run(command, cache.name))
                bar.update()
            seconds, parts = zip(*found, strict=True)
            middle = sorted(range(len(seconds)), key=seconds.__getitem__)[len(seconds) // 2]
            bench.sides[name] = {"seconds": summary(list(seconds)), "parts": parts[middle]}
    cache.cleanup()


def _run(command: list[str], cache: str) -> tuple[float, dict[str, float]]:
    """Seconds of the whole process, or of what it says itself, and the parts of them."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.time() - start
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command[:4])} ended with status {done.returncode}: {last}")
    if "benchmarks.speed.startup" not in command:
        return seconds, {}
    times = json.loads(done.stdout.splitlines()[-1])  # part -> when it was over, on the clock
    parts, before = {}, start
    for name, end in times.items():
        parts[name], before = end - before, end
    return before - start, parts


def _first_step(settings: dict) -> None:
    """In the process measured: when each part was over, as JSON."""
    import jax

    from benchmarks.speed import jax_side
    from mobilellm_jax.model.config import ModelConfig
    from mobilellm_jax.model.execution import Execution
    from mobilellm_jax.model.transformer import init_params

    times = {"imports": time.time()}
    config = ModelConfig.from_dict(settings["model"])
    shape = (settings["batch_size"], settings["sequence_length"])
    step, first_state = jax_side.train_program(config, Execution(**settings["execution"]), 1)

    def fresh():
        return first_state(init_params(config, jax.random.key(0)))

    if settings["compile_only"]:
        state = jax.eval_shape(fresh)
    else:
        state = jax.block_until_ready(fresh())
        times["weights"] = time.time()
    batch = jax_side.train_batch(config.vocab_size, *shape, 0)
    lowered = step.lower(state, batch)
    times["tracing"] = time.time()
    compiled = lowered.compile()
    times["compilation"] = time.time()
    if not settings["compile_only"]:
        float(compiled(state, batch)[1]["loss"])
        times["first step"] = time.time()
    print(json.dumps(times))


if __name__ == "__main__":
    _first_step(json.loads(sys.argv[1]))
