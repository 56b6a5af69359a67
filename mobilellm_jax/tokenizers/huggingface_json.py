"""A SentencePiece BPE model as `tokenizer.json`, the form that Hugging Face runtimes read.

The automatic conversion of `tokenizer.model` in transformers changes some ids; this one keeps them.
The only texts with other ids are those that contain a control token literally, such as "<s>":
Hugging Face makes it the token, SentencePiece reads the characters.
"""

import json
from typing import Any

from absl import logging
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from mobilellm_jax.tokenizers.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's sign for a space
# The space at the very beginning of a text. The usual Strip decoder would do, but ExecuTorch
# decodes token by token: Strip takes the space before every word, and this pattern it skips.
_FIRST_SPACE = r"(?<![\s\S]) "
_Piece = sentencepiece_proto.ModelProto.SentencePiece
_SPECIAL = (_Piece.UNKNOWN, _Piece.CONTROL)
_UNCHANGED = "; encode with sentencepiece and tokenizer.model instead"


def build_tokenizer_json(
    model_bytes: bytes, name: str = MODEL_FILE, bos: bool = True
) -> dict[str, Any]:
    """The content of `tokenizer.json` for a SentencePiece BPE model.

    Args:
      model_bytes: a `tokenizer.model` file.
      name: the file that error messages mention.
      bos: whether encoding puts BOS in front (when the model has one), as a LLaMA tokenizer does.

    Raises:
      UserError: no SentencePiece model, or one with a feature whose ids Hugging Face's BPE cannot
        reproduce: another algorithm, a normaliser, user-defined symbols of several characters.
    """
    proto, tokenizer = _parse(model_bytes, name)
    _check_supported(proto, name)
    tokens = special_tokens(proto, tokenizer)
    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    prepend = [{"type": "Prepend", "prepend": SPACE}] if dummy_prefix else []
    unprepend = {"type": "Replace", "pattern": {"Regex": _FIRST_SPACE}, "content": ""}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, p.piece) for i, p in enumerate(proto.pieces) if p.type in _SPECIAL
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prepend,
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(
            tokens.get("bos_token") if bos else None, tokenizer.bos_id
        ),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([unprepend] if dummy_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {p.piece: i for i, p in enumerate(proto.pieces)},
            "merges": build_merges(proto),
        },
    }


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int, bos: bool = True) -> dict[str, bytes]:
    """`tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, by name.

    A model that has no form as JSON comes alone; a warning says why.

    Args:
      tokenizer: a SentencePiece model.
      max_seq_len: most tokens that the model reads.
      bos: as for `build_tokenizer_json`.
    """
    model_bytes = tokenizer.files[MODEL_FILE]
    tokens = special_tokens(*_parse(model_bytes, MODEL_FILE))
    try:
        content = build_tokenizer_json(model_bytes, bos=bos)
    except UserError as error:
        logging.warning("%s; the folder holds tokenizer.model only", error)
        return dict(tokenizer.files)
    config = {
        "add_bos_token": bos and "bos_token" in tokens,
        "add_eos_token": False,
        **tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        **tokenizer.files,
        "tokenizer.json": _encode(content),
        "tokenizer_config.json": _encode(config),
    }


def special_tokens(proto: sentencepiece_proto.ModelProto, tokenizer: Tokenizer) -> dict[str, str]:
    """The pieces that Hugging Face calls unk_token, bos_token, eos_token and pad_token."""
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    marks = {f"{role}_token": proto.pieces[i].piece for role, i in roles.items() if i is not None}
    return {"unk_token": next(p.piece for p in proto.pieces if p.type == _Piece.UNKNOWN)} | marks


def special_pieces(tokenizer: Tokenizer) -> list[str]:
    """The pieces that Hugging Face makes tokens of where a text has their characters."""
    proto, _ = _parse(tokenizer.files[MODEL_FILE], MODEL_FILE)
    return [p.piece for p in proto.pieces if p.type in _SPECIAL]


def build_merges(proto: sentencepiece_proto.ModelProto) -> list[tuple[str, str]]:
    """Merge rules, the strongest first.

    SentencePiece keeps no rules: it joins any two neighbours whose concatenation is a piece, the
    best score first. So every split of a piece into two pieces is a rule, ranked by the piece.
    """
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _Piece.NORMAL}
    ranked = sorted(ids, key=lambda piece: (-proto.pieces[ids[piece]].score, ids[piece]))
    merges = []
    for piece in ranked:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _parse(model_bytes: bytes, name: str) -> tuple[sentencepiece_proto.ModelProto, Tokenizer]:
    try:
        proto = sentencepiece_proto.ModelProto.FromString(model_bytes)
    except DecodeError as error:
        raise UserError(f"{name}: not a SentencePiece model ({len(model_bytes)} bytes)") from error
    return proto, SentencePieceTokenizer(model_bytes, name)


def beyond_plain_bpe(proto: sentencepiece_proto.ModelProto) -> list[str]:
    """The features, in words, that runtimes with a plain BPE of bytes and merges do not have."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "its algorithm is not BPE": trainer.model_type != trainer.BPE,
        "it normalises text": bool(
            normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap
        ),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "it marks spaces behind words": trainer.treat_whitespace_as_suffix,
        "it has unused pieces": any(p.type == _Piece.UNUSED for p in proto.pieces),
        "it has user-defined symbols of several characters": any(
            p.type == _Piece.USER_DEFINED and len(p.piece) > 1 for p in proto.pieces
        ),
    }
    return [reason for reason, found in reasons.items() if found]


def _check_supported(proto: sentencepiece_proto.ModelProto, name: str) -> None:
    if reasons := beyond_plain_bpe(proto):
        raise UserError(f"{name}: cannot be written as tokenizer.json, {reasons[0]}" + _UNCHANGED)
    characters = {p.piece for p in proto.pieces if len(p.piece) == 1}
    for piece in (p.piece for p in proto.pieces if p.type == _Piece.NORMAL):
        if unknown := set(piece) - characters:
            raise UserError(
                f"{name}: cannot be written as tokenizer.json, the piece {piece!r} has characters "
                f"that are no pieces: {sorted(unknown)}" + _UNCHANGED
            )


def _added_token(token_id: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": True}


def _post_processor(bos: str | None, bos_id: int | None) -> dict[str, Any] | None:
    """Puts BOS in front of each text."""
    if bos is None:
        return None

    def text(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
