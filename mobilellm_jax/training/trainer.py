"""The training loop: from a run config and a workdir to a trained, checkpointed model."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mobilellm_jax.checkpoints.store import Checkpoints, Restored
from mobilellm_jax.data.loader import RecordSource, eval_batches, train_batches
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.perplexity import split_perplexity
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.machine.hardware import peak_flops
from mobilellm_jax.machine.signals import StopRequest, stop_signals
from mobilellm_jax.model.costs import count_params, train_flops_per_token
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.training.checks import RunChecks, lock_workdir
from mobilellm_jax.training.failures import (
    STATE_FIX,
    STEP_FIX,
    Diverged,
    finite_metrics,
    memory_errors,
)
from mobilellm_jax.training.metrics import MetricsLog
from mobilellm_jax.training.resumption import changes, rate_jump
from mobilellm_jax.training.sharding import on_mesh
from mobilellm_jax.training.step import TrainState

# Steps that may be dispatched before their results are waited for: enough to hide Python, few
# enough that a signal is answered soon and batches do not pile up on the device.
_MAX_AHEAD = 2

# What a model says of its answers, which training does not change; the dataset decides on BOS.
_PROMPT_KEYS = ("chat_template", "stop_ids")


def train(config: ConfigDict, workdir: str | Path, peers: RunCoordination | None = None) -> None:
    """Trains until `config.train.num_steps`, from the newest checkpoint in `workdir` if any.

    Running it again after any interruption goes on bitwise as if there had been none. SIGTERM and
    SIGINT save the current step and return, once there are steps: before, they end a single process
    as usual, and several save after their first one, as they agree only then.

    Args:
      config: of the run.
      workdir: for all that it leaves, on a file system that all its processes share.
      peers: of `processes.joined`, which watches over several processes.

    Raises:
      UserError: settings that contradict each other, the data or the workdir's checkpoints.
      Diverged: NaN or Inf; nothing of it is saved.
    """
    workdir = local_path(workdir)
    peers = peers or RunCoordination()
    run = _Run(config, workdir, peers)
    settings = config.checkpoint
    with (
        stop_signals() as stop,  # outermost: leaving Checkpoints waits for the last save
        on_mesh(run.program.mesh),
        _held(workdir),
        Checkpoints(
            workdir, keep_last=settings.keep_last, keep_every=settings.keep_every or None
        ) as checkpoints,
    ):
        if peers.num_processes > 1:
            stop.listen()
        with memory_errors(STATE_FIX):
            start_step, state = run.restore_or_init(checkpoints)
        if start_step >= config.train.num_steps:
            print(f"finished: {workdir} is at step {start_step:,} of {config.train.num_steps:,}")
            return
        run.announce(workdir, start_step)
        log = run.metrics_log(workdir, start_step)
        with contextlib.closing(log), memory_errors(STEP_FIX), peers.contact():
            step = run.loop(start_step, state, checkpoints, log, stop)
    if step < config.train.num_steps:
        print(f"stopped by a signal, step {step:,} is saved; run the same command to go on")
    else:
        print(f"finished: step {step:,}, checkpoint and loss curve (loss.png) in {workdir}")


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of the workdir (the first process holds it for all)."""
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be made a workdir ({error.strerror}); name another"
        ) from error
    lock = lock_workdir(workdir)
    try:
        yield
    finally:
        os.close(lock)


