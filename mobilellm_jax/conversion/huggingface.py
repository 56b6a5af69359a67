"""Hugging Face folders: save a model as a plain LlamaForCausalLM, load a Llama-shaped one.

Needs neither torch nor transformers. Layer sharing is written expanded, one layer for each visit of
a block, which every runtime loads; our own config is recorded beside it, so that `load_hf` folds
the layers again.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobilellm_jax.conversion import hf_config, hf_names, tokenizer_json
from mobilellm_jax.conversion.safetensors_io import (
    DTYPES,
    WeightFiles,
    inside,
    read_json,
    write_safetensors,
)
from mobilellm_jax.data.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig

CHECKSUMS = "SHA256SUMS"  # in the form that `sha256sum -c` reads
_WEIGHTS, _CONFIG, _TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
_OWN_FILES = {
    *(_WEIGHTS, _CONFIG, _TOKENIZER, CHECKSUMS),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
}
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq\Z")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def save_hf(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_model: bytes | None = None,
    dtype: str = "float32",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers loads as a LlamaForCausalLM, all of it or nothing.

    Args:
      path: the folder; it may exist if it is empty or an earlier export, which is replaced.
      config: the model.
      params: its parameters, any float dtype, on any device.
      tokenizer_model: the SentencePiece model to put with it.
      dtype: of the weights in the file, "float32", "bfloat16" or "float16".
      provenance: JSON values to keep in config.json.

    Memory: one tensor more than `params`.

    Raises:
      UserError: Llama arithmetic cannot express the model (ReLU, `first_visit`), a weight is not
        finite or too large for `dtype`, the tokenizer does not fit, the folder holds something
        else, the disk is full.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    tokenizer = None
    if tokenizer_model is not None:
        tokenizer = _checked_tokenizer(tokenizer_model, _TOKENIZER, config.vocab_size)
    ids = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    description = hf_config.to_hf_config(config, dtype, *ids)
    if provenance:
        description[hf_config.OWN_KEY]["provenance"] = dict(provenance)
    files = {
        _CONFIG: _encode(description),
        "generation_config.json": _encode({"bos_token_id": ids[0], "eos_token_id": ids[1]}),
    }
    if tokenizer is not None:
        files[_TOKENIZER] = tokenizer.model_bytes
        try:
            files |= tokenizer_json.tokenizer_files(tokenizer.model_bytes, config.max_seq_len)
        except UserError as error:
            logging.warning("%s; %s holds tokenizer.model only", error, path)
    leaves = _leaves(config, params)
    with _new_folder(Path(path)) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        shapes = {
            name: weight.hf_shape(config)
            for name, weight, _ in hf_names.hf_tensors(config, config.visit_order)
        }
        write_safetensors(folder / _WEIGHTS, shapes, dtype, _arrays(config, leaves, dtype))
        sums = [f"{_sha256(folder / name)}  {name}\n" for name in sorted((*files, _WEIGHTS))]
        (folder / CHECKSUMS).write_text("".join(sums))


def load_hf(
    path: str | Path, *, shared_kv: str | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a Llama or MobileLLM folder: config and fp32 numpy parameters.

    What is only understood with a remark (a head tied in an unusual way, unknown keys in
    config.json) is logged as a warning. Memory: one tensor more than the parameters.

    Args:
      path: a folder with config.json and safetensors files.
      shared_kv: what the repeated blocks of a layer-shared model attend to, where the folder does
        not record it ("own" if left out).

    Raises:
      UserError: the folder is incomplete, damaged or contradicts itself, or has a feature that
        `ModelConfig` cannot express; the message names the file and the key or tensor.
    """
    folder = _checked_folder(path)
    source = inside(folder, _CONFIG)
    values = read_json(source)
    _verify_checksums(folder)
    with WeightFiles(folder) as files:
        num_layers = len({m[1] for name in files.shapes if (m := _LAYER.match(name))})
        if (said := values.get("num_hidden_layers")) != num_layers:
            raise UserError(
                f"{source}: num_hidden_layers = {said!r:.80}, but the files have {num_layers} "
                "layers; get the folder again"
            )
        has_head = hf_names.HEAD.hf_name in files.shapes
        config, blocks = hf_config.from_hf_config(
            values, str(source), has_head=has_head, shared_kv=shared_kv
        )
        _check_tensors(folder, files.shapes, config, blocks)
        if config.tie_embeddings and has_head:
            _check_same(files, hf_names.HEAD.hf_name, hf_names.EMBEDDING.hf_name)
        if (model_bytes := load_hf_tokenizer(folder)) is not None:
            _checked_tokenizer(model_bytes, str(folder / _TOKENIZER), config.vocab_size)
        return config, _read_params(files, config, blocks)


def load_hf_tokenizer(path: str | Path) -> bytes | None:
    """The bytes of the folder's tokenizer.model; None if it has none, UserError if unreadable."""
    file = inside(_checked_folder(path), _TOKENIZER)
    return Tokenizer.load(file).model_bytes if file.exists() else None


def load_hf_provenance(path: str | Path) -> dict[str, Any]:
    """What `save_hf` was told of the model's training; {} for folders of others."""
    own = read_json(inside(_checked_folder(path), _CONFIG)).get(hf_config.OWN_KEY, {})
    provenance = own.get("provenance", {}) if isinstance(own, dict) else {}
    return dict(provenance) if isinstance(provenance, dict) else {}


