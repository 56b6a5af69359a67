"""Weak scaling of training over local processes: the same batch for each, 1, 2 and 4 of them.

    python benchmarks/weak_scaling.py          # run it when little else runs; about 3 minutes

Every process has one device and is bound to one core, so that as many processes as there are cores
have a core each; beyond that they share, and cannot scale. Collectives go over Gloo and the
loopback device: what it measures is the cost of running as several processes, not a network. That
cost is the same for every step, some 0.25 s on two cores (small all-reduces, each waiting for
threads that share a core), so the steps are long: 2 s and more.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

from mobilellm_jax.training.metrics import read_metrics

_path = Path(__file__).with_name("process_faults.py")
_spec = importlib.util.spec_from_file_location("process_faults", _path)
process_faults = sys.modules["process_faults"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(process_faults)

WARM_STEPS = 5
MODEL = (
    "--config.model.embed_dim=128", "--config.model.num_heads=4", "--config.model.num_kv_heads=2",
    "--config.model.head_dim=32", "--config.model.ffn_dim=384", "--config.model.num_layers=4",
)  # fmt: skip


def step_seconds(folder: Path, count: int, mesh: str, rows: int, steps: int) -> float:
    """Median seconds of a step on `count` processes, each with `rows` sequences of 32 tokens."""
    arguments = [
        *MODEL, f"--config.train.global_batch_size={rows * count}",
        f"--config.train.num_steps={steps}", "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=1000000", f"--config.mesh.{mesh}={count}",
        f"--config.mesh.{'data' if mesh == 'fsdp' else 'fsdp'}=1",
    ]  # fmt: skip
    name = f"{mesh}{count}"
    with process_faults.Run(folder, name, count, 1, *arguments, optimized=True) as run:
        for process, core in zip(
            run.processes, itertools.cycle(os.sched_getaffinity(0)), strict=False
        ):
            os.sched_setaffinity(process.pid, {core})  # before it has started any thread
        statuses = run.statuses(1800)
        assert set(statuses) == {0}, run.output(0)
    found = [r["throughput/step_seconds"] for r in read_metrics(folder / name) if "train/loss" in r]
    return statistics.median(found[WARM_STEPS:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=512, help="sequences of 32 tokens per process")
    parser.add_argument("--steps", type=int, default=15)
    flags = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load before: {os.getloadavg()[0]:.1f}\n")
    print("| mesh | processes | step, of one process's | throughput | at most, on these cores |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        process_faults.make_inputs(Path(folder))
        for mesh in ("data", "fsdp"):
            one = None
            for count in flags.processes:
                seconds = step_seconds(Path(folder), count, mesh, flags.rows, flags.steps)
                one = one or seconds
                print(
                    f"| {mesh} | {count} | {seconds / one:.2f} x | {count * one / seconds:.2f} x "
                    f"| {min(count, cores)} x |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
