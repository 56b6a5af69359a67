"""Hugging Face folders: save a model in one of two forms, load those and the folders of others.

Needs neither torch nor transformers, but for weights that come as `.bin` only. In the expanded form
there is one layer for each visit of a block, a plain LlamaForCausalLM that every runtime loads; in
the compact form each block is stored once, and the code that runs it goes along. Our own config is
recorded in both, so that `load_hf` gives back the same model.
"""

import importlib.resources
import json
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
from mobilellm_jax.conversion.huggingface.model_card import model_card
from mobilellm_jax.conversion.huggingface.names import hf_arrays, hf_shapes
from mobilellm_jax.conversion.huggingface.pickled_weights import PickledWeightFiles
from mobilellm_jax.conversion.huggingface.safetensors_io import (
    DTYPES,
    WeightFiles,
    write_safetensors,
)
from mobilellm_jax.data.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig

_CONFIG, _TOKENIZER = "config.json", "tokenizer.model"
_TOKENIZER_CONFIG, _CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_CODE_FILES = ("model.py", "modeling_mobilellm.py")
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq\Z")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def save_hf(
    path: str | Path, config: ModelConfig, params: Mapping[str, Any], **options: Any
) -> None:
    """Writes a folder that transformers loads, all of it or nothing.

    Args:
      path: the folder; it may exist if it is empty or an earlier export, which is replaced.
      config: the model.
      params: its parameters, any float dtype, on any device.
      **options: as for `write_hf`.

    Memory: one tensor more than `params`.

    Raises:
      UserError: the form cannot express the model (ReLU and `first_visit` need "compact"), a weight
        is not finite or too large for the dtype, the tokenizer does not fit, the folder holds
        something else, the disk is full.
    """
    with new_export(path) as folder:
        write_hf(folder, config, params, **options)


