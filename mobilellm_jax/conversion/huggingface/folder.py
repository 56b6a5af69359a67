"""Hugging Face folders: save a model as a plain LlamaForCausalLM, load a Llama-shaped one.

Needs neither torch nor transformers. Layer sharing is written expanded, one layer for each visit of
a block, which every runtime loads; our own config is recorded beside it, so that `load_hf` folds
the layers again.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobilellm_jax.conversion import tokenizer_json
from mobilellm_jax.conversion.folders import (
    OWN_KEY,
    encode_json,
    inside,
    new_export,
    read_json,
    verify_checksums,
)
from mobilellm_jax.conversion.huggingface import config as hf_config
from mobilellm_jax.conversion.huggingface import names as hf_names
from mobilellm_jax.conversion.huggingface.names import hf_arrays, hf_shapes
from mobilellm_jax.conversion.huggingface.safetensors_io import (
    DTYPES,
    WeightFiles,
    write_safetensors,
)
from mobilellm_jax.data.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig

_WEIGHTS, _CONFIG, _TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
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
    with new_export(path) as folder:
        write_hf(
            folder,
            config,
            params,
            tokenizer_model=tokenizer_model,
            dtype=dtype,
            provenance=provenance,
        )


def write_hf(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_model: bytes | None = None,
    dtype: str = "float32",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """`save_hf` into a folder that is there and empty."""
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    tokenizer = None
    if tokenizer_model is not None:
        tokenizer = checked_tokenizer(tokenizer_model, _TOKENIZER, config.vocab_size)
    ids = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    description = hf_config.to_hf_config(config, dtype, *ids)
    if provenance:
        description[OWN_KEY]["provenance"] = dict(provenance)
    files = {
        _CONFIG: encode_json(description),
        "generation_config.json": encode_json({"bos_token_id": ids[0], "eos_token_id": ids[1]}),
    }
    if tokenizer is not None:
        files[_TOKENIZER] = tokenizer.model_bytes
        try:
            files |= tokenizer_json.tokenizer_files(tokenizer.model_bytes, config.max_seq_len)
        except UserError as error:
            logging.warning("%s; the folder holds tokenizer.model only", error)
    shapes = hf_shapes(config, config.visit_order)
    arrays = hf_arrays(config, params, config.visit_order, dtype)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_safetensors(folder / _WEIGHTS, shapes, dtype, arrays)


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
    verify_checksums(folder)
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
            checked_tokenizer(model_bytes, str(folder / _TOKENIZER), config.vocab_size)
        return config, _read_params(files, config, blocks)


def load_hf_tokenizer(path: str | Path) -> bytes | None:
    """The bytes of the folder's tokenizer.model; None if it has none, UserError if unreadable."""
    file = inside(_checked_folder(path), _TOKENIZER)
    return Tokenizer.load(file).model_bytes if file.exists() else None


def load_hf_provenance(path: str | Path) -> dict[str, Any]:
    """What `save_hf` was told of the model's training; {} for folders of others."""
    own = read_json(inside(_checked_folder(path), _CONFIG)).get(OWN_KEY, {})
    provenance = own.get("provenance", {}) if isinstance(own, dict) else {}
    return dict(provenance) if isinstance(provenance, dict) else {}


def _checked_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass a folder with config.json and weights")
    return folder


def checked_tokenizer(model_bytes: bytes, name: str, vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids all have an embedding; padding the vocabulary is fine."""
    tokenizer = Tokenizer(model_bytes, name)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} pieces, but the model's vocab_size is "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


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
        mend = f"remove the key {OWN_KEY!r} from config.json to read unshared layers"
    raise UserError(
        f"{files.path(name)}: {name} and {other} should be one shared weight but differ; {mend}"
    )