class _Run:
    """What stays the same from the first step of a run to its last."""

    def __init__(self, config: ConfigDict, workdir: Path, peers: RunCoordination):
        self.config = config
        self.peers = peers
        checks = RunChecks(config, workdir, peers)
        checks.require()
        self.model, self.data, self.program = checks.model, checks.data, checks.program
        self.tokens_per_step = config.train.global_batch_size * self.data.seq_len
        self.flops_per_token = train_flops_per_token(self.model, self.data.seq_len).causal
        self.peak = peak_flops(jax.local_devices()[0], self.program.execution.dtype)
        self.prompt_format: dict[str, Any] = {}  # of the model that training goes on with

    def restore_or_init(self, checkpoints: Checkpoints) -> tuple[int, TrainState]:
        """The state of the newest valid checkpoint, or a fresh one made on its shardings."""
        like = self.program.abstract_state()
        restored = checkpoints.restore(
            config=self.model, params_like=like.params, opt_state_like=like.opt_state
        )
        if restored is None:
            return 0, self.program.init_state()
        self.data.check_continues(checkpoints.directory, restored.metadata)
        opt_state = restored.opt_state
        if opt_state is None:
            opt_state = self.program.init_opt_state(restored.params)
        step = jax.device_put(np.int32(restored.step), self.program.state_shardings.step)
        print(f"resuming from step {restored.step:,} in {checkpoints.directory}")
        self.prompt_format = {
            key: restored.metadata[key] for key in _PROMPT_KEYS if key in restored.metadata
        }
        self.announce_changes(restored)
        note = self.data.keep_loss(restored.step, restored.metadata)
        if note and jax.process_index() == 0:
            print(note)
        return restored.step, TrainState(step, restored.params, opt_state)

    def announce_changes(self, restored: Restored) -> None:
        """Prints the differences from the run that saved the checkpoint."""
        if jax.process_index() != 0 or restored.step >= self.config.train.num_steps:
            return
        for change in changes(restored.metadata, self.config):
            print(f"changed   {change}")
        if jump := rate_jump(restored.metadata, self.config, restored.step):
            print(f"warning   {jump}")

    def metadata(self, step: int) -> dict:
        """What a checkpoint says of the run, beside its arrays."""
        return {
            **self.prompt_format,
            "model": self.model.to_dict(),
            "position": step * self.config.train.global_batch_size,
            "bos": self.data.first.header.bos,
            "mask_documents": self.config.data.mask_documents,
            "loss_version": self.data.loss_version,
            "sequence_length": self.data.seq_len,
            "sample_order": self.data.sample_order(),
            "run": json.loads(self.config.to_json_best_effort()),
        }

    def metrics_log(self, workdir: Path, start_step: int) -> MetricsLog:
        """The log of this run, what was logged after `start_step` dropped."""
        return MetricsLog(
            workdir,
            resume_step=start_step,
            total_steps=self.config.train.num_steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_token=self.flops_per_token,
            peak_flops_total=self.peak and self.peak * self.program.mesh.size,
            tokens_per_epoch=self.data.num_train_records * self.data.seq_len,
            enabled=jax.process_index() == 0,
        )

    def announce(self, workdir: Path, start_step: int) -> None:
        """Prints and saves the resolved config, and says what is about to run."""
        if jax.process_index() != 0:
            return
        text = self.config.to_json_best_effort(indent=2)
        write_file(workdir / "config.json", (text + "\n").encode())
        total = self.config.train.num_steps * self.tokens_per_step
        data = self.data.num_train_tokens
        mesh = self.program.mesh
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        device = f"{mesh.size} x {mesh.devices.flat[0].device_kind} (mesh: {axes})"
        print(self.config)
        print(
            f"model    {count_params(self.model):,} parameters, {self.model.num_layers} stored "
            f"blocks run as {self.model.depth}, {self.flops_per_token / 1e9:.3f} GFLOP per token\n"
            f"data     {data:,} tokens in {len(self.data.datasets)} dataset(s), "
            f"{self.data.seq_len} per sequence; the run takes {total:,} "
            f"({total / data:.2f} epochs)\n"
            f"batch    {self.tokens_per_step:,} tokens per step, "
            f"{self.config.train.num_steps:,} steps, from step {start_step:,}\n"
            f"devices  {device}, {self.program.execution.dtype}, {self.describe_peak()}\n"
            f"eval     {self.describe_eval()}",
            flush=True,
        )

    def describe_peak(self) -> str:
        """The denominator of MFU, in words."""
        if self.peak is None:
            return "no published peak, so no MFU"
        return f"published peak {self.peak / 1e12:.3g} TFLOP/s each"

    def describe_eval(self) -> str:
        """What the loop evaluates on, in words."""
        dataset, settings = self.data.first, self.config.eval
        if "valid" not in dataset.header.splits:
            return f"none: {dataset.directory} has no valid split"
        if not settings.every_steps:
            return "none: config.eval.every_steps = 0"
        num_records = min(settings.num_records, dataset.header.splits["valid"].num_records)
        every = f"every {settings.every_steps:,} steps"
        return f"{every} on {num_records:,} records of {dataset.directory}"

    def loop(
        self,
        start_step: int,
        state: TrainState,
        checkpoints: Checkpoints,
        log: MetricsLog,
        stop: StopRequest,
    ) -> int:
        """Steps from `start_step` to the end or to a signal; returns the last step done."""
        step, pending = start_step, {}
        compiled = self.compile()
        stop.listen()
        self.peers.start_clock()
        with contextlib.closing(self.training_batches(start_step)) as batches:
            for batch in batches:
                if step == start_step:
                    log.start_clock(step)
                state, pending[step + 1] = compiled(state, batch)
                step += 1
                if (behind := step - _MAX_AHEAD) in pending:
                    jax.block_until_ready(pending[behind])
                    self.peers.done(behind)
                stopping = stop.agreed(step)
                if due := self.due(step, stopping):
                    values = finite_metrics(pending)
                    pending = {}
                    self.peers.done(step)
                    if "log" in due:
                        log.log_train(step, {f"train/{k}": v for k, v in values.items()})
                    with log.paused(), self.peers.busy(f"at step {step:,}: {', '.join(due)}"):
                        # In this order: after a kill, what is not saved is evaluated again.
                        if "eval" in due:
                            self.evaluate(step, state, log)
                        if "save" in due:
                            self.save(step, state, checkpoints)
                if stopping:
                    break
        return step

    def due(self, step: int, stopping: bool) -> set[str]:
        """What is to be done after `step`: any of "log", "eval" and "save"."""
        last = step == self.config.train.num_steps
        due = set()
        if last or step % self.config.log.every_steps == 0:
            due.add("log")
        every = self.config.eval.every_steps
        if every and (last or step % every == 0):
            due.add("eval")
        if last or stopping or step % self.config.checkpoint.every_steps == 0:
            due.add("save")
        return due

    def save(self, step: int, state: TrainState, checkpoints: Checkpoints) -> None:
        """Starts saving a checkpoint; raises Diverged instead if a weight is NaN or Inf."""
        if not self.program.all_finite(state.params):
            raise Diverged(step, "a weight is NaN or Inf")
        checkpoints.save(
            step,
            params=state.params,
            opt_state=state.opt_state,
            metadata=self.metadata(step),
            tokenizer=self.data.tokenizer,
        )

    def training_batches(self, start_step: int) -> Iterator[dict[str, jax.Array]]:
        """The global batches from `start_step` to the end of the run."""
        size = self.config.train.global_batch_size
        batches = train_batches(
            self.data.datasets,
            seed=self.config.seed,
            global_batch_size=size,
            sequence_length=self.data.seq_len,
            across_documents=self.data.across_documents,
            start_step=start_step,
            num_steps=self.config.train.num_steps,
            rows=self.program.local_rows(size),
        )
        with contextlib.closing(batches):
            for batch in batches:
                yield self.program.device_batch(batch, size)

    def compile(self) -> Callable:
        """The compiled training step; says how long it took."""
        start = time.monotonic()
        if jax.process_index() == 0:
            print("compiling the training step ...", flush=True)
        compiled = self.program.lower().compile()
        if jax.process_index() == 0:
            print(f"compiled in {time.monotonic() - start:.1f} s", flush=True)
        return compiled

    def evaluate(self, step: int, state: TrainState, log: MetricsLog) -> None:
        """Logs the loss on the first records of the (first dataset's) validation split."""
        if "valid" not in self.data.first.header.splits:
            return
        source = RecordSource(self.data.first, "valid")
        size = self.config.train.global_batch_size // self.config.train.accumulation_steps
        batches = eval_batches(
            source,
            batch_size=size,
            max_records=self.config.eval.num_records,
            across_documents=self.data.across_documents,
            rows=self.program.local_rows(size),
        )
        result = split_perplexity(
            self.program.eval_step,
            state.params,
            (self.program.device_batch(batch, size) for batch in batches),
            source,
        )
        log.log_eval(step, result.metrics())