def write_hf(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    form: str = "expanded",
    tokenizer_model: bytes | None = None,
    dtype: str = "float32",
    provenance: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """`save_hf` into a folder that is there and empty.

    Args:
      form: "expanded" or "compact", see the module's description.
      tokenizer_model: the SentencePiece model to put with it.
      dtype: of the weights in the file, "float32", "bfloat16" or "float16".
      provenance: JSON values to keep in config.json, such as "step" and "bos": whether documents
        began with BOS in training. If not, the tokenizer puts none in front of a text.
      chat_template: Jinja text that makes a prompt of a dialogue.
    """
    for name, value, choices in (
        ("form", form, hf_config.FORMS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in choices:
            raise UserError(f"{name} = {value!r}: use one of {', '.join(choices)}")
    provenance = dict(provenance or {})
    bos = bool(provenance.get("bos", True))
    tokenizer = None
    if tokenizer_model is not None:
        tokenizer = checked_tokenizer(tokenizer_model, _TOKENIZER, config.vocab_size)
    ids = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    description = hf_config.to_hf_config(config, form, dtype, *ids)
    if provenance:
        description[OWN_KEY]["provenance"] = provenance
    files = {
        _CONFIG: encode_json(description),
        "generation_config.json": encode_json({"bos_token_id": ids[0], "eos_token_id": ids[1]}),
        **_tokenizer_files(tokenizer, config.max_seq_len, bos, chat_template),
    }
    files["README.md"] = model_card(
        config,
        form,
        dtype,
        has_tokenizer=_TOKENIZER_CONFIG in files,
        has_bos=ids[0] is not None,
        provenance=provenance,
    ).encode()
    if form == "compact":
        files |= remote_code()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    blocks = config.visit_order if form == "expanded" else range(config.num_layers)
    arrays = hf_arrays(config, params, blocks, dtype)
    write_safetensors(folder / WeightFiles.SINGLE_FILE, hf_shapes(config, blocks), dtype, arrays)


def remote_code() -> dict[str, bytes]:
    """The code that goes into a compact folder, by file name."""
    source = importlib.resources.files("mobilellm_jax.conversion.pytorch")
    return {name: (source / name).read_bytes() for name in _CODE_FILES}


def _tokenizer_files(
    tokenizer: Tokenizer | None, max_seq_len: int, bos: bool, chat_template: str | None
) -> dict[str, bytes]:
    files = {} if chat_template is None else {_CHAT_TEMPLATE: chat_template.encode()}
    if tokenizer is None:
        return files
    files |= tokenizer_json.tokenizer_files(tokenizer.model_bytes, max_seq_len, bos)
    if chat_template is not None and _TOKENIZER_CONFIG in files:
        # Versions of transformers before 4.43 look there.
        values = json.loads(files[_TOKENIZER_CONFIG])
        files[_TOKENIZER_CONFIG] = encode_json(values | {"chat_template": chat_template})
    return files


def load_hf(
    path: str | Path, *, shared_kv: str | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a folder of either form, of Llama or of MobileLLM: config and fp32 numpy parameters.

    What is only understood with a remark (a head tied in an unusual way, unknown keys in
    config.json) is logged as a warning. Memory: one tensor more than the parameters.

    Args:
      path: a folder with config.json and weights: safetensors files or, where there are none,
        `.bin` files, of which nothing is executed.
      shared_kv: what the repeated blocks of a layer-shared model attend to, where the folder does
        not record it ("own" if left out).

    Raises:
      UserError: the folder is incomplete, damaged or contradicts itself, or has a feature that
        `ModelConfig` cannot express; the message names the file and the key or tensor. Or `.bin`
        files without torch to read them.
    """
    folder = _checked_folder(path)
    source = inside(folder, _CONFIG)
    values = read_json(source)
    verify_checksums(folder)
    with _open_weights(folder) as files:
        embedding, head = hf_names.EMBEDDING.hf_name, hf_names.HEAD.hf_name
        config, blocks = hf_config.from_hf_config(
            values,
            str(source),
            num_layers=len({m[1] for name in files.shapes if (m := _LAYER.match(name))}),
            has_both=embedding in files.shapes and head in files.shapes,
            shared_kv=shared_kv,
        )
        if config.tie_embeddings and embedding not in files.shapes and head in files.shapes:
            # MobileLLM as published at first: huggingface/transformers issue 34759
            logging.warning(
                "%s: has no %s; read from %s, to which it is tied", folder, embedding, head
            )
            files.rename(head, embedding)
        _check_tensors(folder, files.shapes, config, blocks)
        if config.tie_embeddings and head in files.shapes:
            _check_same(files, head, embedding)
        if (model_bytes := load_hf_tokenizer(folder)) is not None:
            checked_tokenizer(model_bytes, str(folder / _TOKENIZER), config.vocab_size)
        return config, _read_params(files, config, blocks)


def load_hf_tokenizer(path: str | Path) -> bytes | None:
    """The bytes of the folder's tokenizer.model; None if it has none, UserError if unreadable."""
    file = inside(_checked_folder(path), _TOKENIZER)
    return Tokenizer.load(file).model_bytes if file.exists() else None


def load_hf_chat_template(path: str | Path) -> str | None:
    """The folder's Jinja text that makes a prompt of a dialogue; None if it has none."""
    folder = _checked_folder(path)
    if (file := inside(folder, _CHAT_TEMPLATE)).exists():
        try:
            return file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
    if not (file := inside(folder, _TOKENIZER_CONFIG)).exists():
        return None
    template = read_json(file).get("chat_template")
    if template is not None and not isinstance(template, str):
        logging.warning("%s: chat_template is no text but a list of several; not read", file)
        return None
    return template


def load_hf_metadata(path: str | Path) -> dict[str, Any]:
    """What a checkpoint keeps of a model besides its weights.

    That is the provenance `save_hf` was given, the folder's "chat_template", and for folders of
    others "bos": False if their tokenizer says that it puts none in front of a text.
    """
    folder = _checked_folder(path)
    own = read_json(inside(folder, _CONFIG)).get(OWN_KEY, {})
    provenance = own.get("provenance", {}) if isinstance(own, dict) else {}
    metadata = dict(provenance) if isinstance(provenance, dict) else {}
    if (template := load_hf_chat_template(path)) is not None:
        metadata["chat_template"] = template
    tokenizer = inside(folder, _TOKENIZER_CONFIG)
    if tokenizer.exists() and read_json(tokenizer).get("add_bos_token") is False:
        metadata.setdefault("bos", False)
    return metadata


def _open_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder; safetensors files are preferred."""
    kinds = (WeightFiles, PickledWeightFiles)
    for kind in kinds:
        if kind.are_in(folder):
            return kind(folder)
    names = ", ".join(kind.SINGLE_FILE for kind in kinds)
    raise UserError(f"{folder}: has no weights, neither {names} nor an index of several files")


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
            f"{folder}: has {len(unknown)} tensors that the model has not, such as "
            f"{unknown[0]:.120}"
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
