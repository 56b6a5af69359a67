"""Hugging Face folders: save a model in one of two forms, load those and the folders of others.

Needs neither torch nor transformers, but for weights that come as `.bin` only. In the expanded form
there is one layer for each visit of a block, a plain LlamaForCausalLM that every runtime loads; in
the compact form each block is stored once, and the code that runs it goes along. Our own config is
recorded in both, so that `read_hf` gives back the same model.
"""

import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface import config as hf_config
from mobilellm_jax.huggingface import names as hf_names
from mobilellm_jax.huggingface.model_card import model_card
from mobilellm_jax.huggingface.names import hf_arrays, hf_shapes
from mobilellm_jax.huggingface.pickled_weights import PickledWeightFiles
from mobilellm_jax.huggingface.prompt_format import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    read_prompt_format,
)
from mobilellm_jax.huggingface.safetensors_io import DTYPES, WeightFiles, write_safetensors
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model_bundle import ModelBundle, check_stop_ids, read_record
from mobilellm_jax.storage.exports import OWN_KEY, new_export, verify_checksums
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.storage.untrusted import encode_json, read_json, safe_child
from mobilellm_jax.tokenizers import huggingface_json
from mobilellm_jax.tokenizers.files import read_tokenizer
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE as _TOKENIZER
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer, check_vocabulary

_CONFIG = "config.json"
_CODE_FILES = ("model.py", "modeling_mobilellm.py")
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq\Z")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def save_hf(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    form: str = "expanded",
    tokenizer_model: bytes | None = None,
    dtype: str = "float32",
    provenance: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a folder that transformers loads, all of it or nothing.

    Args:
      path: the folder; it may exist if it is empty or an earlier export, which is replaced.
      config: the model.
      params: its parameters, any float dtype, on any device.
      form: "expanded" or "compact", see the module's description.
      tokenizer_model: the SentencePiece model to put with it.
      dtype: of the weights in the file, "float32", "bfloat16" or "float16".
      provenance: JSON values to keep in config.json, such as "step", "mask_documents", and "bos":
        whether documents began with BOS. If not, the tokenizer puts none in front of a text.
      chat_template: Jinja text that makes a prompt of a dialogue.

    Memory: one tensor more than `params`.

    Raises:
      UserError: the form cannot express the model (ReLU and `first_visit` need "compact"), a weight
        is not finite or too large for the dtype, the tokenizer does not fit, the folder holds
        something else, the disk is full.
    """
    record = {**(provenance or {}), "chat_template": chat_template}
    prompt, known = read_record(record, keep_other=True)
    tokenizer = None if tokenizer_model is None else SentencePieceTokenizer(tokenizer_model)
    model = ModelBundle(
        config=config, params=params, tokenizer=tokenizer, prompt=prompt, provenance=known
    )
    with new_export(path) as folder:
        write_hf(folder, model, form=form, dtype=dtype)


def write_hf(
    folder: Path, model: ModelBundle, *, form: str = "expanded", dtype: str = "float32"
) -> None:
    """`save_hf` into a folder that is there and empty."""
    for name, value, choices in (
        ("form", form, hf_config.FORMS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in choices:
            raise UserError(f"{name} = {value!r}: use one of {', '.join(choices)}")
    config, tokenizer = model.config, model.tokenizer
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, _TOKENIZER)
    bos_id = tokenizer.bos_id if tokenizer else None
    description = hf_config.to_hf_config(config, form, dtype, bos_id, model.stop_ids)
    provenance = model.to_record()
    provenance.pop("chat_template", None)  # has a file of its own
    if model.stop_ids:
        provenance.pop("stop_ids", None)  # is the key eos_token_id
    if provenance:
        description[OWN_KEY]["provenance"] = provenance
    files = {
        _CONFIG: encode_json(description),
        GENERATION_CONFIG: encode_json(
            {key: description[key] for key in ("bos_token_id", "eos_token_id")}
        ),
        **_tokenizer_files(model),
    }
    files["README.md"] = model_card(
        model, form, dtype, has_tokenizer=TOKENIZER_CONFIG in files
    ).encode()
    if form == "compact":
        files |= remote_code()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    blocks = config.visit_order if form == "expanded" else range(config.num_layers)
    arrays = hf_arrays(config, model.params, blocks, dtype)
    write_safetensors(folder / WeightFiles.SINGLE_FILE, hf_shapes(config, blocks), dtype, arrays)


def remote_code() -> dict[str, bytes]:
    """The code that goes into a compact folder, by file name."""
    source = importlib.resources.files("mobilellm_jax.huggingface.remote_code")
    return {name: (source / name).read_bytes() for name in _CODE_FILES}


def _tokenizer_files(model: ModelBundle) -> dict[str, bytes]:
    template = model.prompt.chat_template
    files = {} if template is None else {CHAT_TEMPLATE: template.encode()}
    if model.tokenizer is None:
        return files
    files |= huggingface_json.tokenizer_files(
        model.tokenizer, model.config.max_seq_len, model.prompt.begins_with_bos
    )
    if template is not None and TOKENIZER_CONFIG in files:
        # Versions of transformers before 4.43 look there.
        values = json.loads(files[TOKENIZER_CONFIG])
        files[TOKENIZER_CONFIG] = encode_json(values | {"chat_template": template})
    return files


def read_hf(path: str | Path, *, shared_kv: str | None = None) -> ModelBundle:
    """Reads a folder of either form, of Llama or of MobileLLM; parameters are fp32 NumPy arrays.

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
    source = safe_child(folder, _CONFIG)
    values = read_json(source)
    verify_checksums(folder)
    with _open_weights(folder) as files:
        embedding, head = hf_names.EMBEDDING.hf_name, hf_names.HEAD.hf_name
        config, blocks = hf_config.from_hf_config(
            values,
            str(source),
            num_layers=len({m[1] for name in files.shapes if (m := _LAYER.match(name))}),
            missing={embedding, head} - files.shapes.keys(),
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
        safe_child(folder, _TOKENIZER)
        if (tokenizer := read_tokenizer(folder)) is not None:
            check_vocabulary(tokenizer, config.vocab_size, str(folder / _TOKENIZER))
        record = _read_record(folder, values, tokenizer, config.vocab_size)
        prompt, provenance = read_record(record, keep_other=True)
        return ModelBundle(
            config=config,
            params=_read_params(files, config, blocks),
            tokenizer=tokenizer,
            prompt=prompt,
            provenance=provenance,
        )


def _read_record(
    folder: Path, values: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, Any]:
    """Prompt format and provenance as `ModelBundle.to_record` gives them.

    Our own exports keep them in config.json; what that does not say the other files do.
    """
    own = values.get(OWN_KEY, {})
    provenance = own.get("provenance", {}) if isinstance(own, dict) else {}
    record = dict(provenance) if isinstance(provenance, dict) else {}
    check_stop_ids(
        record.get("stop_ids"),
        vocab_size,
        f"{folder / _CONFIG}: {OWN_KEY}.provenance.stop_ids",
    )
    return read_prompt_format(folder, values, tokenizer, vocab_size) | record


def _open_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder; safetensors files are preferred."""
    kinds = (WeightFiles, PickledWeightFiles)
    for kind in kinds:
        if kind.are_in(folder):
            return kind(folder)
    names = ", ".join(kind.SINGLE_FILE for kind in kinds)
    raise UserError(f"{folder}: has no weights, neither {names} nor an index of several files")


def _checked_folder(path: str | Path) -> Path:
    folder = local_path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass a folder with config.json and weights")
    return folder


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
