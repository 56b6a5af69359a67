"""The checks that a run has to pass before its first step.

One list for both: `train` stops at the first FAIL, `doctor` shows all.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

import mobilellm_jax
from mobilellm_jax.checkpoints.files import (
    CHECKPOINTS_NAME,
    check_arrays,
    check_is_workdir,
    check_model,
    list_steps,
    newest_valid,
    read_metadata,
)
from mobilellm_jax.checkpoints.store import checkpoint_bytes
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.model import costs
from mobilellm_jax.storage.atomic import lock_folder
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.training.failures import STATE_FIX, STEP_FIX, memory_errors
from mobilellm_jax.training.metrics import METRICS_FILE, PLOT_FILE
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.program import TrainProgram, check_batch, resolved_execution
from mobilellm_jax.training.resumption import changes, rate_jump
from mobilellm_jax.training.run_config import check_config, model_config
from mobilellm_jax.training.run_data import RunData
from mobilellm_jax.training.sharding import make_mesh
from mobilellm_jax.training.step import TrainState

# Name -> the checks that it needs, in the order in which a run would meet what they look for.
_NEEDS = {
    "devices": (),
    "versions": (),
    "model": (),
    "data": (),
    "schedule": (),
    "mesh": (),
    "batch": ("mesh",),
    "kernel": ("mesh",),
    "workdir": (),
    "disk": ("workdir", "schedule", "batch", "kernel"),
    "resume": ("disk",),
    "memory": ("schedule", "batch", "kernel"),
}
CHECKS = tuple(_NEEDS)
# `train` reads the checkpoint and compiles anyway, and finds what these two look for.
_OF_DOCTOR_ALONE = ("resume", "memory")

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      level: "ok", "warn" (it runs, but look) or "FAIL".
      text: what was found and, if it is not well, the fix.
    """

    level: str
    text: str


