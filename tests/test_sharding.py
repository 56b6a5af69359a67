"""Meshes and layouts: what is refused, what lies where, and that every mesh trains alike."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_cases import ALL_KINDS, random_params, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.training import sharding
from mobilellm_jax.training.program import TrainProgram
from mobilellm_jax.training.run_config import default_config
from mobilellm_jax.training.step import TrainState

LOSS_ATOL = 5e-6
PARAMS_ATOL = 2e-4
MODEL = tiny(vocab_size=56)
B, T, STEPS = 8, 12, 3


def run_config(model=MODEL, mesh=(1, 1, 1), gather="step", **execution):
    config = default_config()
    config.model.update(model.to_dict())
    config.mesh.update(dict(zip(sharding.MESH_AXES, mesh, strict=True)), gather=gather)
    config.execution.update(execution)
    config.train.update(num_steps=10, global_batch_size=B)
    config.optimizer.update(peak_lr=1e-2, warmup_steps=1)
    return config


def make_program(config, devices=None):
    model = dataclasses.replace(MODEL, **config.model.to_dict())
    return TrainProgram(config, model, sharding.make_mesh(config.mesh, model, devices), T)


def make_batch(vocab_size):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (B, T + 1)).astype(np.int32)
    weights = (rng.random((B, T)) > 0.4).astype(np.float32)
    weights[0] = 0  # rows of very different numbers of tokens
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32),
    }


def train(program):
    """Three steps of the compiled program from fixed weights."""
    params = random_params(program.model)
    state = TrainState(jnp.int32(0), params, program.optimizer.init(params))
    state = jax.device_put(state, program.state_shardings)
    compiled, losses = program.lower().compile(), []
    for _ in range(STEPS):
        batch = program.device_batch(make_batch(program.model.vocab_size), B)
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def one_device(devices):
    return train(make_program(run_config(), devices[:1]))


@pytest.mark.parametrize(
    ("mesh", "gather"),
    [
        ((8, 1, 1), "step"),
        ((1, 8, 1), "step"),
        ((1, 8, 1), "layer"),
        ((2, 2, 2), "step"),
        ((2, 2, 2), "layer"),
        ((4, 1, 2), "step"),
    ],
)
def test_every_mesh_trains_like_one_device(mesh, gather, one_device, devices):
    state, losses = train(make_program(run_config(mesh=mesh, gather=gather)))
    np.testing.assert_allclose(losses, one_device[1], atol=LOSS_ATOL)
    expected = jax.device_get(one_device[0].params)
    chex.assert_trees_all_close(jax.device_get(state.params), expected, atol=PARAMS_ATOL)
    _, fsdp, tensor = mesh
    up = state.params["blocks"]["ffn"]["up"]
    assert up.sharding.spec == P(None, "fsdp", "tensor")
    assert up.addressable_shards[0].data.size == up.size // (fsdp * tensor)
    moments = jax.tree.leaves(state.opt_state[1][0].mu)
    assert [m.sharding for m in moments] == [p.sharding for p in jax.tree.leaves(state.params)]


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["step", "layer"])
@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_sharing_order_trains_sharded(name, gather, devices):
    model = dataclasses.replace(ALL_KINDS[name], vocab_size=56)
    mesh = (4, 2, 1) if model.num_kv_heads == 1 else (2, 2, 2)
    config = run_config(model, mesh, gather, remat="dots")
    config.train.accumulation_steps = mesh[2]  # as many as there are rows for
    _, losses = train(make_program(config))
    _, expected = train(make_program(run_config(model), devices[:1]))
    np.testing.assert_allclose(losses, expected, atol=LOSS_ATOL)


def collectives(program):
    """(operation, dtype and shape of the result) of every collective of the compiled step."""
    text = program.lower().compile().as_text()
    pattern = r"= \(?(\w+\[[\d,]*\]).*? (all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    return [(operation, shape) for shape, operation in re.findall(pattern, text)]


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_activations_are_never_gathered(gather, devices):
    """The batch stays split; only weights, gradients and scalars travel."""
    program = make_program(run_config(mesh=(2, 4, 1), gather=gather))
    sizes = {np.prod(p.shape[1:]) for p in jax.tree.leaves(program.abstract_state().params)}
    largest = max(MODEL.vocab_size * MODEL.embed_dim, MODEL.num_layers * max(sizes))
    found = collectives(program)
    assert found
    for operation, shape in found:
        numbers = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]
        assert np.prod(numbers) <= largest, (operation, shape)
        assert not (operation == "all-gather" and B * T in numbers), (operation, shape)


def test_both_open_axes_leave_whole_tiles_of_the_model(devices):
    def shape_on(num_devices, preset):
        model = PRESETS[preset]
        settings = default_config(preset).mesh
        return sharding._mesh_shape(settings, model, num_devices)

    assert shape_on(1, "125m") == (1, 1, 1)
    assert shape_on(8, "125m") == (1, 8, 1)
    assert shape_on(256, "125m") == (32, 8, 1)
    assert shape_on(256, "600m") == (16, 16, 1)
    assert shape_on(256, "1b") == (8, 32, 1)
    assert shape_on(7, "125m") == (7, 1, 1)


def test_axes_divide_all_that_they_split():
    """MODEL is 24 wide and has 4 heads, 2 kv heads, an ffn of 40 and a vocabulary of 56."""
    shapes = sharding.mesh_shapes(16, MODEL)
    assert sorted(shapes) == [
        *[(1, 8, 2), (2, 4, 2), (2, 8, 1), (4, 2, 2)],
        *[(4, 4, 1), (8, 1, 2), (8, 2, 1), (16, 1, 1)],
    ]
    for odd in ({"vocab_size": 55}, {"ffn_dim": 41}, {"num_kv_heads": 1}):
        shapes = sharding.mesh_shapes(2, dataclasses.replace(MODEL, **odd))
        assert sorted(shapes) == [(1, 2, 1), (2, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), r"data=3, fsdp=1, tensor=1.* does not multiply to the 8 devices; .*data=8"),
        ((-1, 3, 1), r"does not multiply to the 8 devices; the nearest that works: .*fsdp=4"),
        ((-1, 1, 8), r"does not divide the model \(.* 4 heads, 2 kv heads.*; .*tensor=2"),
        ((-1, 0, 1), "fsdp = 0: use 1 or more, or -1"),
        ((-2, 1, 1), "data = -2: use 1 or more, or -1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_nearest_that_does(shape, message, devices):
    with pytest.raises(UserError, match=message) as error:
        make_program(run_config(mesh=shape))
    if "nearest" in message:
        nearest = [int(n) for n in re.findall(r"--config\.mesh\.\w+=(\d+)", str(error.value))]
        make_program(run_config(mesh=nearest))


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What JAX's mesh helpers look at, of a TPU chip in one of several slices."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)

    core_on_chip = 0


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 2, 1), "data"), ((2, 4, 1), "data"), ((1, 8, 1), "fsdp")]
)
def test_slices_lie_along_data_as_far_as_it_goes(shape, axis):
    chips = [SliceDevice(i, i // 4) for i in range(8)]
    settings = run_config(mesh=shape).mesh
    grid = sharding.make_mesh(settings, MODEL, chips).devices
    of_slice = np.vectorize(lambda chip: chip.slice_index)(grid)
    moved = np.moveaxis(of_slice, sharding.MESH_AXES.index(axis), 0)
    half = len(moved) // 2
    assert (moved[:half] == 0).all() and (moved[half:] == 1).all()


def test_every_logical_axis_has_a_rule():
    axes = jax.tree.leaves(sharding.logical_axes(MODEL), is_leaf=lambda x: isinstance(x, P))
    assert {name for spec in axes for name in spec} <= {name for name, _ in sharding.RULES}


def test_a_process_loads_the_rows_of_its_own_devices(devices):
    program = make_program(run_config(mesh=(2, 2, 2)))
    assert program.local_rows(B).tolist() == list(range(B))
    batch = {"inputs": np.arange(B * T, dtype=np.int32).reshape(B, T)}
    placed = program.device_batch(batch, B)["inputs"]
    chex.assert_trees_all_equal(np.asarray(placed), batch["inputs"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(B // 4, T)}
