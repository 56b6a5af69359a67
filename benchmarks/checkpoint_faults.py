"""Injects faults into checkpoints and counts what happens: kill -9, damaged files, a full disk.

    python benchmarks/checkpoint_faults.py                # 200 kills, 500 mutations, 50 full disks
    python benchmarks/checkpoint_faults.py --kills 10 --mutations 0 --full_disks 0

Prints a table and exits with 1 if anything was lost or restored wrongly. Takes five minutes on
two busy cores. The full disk is a small tmpfs; without root, which mounting needs, a limit on the
size of files stands in for it.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mobilellm_jax.checkpoints.store import Checkpoints
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.storage.manifest import UNLISTED_NAMES, find_damage

CONFIG = ModelConfig(num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=8, head_dim=8)
TOKENIZER = SimpleNamespace(files={"tokenizer.model": b"tokenizer" * 50}, sha256="5f" * 32)
READY_SECONDS = 60.0


def state(step: int, size: int = 1000) -> dict:
    """What `save` is given at `step`; all numbers depend on the step."""
    base = jnp.arange(size, dtype=jnp.float32) + step
    return {
        "params": {"a": base, "b": {"c": base.reshape(10, -1) * 2}},
        "opt_state": (base / 3, {"count": jnp.int32(step)}),
        "metadata": {"model": CONFIG.to_dict()},
        "tokenizer": TOKENIZER,
    }


def restore(checkpoints: Checkpoints, size: int = 1000, step: int | None = None):
    """The restored checkpoint; asserts that it is bit for bit what was saved at its step."""
    like = state(0, size)
    restored = checkpoints.restore(
        config=CONFIG, params_like=like["params"], opt_state_like=like["opt_state"], step=step
    )
    if restored is not None:
        expected = state(restored.step, size)
        found = {name: getattr(restored, name) for name in ("params", "opt_state")}
        for name, tree in found.items():
            assert jax.tree.structure(tree) == jax.tree.structure(expected[name])
            pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected[name]), strict=True)
            assert all(np.array_equal(left, right) for left, right in pairs), name
        assert restored.metadata["tokenizer_sha256"] == expected["tokenizer"].sha256
    return restored


def mutate(path: Path, kind: str, rng: random.Random) -> None:
    """Damages one file: "flip" one bit, "truncate", "extend" or "delete"."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[rng.randrange(len(content)) :]
    else:
        content += rng.randbytes(rng.randint(1, 50))
    path.write_bytes(content)


def try_mutations(workdir: Path, count: int, seed: int) -> collections.Counter:
    """Damages a random file of the newest of two steps, restores, mends, `count` times.

    Returns:
      How often it was "noticed" (the older step came back, bit for bit), "harmless" (the newest
      came back bit for bit: Orbax's two bookkeeping files, which nothing reads) or "SILENT"
      (anything else).
    """
    rng = random.Random(seed)
    with Checkpoints(workdir, keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **state(step))
    newest, copy = checkpoints.directory / "2", workdir / "copy"
    shutil.copytree(newest, copy)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    outcomes = collections.Counter()
    for index in range(count):
        # Each file in turn, small ones included.
        name = files[index % len(files)]
        empty = (newest / name).stat().st_size == 0
        kind = rng.choice(("extend", "delete") if empty else ("flip",) * 4 + ("truncate", "delete"))
        mutate(newest / name, kind, rng)
        try:
            with Checkpoints(workdir, keep_last=2) as checkpoints:
                step = restore(checkpoints).step
            unread = str(name) in UNLISTED_NAMES and name.name != "manifest.json"
            outcome = "noticed" if step == 1 else "harmless" if unread else "SILENT"
            if step == 1 and not (workdir / "checkpoints_damaged" / "2-0").is_dir():
                outcome = "SILENT"
        except (Exception, AssertionError) as error:
            print(f"{kind} of {name}: {type(error).__name__}: {error}", file=sys.stderr)
            outcome = "SILENT"
        outcomes[outcome] += 1
        shutil.rmtree(workdir / "checkpoints_damaged", ignore_errors=True)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(copy, newest)
    return outcomes


