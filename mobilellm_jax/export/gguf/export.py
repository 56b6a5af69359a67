"""A model as one GGUF file, the format of llama.cpp and of what is built on it.

The file is a Llama with one layer for each visit of a block: two tensors of a GGUF file cannot
share their bytes, so layer sharing costs its full size here. A tied head is stored once.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.config import LLAMA_FIELDS
from mobilellm_jax.huggingface.names import (
    EMBEDDING,
    HEAD,
    WeightMapping,
    hf_arrays,
    hf_tensors,
    unflatten,
    weights,
)
from mobilellm_jax.machine.extras import import_extra
from mobilellm_jax.model.config import ModelConfig, check_expressible
from mobilellm_jax.model_bundle import ModelBundle
from mobilellm_jax.tokenizers.huggingface_json import beyond_plain_bpe
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE
from mobilellm_jax.tokenizers.tokenizer import check_vocabulary

# With the largest magnitude that each can hold: fp16 scales times the integers.
_LARGEST = {"F32": np.inf, "F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}
WEIGHT_TYPES = tuple(_LARGEST)
_MAX_LAYERS = 512  # of llama.cpp, which ends the process at more
_Piece = sentencepiece_proto.ModelProto.SentencePiece
_MARKS = (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.BYTE)  # what sentencepiece never makes of text


def write_gguf(
    path: Path,
    model: ModelBundle,
    *,
    weight_type: str,
    name: str,
) -> None:
    """Writes one file that llama.cpp loads, with its tokenizer inside.

    Norms stay F32. In a Q4_0 file the head, tied or not, is Q8_0, as from `llama-quantize` (but
    for widths divisible by 256, where that takes Q6_K).

    Args:
      path: the file.
      model: its parameters in any float dtype, on any device.
      weight_type: of the matrices, one of WEIGHT_TYPES.
      name: of the model, for people; where it comes from.

    Memory: three tensors more than the parameters, the largest being the embedding.

    Raises:
      UserError: GGUF's Llama cannot express the model (ReLU, `first_visit`, widths that do not fit
        the type, more than three ids to stop at), there is no tokenizer, or llama.cpp would give
        other ids than sentencepiece, or a weight is missing, misshapen, not finite or too large.
      OSError: the disk is full.
    """
    gguf = import_extra("gguf", "gguf")
    config = model.config
    _check_model(config, weight_type)
    _check_name(name)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_model(writer, gguf, config, weight_type, name)
    _add_vocabulary(writer, gguf, model)
    if model.prompt.chat_template is not None:
        writer.add_chat_template(model.prompt.chat_template)
    tensors = [
        (tensor, weight, _tensor_type(gguf, config, weight, weight_type))
        for tensor, weight, _ in _tensors(gguf, config)
    ]
    for tensor, weight, kind in tensors:
        shape = weight.hf_shape(config)
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    arrays = hf_arrays(config, model.params, config.visit_order)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (tensor, weight, kind), array in zip(tensors, arrays, strict=True):
            array = _permuted(array, weight, config, (2, config.head_dim // 2))
            writer.write_tensor_data(_quantized(gguf, array, kind, tensor))
    finally:
        writer.close()


def dequantized_params(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The fp32 parameter tree of a file that `write_gguf` wrote, rounded as it is stored.

    Raises:
      UserError: the file is damaged, or does not hold the model of `config`.
    """
    gguf = import_extra("gguf", "gguf")
    try:
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error}); convert it again") from error
    expected = list(_tensors(gguf, config))
    if differing := found.keys() ^ {tensor for tensor, _, _ in expected}:
        raise UserError(
            f"{path}: {len(differing)} tensors are missing or unknown, such as {min(differing)}; "
            "convert it again"
        )
    leaves = {weight.path: np.empty(weight.shape(config), np.float32) for weight in weights(config)}
    first: dict[tuple[tuple[str, ...], int | None], np.ndarray] = {}
    for name, weight, block in expected:
        tensor = found[name]
        array = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        if array.shape != weight.hf_shape(config):
            raise UserError(
                f"{path}: tensor {name} has shape {list(array.shape)}, the config asks for "
                f"{list(weight.hf_shape(config))}"
            )
        if not np.array_equal(first.setdefault((weight.path, block), tensor.data), tensor.data):
            raise UserError(
                f"{path}: tensor {name} differs from an earlier visit of the same block; "
                "convert it again"
            )
        array = _permuted(array, weight, config, (config.head_dim // 2, 2))
        leaves[weight.path][... if block is None else block] = weight.from_hf(array, config)
    return unflatten(leaves)


def _check_model(config: ModelConfig, weight_type: str) -> None:
    """UserError for what a Llama in GGUF cannot express."""
    if weight_type not in WEIGHT_TYPES:
        raise UserError(f"weight type {weight_type!r}: use one of {', '.join(WEIGHT_TYPES)}")
    check_expressible(
        config,
        LLAMA_FIELDS,
        "a Llama in GGUF (SwiGLU, each layer with its own keys and values)",
        "convert to another format",
    )
    if config.depth > _MAX_LAYERS:
        raise UserError(
            f"the model runs {config.depth} blocks, llama.cpp at most {_MAX_LAYERS}; convert to "
            "another format, or train with fewer"
        )
    block = 1 if weight_type in ("F32", "F16") else 32
    widths = {
        "model.embed_dim": config.embed_dim,
        "model.ffn_dim": config.ffn_dim,
        "model.num_heads * model.head_dim": config.num_heads * config.head_dim,
    }
    for field, width in widths.items():
        if width % block:
            raise UserError(
                f"{field} = {width} is not a multiple of {block}, the weights that share a scale "
                f"in {weight_type}; use F16 or F32, or train with {field} "
                f"{-(-width // block) * block}"
            )


def _check_name(name: str) -> None:
    if any(part in name.lower() for part in ("phi-3", "phi3")):
        raise UserError(
            f"the name {name!r} makes llama.cpp take the model for a Phi-3, whose tokens it lacks; "
            "use another name"
        )


def _add_model(writer, gguf: ModuleType, config: ModelConfig, weight_type: str, name: str) -> None:
    """What the model is, in the keys of the Llama architecture."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    whole = "ALL_" if weight_type == "F32" else "MOSTLY_"
    writer.add_file_type(gguf.LlamaFileType[whole + weight_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _add_vocabulary(writer, gguf: ModuleType, model: ModelBundle) -> None:
    """The SentencePiece model, filled up to the vocabulary of the model with unused tokens."""
    config, tokenizer = model.config, model.tokenizer
    if tokenizer is None:
        raise UserError(
            "a GGUF file needs the tokenizer, without which llama.cpp does not load it; give a "
            "tokenizer.model, the one that the model was trained with"
        )
    check_vocabulary(tokenizer, config.vocab_size, MODEL_FILE)
    proto = sentencepiece_proto.ModelProto.FromString(tokenizer.files[MODEL_FILE])
    _check_vocabulary(proto)
    # The types have the same numbers in both formats. llama.cpp would put a space behind every
    # user-defined symbol; as a character that joins no other it needs no type of its own.
    pieces = [
        (p.piece, p.score, _Piece.NORMAL if p.type == _Piece.USER_DEFINED else p.type)
        for p in proto.pieces
    ]
    for i in range(len(pieces), config.vocab_size):
        pieces.append((f"[PAD{i}]", -1000.0, _Piece.UNUSED))
    tokens, scores, types = zip(*pieces, strict=True)
    unk_id = types.index(_Piece.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(unk_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    # llama.cpp ends an answer at each of these. Where none is named it stops at id 2; no model
    # learns to say the unknown token.
    keys = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(model.stop_ids) > len(keys):
        raise UserError(
            f"the model stops at {len(model.stop_ids)} ids, {list(model.stop_ids)!r:.120}; a GGUF "
            f"file names at most {len(keys)}; convert to another format"
        )
    for add_key, stop_id in zip(keys, model.stop_ids or (unk_id,), strict=False):
        add_key(stop_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(model.bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)


def _check_vocabulary(proto: sentencepiece_proto.ModelProto) -> None:
    """UserError for what llama.cpp would give other ids for, or end the process."""
    reasons = beyond_plain_bpe(proto)
    if not proto.trainer_spec.byte_fallback:
        reasons.append("it has no byte fallback")
    if reasons:
        raise UserError(
            f"tokenizer.model: llama.cpp cannot give its ids, {reasons[0]}; convert to another "
            "format, or train with a tokenizer of this project"
        )
    known = {p.piece for p in proto.pieces if p.type == _Piece.NORMAL}
    for text in (p.piece for p in proto.pieces if p.type in _MARKS):
        splits = ((text[:i], text[i:]) for i in range(1, len(text)))
        if any(all(len(part) == 1 or part in known for part in split) for split in splits):
            logging.warning(
                "tokenizer.model: llama.cpp takes the characters %r in a text for the token of "
                "that name, which sentencepiece does not; clean them out of what users type",
                text,
            )


def _tensors(
    gguf: ModuleType, config: ModelConfig
) -> Iterator[tuple[str, WeightMapping, int | None]]:
    """(GGUF name, weight, stored block) of each tensor, in the order of `hf_arrays`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.depth)
    for hf_name, weight, block in hf_tensors(config, config.visit_order):
        yield names.get_name(hf_name, try_suffixes=(".weight",)), weight, block


def _tensor_type(gguf: ModuleType, config: ModelConfig, weight: WeightMapping, weight_type: str):
    """The GGMLQuantizationType that a weight is stored in."""
    if len(weight.hf_axes) == 1:
        weight_type = "F32"
    elif weight_type == "Q4_0" and weight == (EMBEDDING if config.tie_embeddings else HEAD):
        weight_type = "Q8_0"
    return gguf.GGMLQuantizationType[weight_type]


def _permuted(
    array: np.ndarray, weight: WeightMapping, config: ModelConfig, halves: tuple[int, int]
) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order, and back.

    We turn the pair (h, h + H/2) of a head by one angle, llama.cpp's Llama turns (2h, 2h + 1).

    Args:
      halves: (2, H/2) for the order of the file, (H/2, 2) for ours.
    """
    if weight.path[-1] not in ("query", "key"):
        return array
    heads = array.reshape(-1, *halves, config.embed_dim)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)


def _quantized(gguf: ModuleType, array: np.ndarray, kind, tensor: str) -> np.ndarray:
    if (found := max(array.max(), -array.min())) > _LARGEST[kind.name]:
        raise UserError(
            f"tensor {tensor} has the value {found:.3g}, too large for {kind.name}; use F32"
        )
    with np.errstate(all="ignore"):  # blocks of denormal numbers: the scale becomes 0
        return gguf.quants.quantize(array, kind)
