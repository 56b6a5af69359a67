"""Kills, freezes and hangs one process of a training run and measures how the others end.

    python benchmarks/process_faults.py                # 20 trials, about 15 minutes on two cores
    python benchmarks/process_faults.py --trials 2 --processes 4

The run is `mobilellm train` itself: a tiny model on 2 or 4 local processes over Gloo, with two
devices each. Prints a table and exits with 1 if a process was left after 30 s or ended with 0.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mobilellm_jax.data.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 30.0
START_SECONDS = 300.0

CONFIG = """
import os, time
from mobilellm_jax.training import trainer
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32, sharing="immediate", num_repeats=2)
    config.train.update(num_steps=100, global_batch_size=16)
    config.optimizer.update(peak_lr=2e-3, warmup_steps=2)
    config.log.every_steps = 1
    config.eval.update(every_steps=50, num_records=16)
    config.checkpoint.update(every_steps=50, keep_last=2)
    return config

def due(self, *arguments, original=trainer._Run.due):
    while os.path.exists(os.environ["HANG"]):
        time.sleep(0.1)
    return original(self, *arguments)

if "HANG" in os.environ:  # the main thread hangs while that file exists, the others live on
    trainer._Run.due = due
"""


def make_inputs(folder: Path) -> None:
    """Writes config.py and a dataset of 32-token records."""
    (folder / "config.py").write_text(CONFIG)
    words = ["the", "cat", "and", "dog", "sat", "on a", "mat", "while", "rain", "fell", "12 34"]
    rng = random.Random(0)
    texts = ("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(8)) for _ in range(200))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    prepare(
        [folder / "text.jsonl"],
        folder / "data",
        vocab_size=300,
        sequence_length=32,
        valid_fraction=0.1,
        num_workers=1,
        progress=False,
    )


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Run:
    """`mobilellm train` as local processes; their output goes to files.

    Args:
      folder: of `make_inputs`; the workdir is made there.
      name: of the workdir.
      num_processes: in all.
      devices: of each process, or of one after the other.
      arguments: of the command line, for all processes.
      own: more arguments for some processes.
      absent: processes that are not started.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        num_processes: int,
        devices: int | list[int],
        *arguments: str,
        own: dict[int, list[str]] | None = None,
        absent: tuple[int, ...] = (),
        optimized: bool = False,
    ):
        self.workdir = folder / name
        self.hang = folder / f"{name}.hang"
        self.outputs = [folder / f"{name}.{i}.out" for i in range(num_processes)]
        address = f"localhost:{free_port()}"
        self.processes: list[subprocess.Popen] = []
        devices = [devices] * num_processes if isinstance(devices, int) else devices
        for i in range(num_processes):
            if i in absent:
                continue
            command = [
                sys.executable, "-m", "mobilellm_jax", "train",
                "--config", str(folder / "config.py"), "--workdir", str(self.workdir),
                "--coordinator", address, "--num_processes", str(num_processes),
                "--process_id", str(i), f"--config.data.path={folder / 'data'}",
                *arguments, *(own or {}).get(i, []),
            ]  # fmt: skip
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices[i]),
                "OMP_NUM_THREADS": "1",
                # Compiling takes most of the time of a short run.
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
                "HANG": f"{self.hang}.{i}",
            }
            with open(self.outputs[i], "wb") as output:
                process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            self.processes.append(process)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, process: int) -> str:
        """What the process has printed so far."""
        return self.outputs[process].read_text(errors="replace")

    def wait_until(self, condition, what: str) -> None:
        """Waits for a condition, as long as all processes live."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [i for i, process in enumerate(self.processes) if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                texts = "\n".join(self.output(i)[-3000:] for i in ended or [0])
                raise AssertionError(f"{what} never came, {ended} ended:\n{texts}")
            time.sleep(0.02)

    def wait_for(self, pattern: str, process: int = 0) -> None:
        """Waits for a line of a process."""
        self.wait_until(lambda: re.search(pattern, self.output(process)), pattern)

    def statuses(self, timeout: float = START_SECONDS) -> list[int]:
        """Waits for all and returns how they ended."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How the other processes ended: after how many seconds, and with which statuses."""

    seconds: float
    statuses: list[int | None]

    @property
    def good(self) -> bool:
        """Whether all were gone in time, with an error."""
        return self.seconds <= LIMIT_SECONDS and not {0, None} & set(self.statuses)


def try_fault(run: Run, fault: str, victim: int, moment: str) -> Ending:
    """Waits for the moment ("compile", "step" or "save"), hurts the victim, watches the others."""
    if moment == "compile":
        run.wait_for("compiling the training step")
    elif moment == "step":
        run.wait_for(r"step +5/")
    else:
        run.wait_until(lambda: any(run.workdir.glob("checkpoints/*tmp*")), "a save")
    start = time.monotonic()
    if fault == "hang":
        Path(f"{run.hang}.{victim}").touch()
    else:
        number = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[fault]
        run.processes[victim].send_signal(number)
    others = [process for i, process in enumerate(run.processes) if i != victim]
    if fault == "hang":
        others = run.processes  # it lives, so it ends too
    while any(process.poll() is None for process in others):
        if time.monotonic() - start > 2 * LIMIT_SECONDS:
            break
        time.sleep(0.05)
    return Ending(time.monotonic() - start, [process.poll() for process in others])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 2, 4])
    flags = parser.parse_args()
    kinds = [
        (fault, victim, moment)
        for moment in ("step", "save", "compile")
        for fault in ("kill", "freeze")
        for victim in ("last", "first")
    ] + [("hang", "last", "step"), ("hang", "first", "step")]
    trials = zip(itertools.cycle(kinds), itertools.cycle(flags.processes), range(flags.trials))
    print("| fault | process | at a | of | others gone after | statuses | |\n" + "|---" * 7 + "|")
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for (fault, which, moment), count, number in trials:
            victim = 0 if which == "first" else count - 1
            saves = ["--config.checkpoint.every_steps=5"] if moment == "save" else []
            run = Run(
                Path(folder), f"run{number}", count, 2, "--config.train.num_steps=100000", *saves
            )
            with run:
                ending = try_fault(run, fault, victim, moment)
                if not ending.good:
                    for i in range(count):
                        print(f"--- {i}\n{run.output(i)[-3000:]}", file=sys.stderr)
            good += ending.good
            shown = " ".join(map(str, ending.statuses))
            verdict = "good" if ending.good else "BAD"
            print(
                f"| {fault} | {victim} | {moment} | {count} | {ending.seconds:.1f} s | {shown} | "
                f"{verdict} |",
                flush=True,
            )
    print(f"\n{good} of {flags.trials} within {LIMIT_SECONDS:.0f} s, none with 0")
    return int(good < flags.trials)


if __name__ == "__main__":
    sys.exit(main())