def _checked_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass a folder with config.json and weights")
    return folder


def _checked_tokenizer(model_bytes: bytes, name: str, vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids all have an embedding; padding the vocabulary is fine."""
    tokenizer = Tokenizer(model_bytes, name)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} pieces, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _leaves(config: ModelConfig, params: Mapping[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    """The weights by path, on the host; UserError for one that is missing, extra or misshapen."""
    expected = {weight.path: weight.shape(config) for weight in hf_names.weights(config)}
    found = dict(hf_names.flatten(params))
    for path in sorted(expected.keys() | found.keys()):
        shape = found[path].shape if path in found else None
        if shape != expected.get(path):
            raise UserError(
                f"parameter {'/'.join(path)} has shape {shape}, the config asks for "
                f"{expected.get(path)}; do the parameters belong to this config?"
            )
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def _arrays(
    config: ModelConfig, leaves: Mapping[tuple[str, ...], np.ndarray], dtype: str
) -> Iterator[np.ndarray]:
    """The tensors of the file, one after the other."""
    for name, weight, block in hf_names.hf_tensors(config, config.visit_order):
        leaf = leaves[weight.path]
        array = weight.to_hf(leaf if block is None else leaf[block], config)
        with np.errstate(over="ignore"):
            cast = array.astype(DTYPES[dtype])
        if not np.isfinite(cast).all():
            ours = "/".join(weight.path) + ("" if block is None else f"[{block}]")
            if np.isfinite(array).all():
                problem = f"has values too large for {dtype}; use dtype 'bfloat16' or 'float32'"
            else:
                problem = "contains NaN or infinity; export an earlier checkpoint"
            raise UserError(f"parameter {ours} ({name}) {problem}")
        yield cast


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends without an error."""
    target = Path(os.path.abspath(target))
    replaces = _is_replaceable(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        for file in (*new.iterdir(), new):
            _sync(file)
        if replaces:
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if replaces:
                os.rename(old, target)
            raise
        _sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(target: Path) -> bool:
    """Whether `target` exists and may be replaced; UserError if it holds anything but an export."""
    if not (target.exists() or target.is_symlink()):
        return False
    if target.is_dir() and not target.is_symlink():
        names = {entry.name for entry in target.iterdir()}
        if not names:
            return True
        with contextlib.suppress(UserError):
            if names <= _OWN_FILES and hf_config.OWN_KEY in read_json(target / _CONFIG):
                return True
    raise UserError(
        f"{target}: already holds something that is not an earlier export; choose another folder, "
        "or empty this one"
    )


def _verify_checksums(folder: Path) -> None:
    """Compares the files with the checksums that our own exports carry, where there are any.

    safetensors itself notices no flipped bit in the weights.
    """
    path = inside(folder, CHECKSUMS)
    if not path.exists():
        return
    for line in path.read_bytes().decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name not in _OWN_FILES:
            raise UserError(f"{path}: is damaged in the line {line!r:.120}; get the folder again")
        file = inside(folder, name)
        if not file.is_file():
            raise UserError(f"{file}: is missing; get the folder again")
        if _sha256(file) != digest:
            raise UserError(
                f"{file}: is not the file that was exported (see {CHECKSUMS}); get it again, or if "
                f"you changed it on purpose delete {path}"
            )


def _check_tensors(
    folder: Path,
    found: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    blocks: tuple[int, ...],
) -> None:
    """Every tensor that the model needs, no other, each in its shape."""
    expected = {
        name: weight.hf_shape(config) for name, weight, _ in hf_names.hf_tensors(config, blocks)
    }
    if config.tie_embeddings and hf_names.HEAD.hf_name in found:
        expected[hf_names.HEAD.hf_name] = hf_names.HEAD.hf_shape(config)
    found = {name: shape for name, shape in found.items() if not _BUFFER.match(name)}
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{folder}: lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{folder}: has {len(unknown)} tensors that a Llama has not, such as {unknown[0]:.120}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{folder}: tensor {name} has shape {list(found[name])}, config.json asks for "
                f"{list(shape)}"
            )


def _read_params(
    files: WeightFiles, config: ModelConfig, blocks: tuple[int, ...]
) -> dict[str, Any]:
    leaves = {w.path: np.empty(w.shape(config), np.float32) for w in hf_names.weights(config)}
    first: dict[tuple[tuple[str, ...], int | None], str] = {}
    for name, weight, block in hf_names.hf_tensors(config, blocks):
        if (key := (weight.path, block)) in first:
            _check_same(files, name, first[key])
            continue
        first[key] = name
        leaf = leaves[weight.path]
        leaf[... if block is None else block] = weight.from_hf(files.read(name), config)
    return hf_names.unflatten(leaves)


def _check_same(files: WeightFiles, name: str, other: str) -> None:
    """UserError unless two tensors that stand for one weight are equal bit for bit."""
    if np.array_equal(files.read(name).view(np.uint32), files.read(other).view(np.uint32)):
        return
    if name == hf_names.HEAD.hf_name:
        mend = "set tie_word_embeddings (and share_embedding) to false if the head is its own"
    else:
        mend = f"remove the key {hf_config.OWN_KEY!r} from config.json to read unshared layers"
    raise UserError(
        f"{files.path(name)}: {name} and {other} should be one shared weight but differ; {mend}"
    )


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
