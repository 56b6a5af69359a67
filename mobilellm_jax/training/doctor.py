"""`mobilellm doctor`: would this run start, and would it fit, before anything is spent on it."""

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine import process_flags
from mobilellm_jax.storage.paths import path_flag

_EPILOG = """\
Takes the flags of `mobilellm train` and, with several processes, is started like it. Nothing is
trained or written. Each line is ok, warn (it runs, but look) or FAIL (with the mend). Exit status:
0 no FAIL, 2 otherwise.

example:
  mobilellm doctor --config configs/125m.py --workdir runs/125m --config.data.path=data/corpus
"""

_COLORS = {"ok": "32", "warn": "33", "FAIL": "31"}
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
      level: "ok", "warn" or "FAIL".
      text: what was found and, if it is not well, the mend.
    """

    level: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`: those of `train`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--config", required=True, metavar="FILE", type=path_flag, help="a file as in configs/"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", type=path_flag, help="of the run to come"
    )
    parser.add_argument(
        "--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config"
    )
    process_flags.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs the verb; `args.overrides` are the `--config.KEY=VALUE` arguments."""
    import jax

    from mobilellm_jax.machine.processes import joined
    from mobilellm_jax.training.run_config import load_config

    with joined(args) as peers:
        config = load_config(args.config, args.overrides)
        examination = Examination(config, Path(args.workdir), peers)
        failed = False
        for name, finding in examination.findings():
            failed |= finding.level == "FAIL"
            if jax.process_index() == 0 or finding.level == "FAIL":
                _show(name, finding)
        if failed:
            raise SystemExit(2)


def _show(name: str, finding: Finding) -> None:
    level = f"{finding.level:4}"
    if sys.stdout.isatty():
        level = f"\033[{_COLORS[finding.level]}m{level}\033[0m"
    print(f"{level}  {name:9}  {finding.text}", flush=True)


