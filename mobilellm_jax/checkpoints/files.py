"""A checkpoint's folder: its files besides Orbax's own, and reading them.

Saving, and restoring a run, is in `mobilellm_jax.checkpoints.store`.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import abstract_params
from mobilellm_jax.model_bundle import ModelBundle, check_stop_ids, read_record
from mobilellm_jax.storage.exports import CHECKSUMS
from mobilellm_jax.storage.manifest import MANIFEST_NAME, find_damage
from mobilellm_jax.storage.paths import is_utf8, local_path
from mobilellm_jax.tokenizers.files import read_tokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

CHECKPOINTS_NAME = "checkpoints"
METADATA_NAME = "metadata.json"

_PACKAGES = ("mobilellm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_FEW = 5  # differences that an error message lists


def list_steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


# A file -> the folder that has it.
_OTHER_FOLDERS = {
    "dataset.json": "a dataset",
    MANIFEST_NAME: "a checkpoint",
    CHECKSUMS: "an exported model",
    "model.safetensors": "a Hugging Face folder",
    "pytorch_model.bin": "a Hugging Face folder",
}


def check_is_workdir(path: Path) -> None:
    """Refuses folders that a run would spoil: it writes config.json, and seals name every file.

    Raises:
      UserError: a dataset, a model or checkpoints, none of which is a workdir already; a name that
        the library of the checkpoints cannot write.
    """
    if not is_utf8(str(path)):
        raise UserError(
            f"{str(path)!a} is not UTF-8, and no checkpoint can be written there; rename"
        )
    if (path / CHECKPOINTS_NAME).is_dir():
        return
    what = next((what for name, what in _OTHER_FOLDERS.items() if (path / name).exists()), None)
    if list_steps(path) and path.name == CHECKPOINTS_NAME:
        what = "the checkpoints of a run"
    if what is not None:
        raise UserError(f"{path}: is {what}, which a run would write into; use another workdir")


def find_valid(path: Path) -> Path:
    """The newest valid step's folder at or below `path`."""
    path = path.absolute()  # Orbax insists
    if (path / "params").is_dir() or (path / MANIFEST_NAME).exists():
        raise_if_damaged(path, None, sizes_only="opt_state")
        return path
    directory = path / CHECKPOINTS_NAME if (path / CHECKPOINTS_NAME).is_dir() else path
    step, _ = newest_valid(directory, sizes_only="opt_state")
    if step is None:
        raise UserError(
            f"{path}: no checkpoint here; use a run's workdir, its {CHECKPOINTS_NAME!r} folder, "
            "the folder of one step or a Hugging Face folder with config.json"
        )
    return directory / str(step)


def newest_valid(directory: Path, *, sizes_only: str | None = None) -> tuple[int | None, list[int]]:
    """The newest step that is whole, and the damaged ones that are newer; warns of the latter.

    Args:
      directory: of the steps; it need not exist.
      sizes_only: as for `find_damage`.

    Returns:
      The step is None where there are none at all.

    Raises:
      UserError: there are steps, but all are damaged.
    """
    damaged = []
    for step in sorted(list_steps(directory), reverse=True):
        if not (damage := find_damage(directory / str(step), step, sizes_only=sizes_only)):
            return step, damaged
        logging.warning("CHECKPOINT DAMAGED, not used: %s: %s", directory / str(step), _few(damage))
        damaged.append(step)
    if damaged:
        raise UserError(
            f"{directory}: none of the steps {damaged[::-1]} is valid (see the warnings); bring "
            "one back from a copy, or move the folder away to start from scratch"
        )
    return None, []


def raise_if_damaged(folder: Path, step: int | None, sizes_only: str | None = None) -> None:
    if damage := find_damage(folder, step, sizes_only=sizes_only):
        raise UserError(f"{folder} is damaged: {_few(damage)}; use another step")


def _few(lines: list[str]) -> str:
    more = f"; and {len(lines) - _FEW} more" if len(lines) > _FEW else ""
    return "; ".join(lines[:_FEW]) + more


def encode_metadata(
    step: int,
    trees: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> bytes:
    assert "model" in metadata, "metadata needs the model config"
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    content = {
        **metadata,
        "step": step,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "arrays": {name: _describe(tree) for name, tree in trees.items()},
        "versions": versions,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Raises UserError for what `encode_metadata` cannot have written."""
    path = folder / METADATA_NAME
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content["model"], dict) and isinstance(content["arrays"]["params"], dict):
            return content
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        pass
    raise UserError(f"{path} is not the metadata of a checkpoint; use another step")


def _describe(tree: Any) -> dict[str, str]:
    """{"blocks/attention/q": "float32[30,576,9,64]", ...}"""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def read_config(folder: Path, metadata: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(metadata["model"])
    except UserError as error:
        raise UserError(f"{folder / METADATA_NAME}: {error}") from error


def check_model(folder: Path, metadata: Mapping[str, Any], config: ModelConfig) -> None:
    saved, wanted = read_config(folder, metadata).to_dict(), config.to_dict()
    if different := [
        f"model.{name} is {saved[name]!r} there, {wanted[name]!r} here"
        for name in wanted
        if saved[name] != wanted[name]
    ]:
        raise UserError(
            f"{folder} is a checkpoint of another model: {'; '.join(different)}; use its model "
            "config or another workdir"
        )


def check_arrays(folder: Path, metadata: Mapping[str, Any], name: str, like: Any) -> None:
    """Raises UserError if the names, shapes and dtypes of an item are not those of `like`."""
    saved, wanted = metadata["arrays"][name], _describe(like)
    absent = "nothing"
    if different := [
        f"{path} is {saved.get(path, absent)} there, {wanted.get(path, absent)} here"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]:
        mend = {
            "params": "it was written by other code for the same model config",
            "opt_state": "use the optimizer config that it was saved with",
        }[name]
        raise UserError(f"{folder / name} does not fit: {_few(different)}; {mend}")


def read_tree(folder: Path, metadata: Mapping[str, Any], name: str, like: Any) -> Any:
    """Reads one item after comparing names, shapes and dtypes (Orbax would cast)."""
    check_arrays(folder, metadata, name, like)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        ),
        like,
    )
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(folder / name, args=ocp.args.StandardRestore(target))


def load_checkpoint(path: str | Path) -> ModelBundle:
    """Reads the newest valid checkpoint for use without training; arrays on the first device.

    Its files are verified like those of a restored one, but the optimizer's only by their sizes.

    Args:
      path: a run's folder, its `checkpoints`, or one step's folder under any name.

    Raises:
      UserError: no checkpoint, no valid one, or arrays that do not make the model of its config.
    """
    folder = find_valid(local_path(path))
    metadata = read_metadata(folder)
    config = read_config(folder, metadata)
    params = read_tree(folder, metadata, "params", abstract_params(config))
    where = f"{folder / METADATA_NAME}: stop_ids"
    check_stop_ids(metadata.get("stop_ids"), config.vocab_size, where)
    prompt, provenance = read_record(metadata)
    return ModelBundle(
        config=config,
        params=params,
        tokenizer=read_tokenizer(folder),
        prompt=prompt,
        provenance=provenance,
    )
