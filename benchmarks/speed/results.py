"""A finished benchmark as a JSON file: what was measured, on what, with which versions."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.speed.columns import case
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.storage.atomic import write_file

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy", "torch",
    "transformers", "triton", "liger-kernel", "orbax-checkpoint", "grain",
)  # fmt: skip


@dataclasses.dataclass
class Benchmark:
    """One run of one WHAT, filled in as it goes.

    Attributes:
      what: of WHATS in `__main__`.
      args: its flags.
      command: the command line.
      config: the model.
      device: of `jax_side.device_facts`.
      settings: what the sides were given.
      sides: name -> what `measure.compare` found, and more.
      figures: what is of no single side.
    """

    what: str
    args: argparse.Namespace
    command: str
    config: ModelConfig
    device: dict
    settings: dict = dataclasses.field(default_factory=dict)
    sides: dict[str, dict] = dataclasses.field(default_factory=dict)
    figures: dict = dataclasses.field(default_factory=dict)

    @property
    def take_turns(self) -> bool:
        """Whether sides are timed in turns: see `measure`."""
        return self.device["platform"] == "cpu"

    @property
    def failed(self) -> bool:
        """Whether one of our own sides failed; a peer may."""
        return ours_failed(self.sides)

    def to_dict(self) -> dict:
        """What the file holds."""
        return {
            "what": self.what,
            "preset": " ".join([self.args.preset, *self.args.model]),
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "hardware": self.device | _host(),
            "versions": _versions(),
            "environment": {
                name: value
                for name, value in os.environ.items()
                if name.startswith(("XLA_", "JAX_", "TORCH", "OMP_", "CUDA_VISIBLE", "NVIDIA_TF32"))
            },
            "settings": self.settings,
            "sides": self.sides,
            "figures": self.figures,
        }


def ours_failed(sides: dict[str, dict]) -> bool:
    """Whether a side that is no peer has an error."""
    peers = ("torch", "liger")
    return any("error" in side for name, side in sides.items() if not name.startswith(peers))


def _host() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit measured, "+" if files differ from it; "" where there is no repository."""
    root = Path(__file__).parents[2]

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain"))


def write_results(content: dict | list[dict], path: Path) -> None:
    """Writes one result, or several, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another") from error


def default_output(result: dict) -> Path:
    """runs/speed/WHAT-PRESET-....json, named after what sets it apart."""
    text = f"{result['what']}-{result['preset']}-{case(result, brief=True)}"
    return Path("runs/speed") / ("-".join(text.replace(",", " ").split()) + ".json")