class Examination:
    """The checks of one run, in the order in which the run would meet them."""

    def __init__(self, config, workdir: Path, peers):
        from mobilellm_jax.training.run_config import model_config

        self.config, self.workdir, self.peers = config, workdir, peers
        self.model = model_config(config)
        self.run_data = self.program = None

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """(name of the check, what it found); a check that needs a failed one is left out."""
        checks: tuple[tuple[str, Callable], ...] = (
            ("devices", self.devices),
            ("versions", self.versions),
            ("data", self.data),
            ("mesh", self.mesh),
            ("batch", self.batch),
            ("kernel", self.kernel),
            ("workdir", self.checkpoints),
            ("disk", self.disk),
            ("memory", self.memory),
        )
        for name, check in checks:
            if name in ("batch", "kernel", "disk", "memory") and self.program is None:
                continue
            try:
                yield name, check()
            except UserError as error:
                yield name, Finding("FAIL", str(error))

    def devices(self) -> Finding:
        """What JAX sees, over all processes."""
        import jax

        devices = jax.devices()
        text = (
            f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} process(es), "
            f"{jax.local_device_count()} here"
        )
        if devices[0].platform == "cpu":
            return Finding(
                "warn", f"{text}; for GPUs pip install '.[cuda]', for TPUs pip install '.[tpu]'"
            )
        return Finding("ok", text)

    def versions(self) -> Finding:
        """Of what computes, and whether all processes have the same and the same config."""
        import jax

        import mobilellm_jax

        text = (
            f"mobilellm_jax {mobilellm_jax.__version__}, jax {jax.__version__}, jaxlib "
            f"{importlib.metadata.version('jaxlib')}, Python {sys.version.split()[0]}"
        )
        return Finding("ok", text)

    def data(self) -> Finding:
        """Dataset and tokenizer against the model, and against what other processes have."""
        from mobilellm_jax.training.run_data import RunData

        self.run_data = RunData(self.config, self.model)
        self.peers.agree(self.run_data.facts())
        tokens, header = self.run_data.num_train_tokens, self.run_data.first.header
        wanted = self.config.train.num_steps * self.config.train.global_batch_size
        epochs = wanted * self.run_data.seq_len / tokens
        text = (
            f"{tokens:,} tokens in sequences of {self.run_data.seq_len}, vocabulary "
            f"{header.vocab_size:,}; the run takes {epochs:.2f} epochs"
        )
        if epochs > 4:
            return Finding("warn", f"{text}: beyond 4 repeated text teaches little")
        if "valid" not in header.splits:
            return Finding("warn", f"{text}; no valid split: there will be no eval loss")
        return Finding("ok", text)

    def mesh(self) -> Finding:
        """Whether the mesh divides devices and model."""
        from mobilellm_jax.training.program import TrainProgram
        from mobilellm_jax.training.sharding import make_mesh

        mesh = make_mesh(self.config.mesh, self.model)
        length = self.run_data.seq_len if self.run_data else self.model.max_seq_len
        self.program = TrainProgram(self.config, self.model, mesh, length)
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        return Finding("ok", f"{axes}; weights gathered by {self.config.mesh.gather}")

    def batch(self) -> Finding:
        """How a step's batch is split."""
        shape, train = self.program.mesh.shape, self.config.train
        rows = train.global_batch_size // (shape["data"] * shape["fsdp"] * train.accumulation_steps)
        return Finding(
            "ok",
            f"{train.global_batch_size} sequences per step = {rows} on a device x "
            f"{shape['data'] * shape['fsdp']} devices x {train.accumulation_steps} in turn",
        )

    def kernel(self) -> Finding:
        """What attention and arithmetic will be."""
        execution = self.program.execution
        platform = self.program.mesh.devices.flat[0].platform
        text = f"attention {execution.attention}, {execution.dtype}"
        if execution.attention == "xla" and platform != "cpu":
            return Finding("warn", f"{text}: no fused kernel runs for this device, dtype or length")
        return Finding("ok", text)

    def checkpoints(self) -> Finding:
        """Whether the workdir is new, or one to go on from."""
        from mobilellm_jax.checkpoints.files import (
            CHECKPOINTS_NAME,
            check_model,
            list_steps,
            raise_if_damaged,
            read_metadata,
        )

        folder = self.workdir / CHECKPOINTS_NAME
        steps = list_steps(folder) if folder.is_dir() else []
        if not steps:
            return Finding("ok", f"{self.workdir}: starts from scratch")
        newest = folder / str(max(steps))
        raise_if_damaged(newest, max(steps))
        metadata = read_metadata(newest)
        check_model(newest, metadata, self.model)
        if self.run_data:
            self.run_data.check_continues(folder, metadata)
        return Finding("ok", f"{self.workdir}: goes on from step {max(steps):,}, which is whole")

    def disk(self) -> Finding:
        """Space for the checkpoints to come."""
        settings, train = self.config.checkpoint, self.config.train
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(self.program))
        kept = settings.keep_last + 1  # the new one is whole before the oldest goes
        if settings.keep_every:
            kept += train.num_steps // settings.keep_every
        place = next(
            path for path in (self.workdir, *self.workdir.absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(place).free
        text = (
            f"{kept} checkpoints of {size / GIB:.2f} GiB = {kept * size / GIB:.1f} GiB at most, "
            f"{free / GIB:.1f} GiB free in {place}"
        )
        if free < kept * size:
            return Finding("FAIL", f"{text}; free some, or lower config.checkpoint.keep_last")
        return Finding("ok", text)

    def memory(self) -> Finding:
        """The step, compiled for the devices that are here, against their memory."""
        import jax

        sizes = self.program.lower().compile().memory_analysis()
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:  # CPU devices share the machine's memory
            needed *= jax.local_device_count()
            limit = _machine_memory()
        text = f"a step needs {needed / GIB:.2f} GiB of {limit / GIB:.2f} GiB"
        if needed > limit:
            return Finding(
                "FAIL",
                f"{text}; raise config.train.accumulation_steps, or set config.execution.remat to "
                "'attention' or 'full'",
            )
        if needed > 0.9 * limit:
            return Finding("warn", f"{text}: tight")
        return Finding("ok", text)


def _leaves(program) -> list:
    import jax

    return jax.tree.leaves(program.abstract_state())


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
