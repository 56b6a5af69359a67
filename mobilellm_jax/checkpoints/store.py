"""Checkpoints that are whole or not there: saved in the background, verified before use.

    WORKDIR/checkpoints/<step>/params/         Orbax
                              /opt_state/      Orbax; absent from imported models
                              /metadata.json   step, model config, tokenizer hash, versions, run
                              /tokenizer.model
                              /manifest.json   size and SHA-256 of all of the above
    WORKDIR/checkpoints_damaged/<step>-<n>/    what failed its verification, moved aside

Orbax writes a step into a temporary folder and renames it when everything is there. Its
`post_finalization_callback` (orbax-checkpoint 0.12: `AsyncCheckpointer._make_on_commit_callback`)
runs on process 0 only, in the background, once the array files of all processes are finished and
before the renaming, so the manifest becomes visible together with the step. Old steps are deleted
after that. Data order is a pure function of (seed, position), so the step is all that a run needs
besides the arrays.
"""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mobilellm_jax import interrupts
from mobilellm_jax.checkpoints.files import (
    CHECKPOINTS_NAME,
    METADATA_NAME,
    check_is_workdir,
    check_model,
    encode_metadata,
    list_steps,
    newest_valid,
    raise_if_damaged,
    read_metadata,
    read_tree,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.storage.atomic import no_new_parents_on_error, removed_on_error, write_file
from mobilellm_jax.storage.manifest import write_manifest
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.tokenizers.files import write_tokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

DAMAGED_NAME = "checkpoints_damaged"

_NOTHING, _ALL_DAMAGED = -1, -2


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: updates done.
      params: arrays in the tree, dtypes and shardings of `params_like`.
      opt_state: likewise of `opt_state_like`; None for a checkpoint of parameters only.
      metadata: what was given to `save`, with "step", "tokenizer_sha256", "arrays", "versions".
    """

    step: int
    params: Any
    opt_state: Any | None
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pending:
    step: int
    metadata: bytes
    tokenizer: Tokenizer | None


class Checkpoints:
    """The checkpoints of one run. Every method is called by all processes of the run.

    Use as a context manager: leaving it waits for the last save, whose error fails the run.

    Args:
      workdir: the run's folder, on a file system that all processes share.
      keep_last: how many of the newest steps to keep.
      keep_every: also keep all steps that are multiples of this; None keeps no others.

    Raises:
      UserError: `workdir` cannot be written to, or a number is not positive.
    """

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_every: int | None = None):
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} = {value}: use 1 or more")
        self.directory = local_path(workdir).absolute() / CHECKPOINTS_NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()
            if jax.process_index() == 0:
                # Orbax would do it in the background, and the space counts.
                _remove_half_written(self.directory)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot write checkpoints here ({error.strerror}); "
                "use another workdir"
            ) from error
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "opt_state"):
            # Weights shrink by 8%, for 7 times the processor time.
            handler = ocp.handlers.PyTreeCheckpointHandler(use_compression=False)
            registry.add(item, ocp.args.PyTreeSave, handler)
        self._manager = ocp.CheckpointManager(
            self.directory,
            handler_registry=registry,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
                # Else it reads files here that no manifest covers.
                lightweight_initialize=True,
            ),
        )
        self._pending: _Pending | None = None
        self._current_step: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except UserError as save_error:
            if error is None:
                raise
            logging.error("%s", save_error)  # the first error is the one to be seen

    def save(
        self,
        step: int,
        *,
        params: Any,
        opt_state: Any | None,
        metadata: Mapping[str, Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Starts saving `step`; returns when the arrays may be changed or donated.

        Waits for an earlier save that is still under way. Saving the step that was restored or
        saved last does nothing.

        Args:
          step: updates done.
          params, opt_state: trees of arrays, on any sharding; `opt_state` None leaves it out.
          metadata: JSON-ready values; "model" must be the `ModelConfig.to_dict()`.
          tokenizer: the one that the run's tokens come from.

        Raises:
          UserError: the EARLIER save failed, the disk is too full for this one, or this or a
            newer step is there already.
        """
        self.wait()
        if step == self._current_step:
            return
        newer = [old for old in self._manager.all_steps() if old >= step]
        if newer:
            raise UserError(
                f"{self.directory} already has step {newer[-1]}, so step {step} would not be the "
                "newest; move newer steps away or use another workdir"
            )
        trees = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        self._check_free_space(trees)
        content = encode_metadata(step, trees, metadata, tokenizer)
        self._pending = _Pending(step, content, tokenizer)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        try:
            # Forced, because the trainer has decided when to save.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._not_saved(error) from error
        self._current_step = step

    def restore(
        self,
        *,
        config: ModelConfig,
        params_like: Any,
        opt_state_like: Any,
        step: int | None = None,
    ) -> Restored | None:
        """Reads the newest valid step, or `step`.

        Steps that fail their verification are reported and, when an older one is valid, moved to
        `checkpoints_damaged`, so that they can be saved again.

        Args:
          config: the model that the run trains.
          params_like, opt_state_like: trees of `jax.ShapeDtypeStruct` or arrays. Their shardings
            are those of the result; none means the first device.
          step: the step to read; if it is not valid that is an error.

        Returns:
          None when there are no checkpoints at all.

        Raises:
          UserError: no valid step, or one of another model or optimizer.
        """
        self.wait()
        chosen = _from_first_process(self._choose, step)
        self._manager.reload()
        if chosen == _NOTHING:
            return None
        if chosen == _ALL_DAMAGED:
            raise UserError(f"no valid checkpoint in {self.directory}; see process 0")
        folder = self.directory / str(chosen)
        metadata = read_metadata(folder)
        check_model(folder, metadata, config)
        likes = {"params": params_like}
        if "opt_state" in metadata["arrays"]:
            likes["opt_state"] = opt_state_like
        trees = {name: read_tree(folder, metadata, name, like) for name, like in likes.items()}
        self._current_step = chosen
        return Restored(
            step=chosen,
            params=trees["params"],
            opt_state=trees.get("opt_state"),
            metadata=metadata,
        )

    def latest_step(self) -> int | None:
        """The newest step that was committed, verified or not; waits for no save."""
        return max(list_steps(self.directory), default=None)

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def close(self) -> None:
        """Waits like `wait` and frees what Orbax holds."""
        errors = []
        for finish in (self._manager.wait_until_finished, self._manager.close):
            try:
                finish()
            except Exception as error:
                errors.append(error)
        if errors:
            raise self._not_saved(errors[0]) from errors[0]

    def _seal(self) -> None:
        """Completes the pending step's folder (see the module's docstring)."""
        pending = self._pending
        assert pending is not None
        folder = self.directory / str(pending.step)
        if not folder.exists():
            (folder,) = self.directory.glob(f"{pending.step}{ocp.utils.TMP_DIR_SUFFIX}*")
        write_file(folder / METADATA_NAME, pending.metadata)
        if pending.tokenizer is not None:
            write_tokenizer(folder, pending.tokenizer)
        write_manifest(folder, pending.step)

    def _not_saved(self, error: Exception) -> UserError:
        self._current_step = None
        step = self._pending.step if self._pending else None
        return UserError(
            f"{self.directory}: step {step} was not saved ({type(error).__name__}: {error}); older "
            "steps are untouched. Free some space or repair the disk, then run the same command"
        )

    def _check_free_space(self, trees: Mapping[str, Any]) -> None:
        """Orbax itself reports a full disk one save late."""
        needed = checkpoint_bytes(trees)
        # Some network disks say that they have no end; what is sent has 61 bits.
        free = _from_first_process(
            lambda: min(shutil.disk_usage(self.directory).free, (1 << 61) - 1)
        )
        if free < needed:
            raise UserError(
                f"{self.directory}: a checkpoint needs {needed:,} bytes, {free:,} are free; "
                "free some space or use another workdir"
            )

    def _choose(self, step: int | None) -> int:
        """The step to restore, all damaged ones newer than it out of the way."""
        if step is not None:
            if step not in (steps := sorted(list_steps(self.directory))):
                raise UserError(f"{self.directory} has no step {step}; it has {steps}")
            raise_if_damaged(self.directory / str(step), step)
            return step
        # If all are damaged they stay: a second try must not find an empty folder and start anew.
        found, damaged = newest_valid(self.directory)
        for number in damaged:
            self._move_aside(number)
        return _NOTHING if found is None else found

    def _move_aside(self, step: int) -> None:
        folder = self.directory.parent / DAMAGED_NAME
        folder.mkdir(exist_ok=True)
        number = 0
        while (target := folder / f"{step}-{number}").exists():
            number += 1
        (self.directory / str(step)).rename(target)
        logging.warning("moved the damaged step %d to %s", step, target)


def checkpoint_bytes(trees: Any) -> int:
    """Bytes of a checkpoint of these arrays, real or abstract, on a disk; rather too many."""
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
    return arrays + arrays // 50 + (1 << 20)


def save_model(workdir: str | Path, model: ModelBundle) -> None:
    """Writes a checkpoint without optimizer state, as step 0 of a new `workdir`.

    Raises:
      UserError: `workdir` has checkpoints already, is not writable or too full.
    """
    workdir = local_path(workdir)
    check_is_workdir(workdir)
    with (
        no_new_parents_on_error(workdir),
        removed_on_error(functools.partial(_leave_nothing, workdir, workdir.exists())),
        interrupts.working(unwound=False),  # the threads that write would go on
        Checkpoints(workdir, keep_last=1) as checkpoints,
    ):
        if (step := checkpoints.latest_step()) is not None:
            raise UserError(f"{checkpoints.directory} already has step {step}; use another workdir")
        checkpoints.save(
            0,
            params=model.params,
            opt_state=None,
            metadata=model.to_record() | {"model": model.config.to_dict()},
            tokenizer=model.tokenizer,
        )


def _leave_nothing(workdir: Path, existed: bool) -> None:
    """Removes what `save_model` has begun, but no step."""
    directory = workdir / CHECKPOINTS_NAME
    for _ in range(3):  # the threads may add to a folder that is being removed
        _remove_half_written(directory)
    with contextlib.suppress(OSError):  # not empty
        directory.rmdir()
        if not existed:
            workdir.rmdir()


def _remove_half_written(directory: Path) -> None:
    for half_written in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(half_written, ignore_errors=True)


def _from_first_process(function, *args) -> int:
    """Calls `function` on process 0 and gives all processes its result or an error."""
    if jax.process_count() == 1:
        return function(*args)
    value, error = _ALL_DAMAGED, None
    if jax.process_index() == 0:
        try:
            value = function(*args)
        except Exception as caught:  # else the others would wait for ever
            error = caught
    # Two halves, because JAX would cut 64 bits to 32.
    halves = multihost_utils.broadcast_one_to_all(np.array(divmod(value, 1 << 30), np.int32))
    if error is not None:
        raise error
    return int(halves[0]) * (1 << 30) + int(halves[1])
