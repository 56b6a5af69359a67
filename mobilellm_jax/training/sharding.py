"""The mesh, and the one table that says which array axis lies along which mesh axis."""

import contextlib

import flax.linen as nn
import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import abstract_params, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. `data` splits the batch; `fsdp` splits the batch and, along `embed`,
# the weights and the optimizer state; `tensor` splits heads, ffn and vocabulary.
RULES = (
    ("batch", ("data", "fsdp")),
    ("seq", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_ffn", "tensor"),
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("ffn", "tensor"),
    ("vocab", "tensor"),
)


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh over all devices; one device is a mesh of one.

    Args:
      config: `config.mesh` of a run: devices along each axis, at most one of them -1.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    sizes = [config[axis] for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} = {size}: use 1 or more, or -1 for the rest")
    known = 1
    for size in sizes:
        known *= max(1, size)
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif -1 in sizes or known != len(devices):
        shape = ", ".join(f"{axis}={config[axis]}" for axis in MESH_AXES)
        raise UserError(
            f"config.mesh ({shape}) does not multiply to the {len(devices)} devices here: "
            "set one axis to -1 to take what the others leave"
        )
    # Linen's constraints need axes that the compiler is free to propagate.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def on_mesh(mesh: Mesh):
    """Within it, logical constraints of activations refer to `mesh`; unknown names are errors."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of `[B, T]` arrays: rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """A `NamedSharding` for every parameter.

    Raises:
      UserError: a dimension that its mesh axis does not divide.
    """
    shardings = nn.logical_to_mesh_sharding(logical_axes(config), mesh, RULES)

    def check(path, array, sharding):
        for size, axis in zip(array.shape, sharding.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(key.key for key in path)
                raise UserError(
                    f"config.mesh.{axis} = {mesh.shape[axis]} does not divide {name} of shape "
                    f"{array.shape} along its dimension of {size}"
                )

    jax.tree.map_with_path(check, abstract_params(config), shardings)
    return shardings


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