class RunChecks:
    """The checks of a run that is about to start, and what they read and made on the way.

    Attributes:
      model: the architecture.
      data: the datasets, once "data" is well.
      mesh: the devices in their order, once "mesh" is well.
      program: the functions to compile, for "disk" and what follows.

    Args:
      config: of the run.
      workdir: of the run; it need not exist.
      peers: the other processes, which have to agree.

    Raises:
      UserError: a config that no run can have, or a workdir that is no local path.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, peers: RunCoordination):
        check_config(config)
        self.config, self.workdir, self.peers = config, local_path(workdir), peers
        self.model = model_config(config)
        self.data = self.mesh = None

    def findings(self, names: Sequence[str]) -> Iterator[tuple[str, Finding]]:
        """(name of the check, what it found); a check that needs a failed one is left out."""
        failed = set()
        for name in names:
            if failed.intersection(_NEEDS[name]):
                failed.add(name)
                continue
            try:
                finding = getattr(self, f"check_{name}")()
            except UserError as error:
                finding = Finding("FAIL", str(error))
            if finding.level == "FAIL":
                failed.add(name)
            yield name, finding

    def require(self) -> None:
        """Raises UserError with the first FAIL of the checks that cost no time."""
        for _, finding in self.findings([name for name in CHECKS if name not in _OF_DOCTOR_ALONE]):
            if finding.level == "FAIL":
                raise UserError(finding.text)

    @functools.cached_property
    def program(self) -> TrainProgram:
        length = self.data.seq_len if self.data else self.model.max_seq_len
        return TrainProgram(self.config, self.model, self.mesh, length)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.workdir / CHECKPOINTS_NAME

    def check_devices(self) -> Finding:
        """Says which devices JAX sees, over all processes."""
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

    def check_versions(self) -> Finding:
        """Names the versions; "data" compares them between processes."""
        text = (
            f"mobilellm_jax {mobilellm_jax.__version__}, jax {jax.__version__}, jaxlib "
            f"{importlib.metadata.version('jaxlib')}, Python {sys.version.split()[0]}"
        )
        return Finding("ok", text)

    def check_model(self) -> Finding:
        """Counts the model to be trained, and says whether its heads divide its width."""
        c = self.model
        cache = costs.kv_cache_bytes_per_token(c)
        text = (
            f"{costs.count_params(c):,} parameters, {costs.count_block_params(c):,} without "
            f"embeddings; {costs.train_flops_per_token(c, c.max_seq_len).causal / 1e9:.3g} GFLOP "
            f"per trained token; 16-bit KV cache {cache:,} bytes per token, "
            f"{cache * c.max_seq_len / 1e6:.1f} MB at {c.max_seq_len}"
        )
        if c.num_heads * c.head_dim != c.embed_dim:
            return Finding(
                "warn",
                f"{text}; {c.num_heads} heads of {c.head_dim} are {c.num_heads * c.head_dim} wide, "
                f"embed_dim is {c.embed_dim}: if not meant, --config.model.head_dim=0 divides it",
            )
        return Finding("ok", text)

    def check_data(self) -> Finding:
        """Dataset and tokenizer against the model, and against what other processes have."""
        self.data = RunData(self.config, self.model)
        self.peers.agree({"workdir": str(self.workdir.absolute()), **self.data.facts()})
        tokens, header = self.data.num_train_tokens, self.data.first.header
        wanted = self.config.train.num_steps * self.config.train.global_batch_size
        epochs = wanted * self.data.seq_len / tokens
        text = (
            f"{tokens:,} tokens in sequences of {self.data.seq_len}, vocabulary "
            f"{header.vocab_size:,}; the run takes {epochs:.2f} epochs"
        )
        if epochs > 4:
            return Finding("warn", f"{text}: beyond 4 repeated text teaches little")
        if "valid" not in header.splits:
            return Finding("warn", f"{text}; no valid split: there will be no eval loss")
        return Finding("ok", text)

    def check_schedule(self) -> Finding:
        """Whether the learning rate has a course over the steps of the run."""
        settings, steps = self.config.optimizer, self.config.train.num_steps
        learning_rate_schedule(settings, steps)
        return Finding(
            "ok",
            f"{settings.schedule} over {steps:,} steps, {settings.warmup_steps:,} of warm-up to "
            f"{settings.peak_lr:g}",
        )

    def check_mesh(self) -> Finding:
        """Whether the mesh divides devices and model."""
        self.mesh = make_mesh(self.config.mesh, self.model)
        axes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        return Finding("ok", f"{axes}; weights gathered by {self.config.mesh.gather}")

    def check_batch(self) -> Finding:
        """Says how a step's batch is split."""
        shape, train = self.mesh.shape, self.config.train
        check_batch(train, self.mesh)
        rows = train.global_batch_size // (shape["data"] * shape["fsdp"] * train.accumulation_steps)
        return Finding(
            "ok",
            f"{train.global_batch_size} sequences per step = {rows} on a device x "
            f"{shape['data'] * shape['fsdp']} devices x {train.accumulation_steps} in turn",
        )

    def check_kernel(self) -> Finding:
        """Says how attention and arithmetic will be computed."""
        length = self.data.seq_len if self.data else self.model.max_seq_len
        execution = resolved_execution(self.config, self.model, self.mesh, length)
        text = f"attention {execution.attention}, {execution.dtype}"
        if execution.attention == "xla" and self.mesh.devices.flat[0].platform != "cpu":
            return Finding("warn", f"{text}: no fused kernel runs for this device, dtype or length")
        return Finding("ok", text)

    def check_workdir(self) -> Finding:
        """Whether the workdir is one, or can become one, and is nobody else's."""
        check_is_workdir(self.workdir)
        check_writable(self.workdir)
        check_writable(self.checkpoints)
        for name in ("config.json", METRICS_FILE, PLOT_FILE):
            if (self.workdir / name).is_dir():
                raise UserError(
                    f"{self.workdir / name}: is a folder, and a run writes a file of that name; "
                    "move it away, or use another workdir"
                )
        if jax.process_index() == 0 and self.workdir.is_dir():
            os.close(lock_workdir(self.workdir))
        return Finding("ok", f"{self.workdir}: can be written to")

    def check_disk(self) -> Finding:
        """Space for the checkpoints to come."""
        settings, num_steps = self.config.checkpoint, self.config.train.num_steps
        there = list_steps(self.checkpoints)
        if max(there, default=0) >= num_steps:
            return Finding("ok", "no checkpoint is to come")
        every = settings.keep_every and math.lcm(settings.keep_every, settings.every_steps)
        for_good = num_steps // every if every else 0
        for_good_there = sum(step % every == 0 for step in there) if every else 0
        saved = math.ceil(num_steps / settings.every_steps)
        # The new one is whole before the oldest goes.
        needed = min(settings.keep_last + 1, saved) - (len(there) - for_good_there)
        needed = max(1, needed)
        size = checkpoint_bytes(self.program.abstract_state())
        place = nearest_folder(self.workdir)
        free = shutil.disk_usage(place).free
        kept = needed + max(0, for_good - for_good_there)
        text = (
            f"{kept} checkpoint(s) of {size / GIB:.2f} GiB to come = {kept * size / GIB:.1f} GiB "
            f"at most, {free / GIB:.1f} GiB free in {place}"
        )
        fix = "free some, lower config.checkpoint.keep_last, or use another workdir"
        if free < needed * size:
            return Finding("FAIL", f"{text}; {fix}")
        if free < kept * size:
            return Finding("warn", f"{text}; raise config.checkpoint.keep_every or move some away")
        return Finding("ok", text)

    def check_resume(self) -> Finding:
        """Whether the run starts from scratch, or goes on from a checkpoint of the same run."""
        step, damaged = newest_valid(self.checkpoints)
        if step is None:
            return Finding("ok", f"{self.workdir}: starts from scratch")
        folder = self.checkpoints / str(step)
        metadata = read_metadata(folder)
        check_model(folder, metadata, self.model)
        state = self.program.abstract_state()
        for name, like in (("params", state.params), ("opt_state", state.opt_state)):
            if name in metadata["arrays"]:
                check_arrays(folder, metadata, name, like)
        if self.data:
            self.data.check_continues(self.checkpoints, metadata)
        if step >= self.config.train.num_steps:
            return Finding("ok", f"{self.workdir}: finished, it is at step {step:,}")
        lines = [f"{self.workdir}: goes on from step {step:,}, which is whole"]
        if damaged:
            lines.append(f"the newer steps {damaged[::-1]} are damaged")
        lines += [f"changed {change}" for change in changes(metadata, self.config)]
        jump = rate_jump(metadata, self.config, step)
        return Finding("warn" if damaged or jump else "ok", "; ".join(lines + [jump] * bool(jump)))

    def check_memory(self) -> Finding:
        """The step, compiled for the devices that are here, against their memory."""
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        shared = 1
        if limit is None:  # CPU devices share the machine's memory
            limit, shared = _machine_memory(), jax.local_device_count()
        needed = shared * _bytes_on_a_device(self.program.abstract_state())
        what, fix = "the state of the run", STATE_FIX
        if needed <= limit:
            with memory_errors(STEP_FIX):
                sizes = self.program.lower().compile().memory_analysis()
            needed = shared * _bytes_of_a_step(sizes)
            what, fix = "a step", STEP_FIX
        text = f"{what} needs {needed / GIB:.2f} GiB of {limit / GIB:.2f} GiB"
        if needed > limit:
            return Finding("FAIL", f"{text}: {fix}")
        if needed > 0.9 * limit:
            return Finding("warn", f"{text}: tight")
        return Finding("ok", text)


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest above it that is there; dead links are there."""
    return next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be made in the folder, or where it would be made."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # a name that is too long, a file or a closed folder above it
        tempfile.TemporaryFile(dir=nearest_folder(folder)).close()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); use another workdir"
        ) from error


def lock_workdir(workdir: Path) -> int:
    """Holds the workdir until the descriptor is closed; UserError if another run does."""
    message = f"{workdir}: another run is training there; wait for it, or use another workdir"
    return lock_folder(workdir, message)


def _bytes_on_a_device(state: TrainState) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def _bytes_of_a_step(sizes) -> int:
    """All that the compiler counts: `compiled.memory_analysis()`."""
    returned = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    kept = sizes.argument_size_in_bytes + sizes.generated_code_size_in_bytes
    return kept + returned + sizes.temp_size_in_bytes


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
