"""The mesh, and the one table that says which array axis lies along which mesh axis."""

import contextlib
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import abstract_params, logical_axes
from mobilellm_jax.objectives.embedding_gradient import BatchShards

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. `data` splits the batch; `fsdp` splits the batch and, along `embed`,
# the master weights and the optimizer state; `tensor` splits heads, ffn and vocabulary.
RULES = (
    ("batch", ("data", "fsdp")),
    ("replicas", "data"),
    ("seq", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_ffn", "tensor"),
    ("layers", None),
    ("embed", "fsdp"),
    ("norm", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("ffn", "tensor"),
    ("vocab", "tensor"),
)


def make_mesh(
    config: ConfigDict, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over all devices; one device is a mesh of one.

    Neighbours along `tensor` and `fsdp` are neighbours on the fast network; what the slices of a
    multi-slice TPU are joined by is crossed along `data` as far as its size allows.

    Args:
      config: `config.mesh` of a run: devices along each axis, -1 for what the others leave. With
        -1 for both, `fsdp` takes as many as leave each a multiple of 8 rows of `embed_dim` (a tile
        of a TPU, which reduce-scatters nothing smaller), `data` the rest.
      model: what is to be laid out on the mesh.
      devices: all devices of the job; those of this runtime by default.

    Raises:
      UserError: axes that do not multiply to the number of devices, or do not divide the model.
    """
    devices = jax.devices() if devices is None else devices
    shape = _mesh_shape(config, model, len(devices))
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices > 1:
        across = _spread(slices, shape)
        within = [size // slow for size, slow in zip(shape, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True, contiguous_submeshes=False
        )
    # Linen's constraints need axes that the compiler is free to propagate.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh_shape(config: ConfigDict, model: ModelConfig, num_devices: int) -> tuple[int, ...]:
    sizes = {axis: config[axis] for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} = {size}: use 1 or more, or -1 for the rest")
    fitting = [
        shape
        for shape in mesh_shapes(num_devices, model)
        if all(size in (-1, n) for size, n in zip(sizes.values(), shape, strict=True))
    ]
    if fitting:
        # More than one only if two are open.
        return max(fitting, key=lambda shape: (model.embed_dim // shape[1] % 8 == 0, shape[1]))
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_to_all = math.prod(max(1, size) for size in sizes.values())
    reason = (
        f"does not multiply to the {num_devices} devices"
        if num_devices % open_to_all or (-1 not in sizes.values() and open_to_all != num_devices)
        else f"does not divide the model ({_divided_sizes(model)})"
    )

    def distance(shape):
        return sum(
            abs(math.log(size / n))
            for size, n in zip(sizes.values(), shape, strict=True)
            if size != -1
        )

    nearest = min(mesh_shapes(num_devices, model), key=distance)
    mend = " ".join(f"--config.mesh.{a}={n}" for a, n in zip(MESH_AXES, nearest, strict=True))
    raise UserError(f"config.mesh ({asked}) {reason}; the nearest that works: {mend}")


def mesh_shapes(num_devices: int, model: ModelConfig) -> list[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) of that many devices whose axes divide the model."""
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    split_by_tensor = (model.num_heads, model.num_kv_heads, model.ffn_dim, model.vocab_size)
    return [
        (num_devices // (fsdp * tensor), fsdp, tensor)
        for tensor in sizes
        if not any(size % tensor for size in split_by_tensor)
        for fsdp in sizes
        if num_devices % (fsdp * tensor) == 0 and model.embed_dim % fsdp == 0
    ]


def _divided_sizes(model: ModelConfig) -> str:
    return (
        f"fsdp has to divide embed_dim {model.embed_dim}; tensor the {model.num_heads} heads, "
        f"{model.num_kv_heads} kv heads, ffn_dim {model.ffn_dim} and vocab_size {model.vocab_size}"
    )


def _spread(slices: int, shape: Sequence[int]) -> list[int]:
    """How many slices lie along each axis: `data` first."""
    across = []
    for size in shape:
        across.append(math.gcd(size, slices))
        slices //= across[-1]
    assert slices == 1, "the mesh has all devices, and slices are equal in size"
    return across


@contextlib.contextmanager
def on_mesh(mesh: Mesh):
    """Within it, logical constraints of activations refer to `mesh`; unknown names are errors."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of `[B, T]` arrays: rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh) -> BatchShards:
    """How the rows of a batch are split; devices along `fsdp` together store one copy."""
    return BatchShards(mesh.shape["data"] * mesh.shape["fsdp"], in_group=mesh.shape["fsdp"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """A `NamedSharding` for every parameter."""
    return nn.logical_to_mesh_sharding(logical_axes(config), mesh, RULES)


def opt_state_shardings(optimizer: optax.GradientTransformation, config: ModelConfig, mesh: Mesh):
    """Moments lie where their parameters lie; counters are on every device."""
    abstract = jax.eval_shape(optimizer.init, abstract_params(config))
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract,
        params_shardings(config, mesh),
        transform_non_params=lambda _: replicated(mesh),
    )
