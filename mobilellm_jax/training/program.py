"""The jitted functions of a run and the shardings of their arrays, for `train` and for `plan`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution, execution_for
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.objectives.next_token import make_eval_step
from mobilellm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.training.sharding import (
    batch_sharding,
    batch_shards,
    on_mesh,
    opt_state_shardings,
    params_shardings,
    replicated,
)
from mobilellm_jax.training.step import TrainState, all_finite, make_train_step

_BATCH_DTYPES = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
}


class TrainProgram:
    """The jitted functions of a run on a mesh, which may be of devices that are not here.

    Attributes:
      model: the architecture.
      execution: with "auto" resolved for the devices of the mesh.
      mesh: where everything lies.
      optimizer: with its schedule.
      state_shardings: a `TrainState` of shardings.
      batch_sharding: of the `[B, T]` arrays of a batch.
      train_step, eval_step, all_finite: jitted; `train_step` takes over its state's memory.

    Args:
      config: a run config.
      model: its architecture.
      mesh: of `sharding.make_mesh`.
      sequence_length: T.

    Raises:
      UserError: a batch that the mesh does not split, a kernel that does not run on its devices.
    """

    def __init__(self, config: ConfigDict, model: ModelConfig, mesh: Mesh, sequence_length: int):
        check_batch(config.train, mesh)
        self.mesh = mesh
        self.model = model
        self.execution = resolved_execution(config, model, mesh, sequence_length)
        schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
        self.optimizer = make_optimizer(config.optimizer, schedule)
        self._seed = config.seed
        self._batch_shape = (config.train.global_batch_size, sequence_length)
        self.state_shardings = TrainState(
            step=replicated(mesh),
            params=params_shardings(self.model, mesh),
            opt_state=opt_state_shardings(self.optimizer, self.model, mesh),
        )
        self.batch_sharding = batch_sharding(mesh)
        train_step = make_train_step(
            self.model,
            self.execution,
            self.optimizer,
            schedule,
            accumulation_steps=config.train.accumulation_steps,
            mask_documents=config.data.mask_documents,
            gather=config.mesh.gather,
            shards=batch_shards(mesh),
        )
        self.train_step = jax.jit(
            train_step,
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, replicated(mesh)),
            donate_argnums=0,
        )
        eval_step = make_eval_step(
            self.model,
            self.execution,
            mask_documents=config.data.mask_documents,
            shards=batch_shards(mesh),
        )
        self.eval_step = jax.jit(
            eval_step, in_shardings=(self.state_shardings.params, self.batch_sharding)
        )
        self.all_finite = jax.jit(all_finite)

    def init_state(self) -> TrainState:
        """A fresh state where it belongs; the same weights on every mesh."""
        return jax.jit(self._init_state, out_shardings=self.state_shardings)()

    def init_opt_state(self, params: dict):
        """A fresh optimizer state for weights that came without one."""
        init = jax.jit(self.optimizer.init, out_shardings=self.state_shardings.opt_state)
        return init(params)

    def _init_state(self) -> TrainState:
        params = init_params(self.model, jax.random.key(self._seed))
        return TrainState(jnp.int32(0), params, self.optimizer.init(params))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            jax.eval_shape(self._init_state),
            self.state_shardings,
        )

    def lower(self) -> jax.stages.Lowered:
        """The training step, ready to be compiled for the devices of the mesh."""
        batch = {
            name: jax.ShapeDtypeStruct(self._batch_shape, dtype, sharding=self.batch_sharding)
            for name, dtype in _BATCH_DTYPES.items()
        }
        with on_mesh(self.mesh):
            return self.train_step.lower(self.abstract_state(), batch)

    def local_rows(self, num_rows: int) -> np.ndarray:
        """Which of a batch's rows the devices of this process work on, in order."""
        places = self.batch_sharding.addressable_devices_indices_map((num_rows, 1))
        return np.unique(np.concatenate([np.arange(num_rows)[rows] for rows, _ in places.values()]))

    def device_batch(self, batch: dict[str, np.ndarray], num_rows: int) -> dict[str, jax.Array]:
        """This process's rows of a batch of `num_rows` as its part of the global arrays."""
        local = self.local_rows(num_rows)

        def place(rows):
            def of_device(index):
                start, stop, _ = index[0].indices(num_rows)
                first = np.searchsorted(local, start)
                return rows[first : first + stop - start]

            shape = (num_rows, *rows.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_sharding, of_device)

        return {name: place(rows) for name, rows in batch.items()}


def resolved_execution(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, sequence_length: int
) -> Execution:
    """`config.execution` with "auto" resolved for the devices of the mesh."""
    device = mesh.devices.flat[0]
    return execution_for(device, model, sequence_length, **config.execution.to_dict())


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the batch does not split over the mesh and the accumulation steps."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulation_steps
    if config.global_batch_size % parts:
        nearest = max(1, round(config.global_batch_size / parts)) * parts
        raise UserError(
            f"config.train.global_batch_size = {config.global_batch_size} does not split into "
            f"{mesh.shape['data']} (data) x {mesh.shape['fsdp']} (fsdp) x "
            f"{config.accumulation_steps} (accumulation) parts: use {nearest}"
        )