def try_kills(workdir: Path, count: int, seed: int) -> collections.Counter:
    """Kills saving processes until `count` of them have restored what the one before left.

    Must be called before JAX has started, because it forks.

    Returns:
      "recovered" (the newest step on disk came back, bit for bit), "LOST" (anything else),
      and how often the kill came during a save, or before the process had restored anything.
    """
    rng = random.Random(seed)
    outcomes = collections.Counter()
    first = True
    while outcomes["recovered"] + outcomes["LOST"] < count:
        steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal()]
        expected = max(steps, default=0)
        receiver, sender = os.pipe()
        if (child := os.fork()) == 0:
            os.close(receiver)
            _save_for_ever(workdir, sender)
        os.close(sender)
        early = rng.random() < 0.1
        if early:
            time.sleep(rng.random())
        else:
            ready, _, _ = select.select([receiver], [], [], READY_SECONDS)
            report = os.read(receiver, 100).decode() if ready else "no answer"
            if not first:  # which finds an empty folder
                outcomes["recovered" if report == str(expected) else "LOST"] += 1
            first = False
            if report != str(expected):
                print(f"expected step {expected}, got {report!r}", file=sys.stderr)
            time.sleep(rng.random() / 2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(receiver)
        outcomes["killed while starting"] += early
        outcomes["killed during a save"] += any(workdir.glob("checkpoints/*-tmp*"))
    return outcomes


def _save_for_ever(workdir: Path, sender: int) -> None:
    size = 500_000  # 6 MB, so that writing takes a good part of the time
    try:
        with Checkpoints(workdir, keep_last=2) as checkpoints:
            restored = restore(checkpoints, size)
            step = restored.step if restored else 0
            os.write(sender, str(step).encode())
            while True:
                step += 1
                checkpoints.save(step, **state(step, size))
    except BaseException as error:  # the parent must hear of it
        os.write(sender, f" {type(error).__name__}: {error}"[:90].encode())
    finally:
        os._exit(1)


@contextlib.contextmanager
def _small_disk(folder: Path):
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def _little_space(folder: Path, left: int):
    """Leaves `left` bytes to be written below `folder`, or that many to each file."""
    ballast = folder / "ballast"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.geteuid() == 0:
        ballast.write_bytes(bytes(shutil.disk_usage(folder).free - left))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        ballast.unlink(missing_ok=True)


def try_full_disks(workdir: Path, count: int, seed: int) -> collections.Counter:
    """Runs out of space at `count` different points of a save, with the early check disarmed.

    Returns:
      "stopped" (`wait` raised UserError and the older step is valid and restorable), "fitted" (the
      step was saved after all), or "LOST".
    """
    rng = random.Random(seed)
    size = 100_000  # a step takes 1.3 MB
    outcomes = collections.Counter()
    plenty = mock.Mock(return_value=mock.Mock(free=1 << 60))
    with _small_disk(workdir):
        for _ in range(count):
            with Checkpoints(workdir / "run", keep_last=2) as checkpoints:
                checkpoints.save(1, **state(1, size))
            left = rng.randrange(rng.choice((60_000, 1_500_000)))  # small files fail too
            outcome = "stopped"
            try:
                with (
                    _little_space(workdir, left),
                    mock.patch("shutil.disk_usage", plenty),
                    Checkpoints(workdir / "run", keep_last=2) as checkpoints,
                ):
                    checkpoints.save(2, **state(2, size))
                outcome = "fitted"
            except UserError:
                pass
            except Exception as error:
                print(f"{left} bytes left: {type(error).__name__}: {error}", file=sys.stderr)
                outcome = "LOST"
            with Checkpoints(workdir / "run", keep_last=2) as checkpoints:
                step = restore(checkpoints, size).step
            if step != (2 if outcome == "fitted" else 1):
                outcome = "LOST"
            if find_damage(workdir / "run" / "checkpoints" / "1", 1):
                outcome = "LOST"
            outcomes[outcome] += 1
            shutil.rmtree(workdir / "run")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--full_disks", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # the damage is reported hundreds of times
    trials = (
        ("kill -9", try_kills, flags.kills),  # first: see its docstring
        ("damaged file", try_mutations, flags.mutations),
        ("full disk", try_full_disks, flags.full_disks),
    )
    failed = False
    print("| fault | trials | outcome | seconds |\n|---|---|---|---|")
    for name, trial, count in trials:
        if not count:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as workdir:
            outcomes = trial(Path(workdir), count, flags.seed)
        text = ", ".join(f"{key} {value}" for key, value in sorted(outcomes.items()))
        print(f"| {name} | {count} | {text} | {time.monotonic() - start:.0f} |", flush=True)
        failed |= bool(outcomes["LOST"] or outcomes["SILENT"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
