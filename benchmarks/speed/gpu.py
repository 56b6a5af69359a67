"""`gpu`: everything that is asked of a GPU, most important first, in a fixed time.

Each job is a process of its own with a limit of its own; one that fails or runs out of time does
not keep the others from running. What has a result of ours already is not run again, so the same
command goes on where the time was too short. All results are put together in FOLDER/gpu.json, which
`python -m benchmarks.speed report` reads from docs/performance/; the table is printed last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.columns import tables_by_what
from benchmarks.speed.results import ours_failed, write_results
from mobilellm_jax.errors import UserError

_LEAST_SECONDS = 40  # that a job is started with
_MEMORY_FRACTION = "0.92"  # of the device for jax, which takes 0.75 by itself
LENGTH = "--sequence_length 2048"


def _train(preset: str, batch_size: int, *more: str) -> str:
    return " ".join(["train", "--preset", preset, "--batch_size", str(batch_size), LENGTH, *more])


_OURS = "--sides jax"
_UNROLLED = "--unroll_layers --remat none"
# Name -> arguments, in the order in which they are worth the time.
JOBS = {
    "train-125m-16": _train("125m", 16, _UNROLLED),
    "losses-bf16": f"losses --preset 125m --batch_size 8 {LENGTH} --steps 50 --sides jax torch",
    "attention": f"attention --preset 125m --batch_size 16 {LENGTH}",
    "train-125m-32": _train("125m", 32, _UNROLLED),
    "scanned-125m-32": _train("125m", 32, _OURS),
    "decode": "decode --preset 125m --prompt_length 128 --num_tokens 128 --samples 5",
    "loss-64k": f"loss --preset 125m --batch_size 32 {LENGTH}",
    "train-350m": _train("350m", 16, _UNROLLED),
    "train-1.5b": _train("1.5b", 4, "--samples 6 --sides jax torch torch.compile"),
    "ls-16": _train("125m_ls", 16, _OURS),
    "scanned-125m-16": _train("125m", 16, _OURS),
    "techniques": f"techniques --preset 125m --batch_size 16 {LENGTH} --samples 5 --only "
    "products-by-autodiff attention-at-once logits-at-once",
    "products": f"products --preset 125m --batch_size 16 {LENGTH}",
    "compile-125m": f"compile --preset 125m --batch_size 16 {LENGTH} --samples 2",
    "scanned-125m-8": _train("125m", 8, _OURS),
    "scanned-125m-64": _train("125m", 64, _OURS),
    "unrolled-125m-8": _train("125m", 8, _UNROLLED, _OURS),
    "unrolled-125m-64": _train("125m", 64, _UNROLLED, _OURS),
    "remat-none": _train("125m", 32, "--remat none", _OURS),
    "unrolled-remat-dots": _train("125m", 32, "--unroll_layers --remat dots", _OURS),
    "remat-attention": _train("125m", 32, "--remat attention", _OURS),
    "remat-full": _train("125m", 32, "--remat full", _OURS),
    "losses-fp32": "losses --preset 125m --batch_size 4 --sequence_length 1024 --steps 50 "
    "--dtype float32 --sides jax torch",
    "prefill": "prefill --preset 125m --prompt_length 1024",
    "compile-1.5b": f"compile --preset 1.5b --batch_size 4 {LENGTH} --samples 1",
    "train-350m-scanned": _train("350m", 16, _OURS),
    "xla-attention": _train("125m", 16, "--attention xla", _OURS),
    "unrolled-ls-16": _train("125m_ls", 16, _UNROLLED, _OURS),
    "decode-1.5b": "decode --preset 1.5b --prompt_length 128 --num_tokens 128 --samples 3",
    "decode-32": "decode --preset 125m --batch_size 32 --prompt_length 128 --num_tokens 128 "
    "--samples 5",
}
EPILOG = f"""\
examples:
  python -m benchmarks.speed gpu --budget 540 --folder runs/speed/gpu
  python -m benchmarks.speed gpu --only train-125m-16 losses-bf16
  cp runs/speed/gpu/gpu.json docs/performance/h100.json && python -m benchmarks.speed report

jobs, in this order: {", ".join(JOBS)}
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--budget", type=float, default=1500, metavar="SECONDS", help="default %(default)s")
    add("--job_limit", type=float, default=240, metavar="SECONDS", help="default %(default)s")
    add("--folder", default="runs/speed/gpu", metavar="DIR", help="default %(default)s")
    add("--only", nargs="+", choices=JOBS, metavar="JOB", help="these alone, in this order")
    add("--list", action="store_true", help="print the jobs' commands and end")


def main(args: argparse.Namespace) -> int:
    """Runs the jobs. Exit status 1 if one failed or had no time left."""
    chosen = {name: JOBS[name].split() for name in args.only or JOBS}
    if args.list:
        for name, words in chosen.items():
            print(f"{name:20s} python -m benchmarks.speed {' '.join(words)}")
        return 0
    return run_jobs(chosen, Path(args.folder), args.budget, args.job_limit)


def run_jobs(jobs: dict[str, list[str]], folder: Path, budget: float, job_limit: float) -> int:
    """Runs each job that has no result yet, and puts all results together."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}; name another") from error
    end, outcomes = time.monotonic() + budget, {}
    for number, (name, words) in enumerate(jobs.items(), start=1):
        path, left = folder / f"{name}.json", end - time.monotonic()
        if _is_done(path):
            outcomes[name] = "done before"
        elif left < _LEAST_SECONDS:
            outcomes[name] = "no time left"
        else:
            print(f"[{number}/{len(jobs)}, {left:.0f} s left] {name}", file=sys.stderr, flush=True)
            outcomes[name] = _run_job(words, path, folder / f"{name}.log", min(left, job_limit))
    found = [
        json.loads(path.read_text()) for name in jobs if (path := folder / f"{name}.json").exists()
    ]
    write_results(found, folder / "gpu.json")
    print("\n\n".join(tables_by_what(found, absolute=True)))
    print()
    for name, outcome in outcomes.items():
        print(f"{name:20s} {outcome}")
    print(f"\n{folder / 'gpu.json'}")
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


def _is_done(path: Path) -> bool:
    return path.exists() and not ours_failed(json.loads(path.read_text())["sides"])


def _run_job(words: list[str], path: Path, log: Path, limit: float) -> str:
    """What became of it. Its whole group of processes ends with it: the GPU must be free again."""
    command = [sys.executable, "-m", "benchmarks.speed", *words, "--output", str(path)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": _MEMORY_FRACTION} | os.environ
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    if status is None:
        return f"stopped at its limit of {limit:.0f} s, see {log}"
    if status == 0:
        return f"done in {seconds:.0f} s"
    return f"failed with status {status} after {seconds:.0f} s, see {log}"
