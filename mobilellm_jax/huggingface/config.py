"""config.json <-> `ModelConfig`; refuses what the other side cannot express.

Two forms are written. Expanded: a plain Llama with a layer for each visit of a block. Compact: a
model type of our own, each block once, with the code that runs it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import logging

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, check_expressible
from mobilellm_jax.storage.exports import OWN_KEY

FORMS = ("expanded", "compact")
COMPACT_TYPE = "mobilellm_jax"  # of `MobileLLMConfig`, in the code of compact folders
_COMPACT_FORMAT = 2  # 1 had "visit_order", the stored block of each visit, and code for that
_CODE = "modeling_mobilellm"
AUTO_MAP = {  # what of that code transformers runs
    "AutoConfig": f"{_CODE}.MobileLLMConfig",
    "AutoModelForCausalLM": f"{_CODE}.MobileLLMForCausalLM",
}
_MODEL_TYPES = ("llama", "mobilellm", COMPACT_TYPE)
_ARCHITECTURES = ("LlamaForCausalLM", "MobileLLMForCausalLM")
_NO = (None, False)
_ONLY_VALUES = {  # key: the values under which the model is the one that we compute
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": _NO,
    "mlp_bias": _NO,
    "sliding_window": _NO,
    "use_sliding_window": _NO,
    "qk_norm": _NO,
    "use_qk_norm": _NO,
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": _NO,
    "attn_logit_softcapping": _NO,
    "final_logit_softcapping": _NO,
    "is_encoder_decoder": _NO,
}
_COMPACT_REPEATS = (  # keys of a compact config.json that say again what its record says
    *("head_dim", "hidden_size", "initializer_range", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "tie_word_embeddings"),
)
# Fields of ModelConfig that a Llama with a layer for each visit of a block can express.
LLAMA_FIELDS = {
    *("num_layers", "num_heads", "num_kv_heads", "embed_dim", "ffn_dim", "head_dim", "vocab_size"),
    *("max_seq_len", "tie_embeddings", "sharing", "num_repeats", "rope_theta", "norm_eps"),
    "init_std",
}
_READ = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta"),
    *("rope_scaling", "rope_parameters", "rms_norm_eps", "initializer_range", "layer_sharing"),
    *("tie_word_embeddings", "share_embedding", "layer_types", "model_type", "architectures"),
    "eos_token_id",
    OWN_KEY,
}
_WITHOUT_EFFECT = {
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "attention_dropout", "auto_map"),
    *("bos_token_id", "pad_token_id", "pretraining_tp", "_name_or_path"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "_attn_implementation_autoset", "is_decoder"),
    *("add_cross_attention", "tf_legacy_loss", "use_bfloat16", "cross_attention_hidden_size"),
    *("rope_interleaved", "is_llama_config", "transformers.js_config"),
}


def to_hf_config(
    config: ModelConfig, form: str, dtype: str, bos_id: int | None, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """config.json of the "expanded" or the "compact" form.

    Keys that transformers 4 and 5 name differently are given in both ways.

    Raises:
      UserError: the form cannot express the model.
    """
    make = {"expanded": _expanded, "compact": _compact}[form]
    return {
        "bos_token_id": bos_id,
        "dtype": dtype,
        "eos_token_id": list(stop_ids) if len(stop_ids) > 1 else next(iter(stop_ids), None),
        "head_dim": config.head_dim,
        "hidden_size": config.embed_dim,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **make(config),
    }


def _expanded(config: ModelConfig) -> dict[str, Any]:
    """Makes it a LlamaForCausalLM with one layer per visit."""
    check_expressible(
        config,
        LLAMA_FIELDS,
        "LlamaForCausalLM (SwiGLU, each layer with its own keys and values)",
        "write the compact form ('hf_compact' on the command line)",
    )
    if config.embed_dim % config.num_heads:
        raise UserError(
            f"model.embed_dim = {config.embed_dim} is not a multiple of model.num_heads = "
            f"{config.num_heads}, without which transformers 5 loads no LlamaForCausalLM; write "
            "the compact form ('hf_compact' on the command line), or train with such widths"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "num_hidden_layers": config.depth,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        OWN_KEY: {"config": config.to_dict()},
    }


def _compact(config: ModelConfig) -> dict[str, Any]:
    """Makes it a model of the code that goes along; `num_hidden_layers` counts cache slots."""
    return {
        "architectures": ["MobileLLMForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": COMPACT_TYPE,
        "num_hidden_layers": config.num_cache_slots,
        OWN_KEY: {"format": _COMPACT_FORMAT, "config": config.to_dict(), "visits": _visits(config)},
    }


def _visits(config: ModelConfig) -> list[dict[str, Any]]:
    """The fields of `remote_code.model.Visit`."""
    return [
        {"block": v.block, "cache_slot": v.cache_slot, "projects_kv": v.projects_kv}
        for v in config.visits
    ]


def from_hf_config(
    values: Mapping[str, Any],
    source: str,
    *,
    num_layers: int,
    missing: Collection[str],
    shared_kv: str | None,
) -> tuple[ModelConfig, tuple[int, ...]]:
    """The model that a config.json describes.

    Args:
      values: the content of config.json.
      source: its path, for messages.
      num_layers: layers that the weight files have.
      missing: the tensors among input embedding and head that they lack.
      shared_kv: the meaning of a layer-shared model; None takes what the file records, else "own".

    Returns:
      The config, and the stored block of each layer in the file.

    Raises:
      UserError: naming the key and the value that are missing, wrong or not expressible.
    """
    _check_kind(values, source)
    try:
        if values["model_type"] == COMPACT_TYPE:
            config = _compact_config(values, source, num_layers)
            blocks = tuple(range(config.num_layers))
        else:
            _check_num_layers(values.get("num_hidden_layers"), "num_hidden_layers", num_layers)
            plain = _plain_config(values, source, missing)
            if OWN_KEY not in values:
                return _foreign_config(values, source, plain, shared_kv)
            config = _expanded_config(values, source, plain)
            blocks = config.visit_order
        if shared_kv not in (None, config.shared_kv):
            raise UserError(
                f"the model has shared_kv = {config.shared_kv!r}, not {shared_kv!r}; leave "
                "shared_kv out"
            )
    except UserError as error:
        message = str(error)
        raise UserError(message if source in message else f"{source}: {message}") from error
    return config, blocks


def _foreign_config(
    values: Mapping[str, Any], source: str, plain: ModelConfig, shared_kv: str | None
) -> tuple[ModelConfig, tuple[int, ...]]:
    """The config of a folder that we did not write: Llama, or MobileLLM as published."""
    sharing = {}
    if _flag(values, "layer_sharing", source):
        if shared_kv is None:
            logging.warning(
                "%s: layer_sharing does not say what a repeated block attends to; read as "
                "shared_kv 'own', the paper's meaning (the other one is 'first_visit')",
                source,
            )
        sharing = {"sharing": "immediate", "num_repeats": 2}
    config = dataclasses.replace(plain, **sharing, shared_kv=shared_kv or "own")
    return config, tuple(range(config.num_layers))


def _own_record(values: Mapping[str, Any], mend: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The config that our own export recorded, and the whole record."""
    own = values.get(OWN_KEY)
    if not (isinstance(own, dict) and isinstance(own.get("config"), dict)):
        raise UserError(f"the key {OWN_KEY!r} has no 'config'; {mend}")
    return ModelConfig.from_dict(own["config"]), own


def _expanded_config(values: Mapping[str, Any], source: str, plain: ModelConfig) -> ModelConfig:
    """The recorded config; the Llama keys must describe the same model."""
    config, _ = _own_record(values, "remove the key")
    if config.depth != plain.num_layers:
        raise UserError(
            f"{source}: num_hidden_layers = {plain.num_layers}, but {OWN_KEY}.config runs "
            f"{config.depth} blocks; remove the key {OWN_KEY!r} to read it as a plain Llama"
        )
    expanded = dataclasses.replace(
        config, num_layers=config.depth, sharing="none", num_repeats=1, shared_kv="own"
    )
    for field in dataclasses.fields(ModelConfig):
        recorded, found = getattr(expanded, field.name), getattr(plain, field.name)
        if recorded != found:
            raise UserError(
                f"{source}: {OWN_KEY}.config says {field.name} = {recorded!r}, the other keys say "
                f"{found!r}; remove the key {OWN_KEY!r} to read it as a plain Llama"
            )
    return config


def _compact_config(values: Mapping[str, Any], source: str, num_layers: int) -> ModelConfig:
    """The recorded config; the keys that repeat it must not contradict it."""
    config, own = _own_record(values, "get the folder again")
    _check_num_layers(config.num_layers, f"{OWN_KEY}.config.num_layers", num_layers)
    order = {1: ("visit_order", list(config.visit_order)), 2: ("visits", _visits(config))}
    if type(number := own.get("format", 1)) is not int or number not in order:
        raise UserError(
            f"{OWN_KEY}.format = {number!r:.80}: this version reads {', '.join(map(str, order))}"
        )
    name, visits = order[number]
    expected = to_hf_config(config, "compact", "", None, ()) | {name: visits}
    said = {key: values.get(key, expected[key]) for key in _COMPACT_REPEATS}
    for key, found in (said | {name: own.get(name)}).items():
        if found != expected[key]:
            raise UserError(
                f"{key} = {found!r:.120}, but {OWN_KEY}.config makes it {expected[key]!r:.120}; "
                "get the folder again"
            )
    return config


def _check_num_layers(said: Any, key: str, num_layers: int) -> None:
    if said != num_layers:
        raise UserError(
            f"{key} = {said!r:.80}, but the files have {num_layers} layers; get the folder again"
        )


def _plain_config(values: Mapping[str, Any], source: str, missing: Collection[str]) -> ModelConfig:
    """The config from the Llama keys alone, without layer sharing; defaults as in transformers."""
    embed_dim = _positive(values, "hidden_size", source, int)
    num_heads = _positive(values, "num_attention_heads", source, int)
    if values.get("head_dim") is None and embed_dim % num_heads:
        raise UserError(
            f"{source}: hidden_size = {embed_dim} is not a multiple of num_attention_heads = "
            f"{num_heads} and there is no head_dim"
        )
    return ModelConfig(
        num_layers=_positive(values, "num_hidden_layers", source, int),
        num_heads=num_heads,
        num_kv_heads=_positive(values, "num_key_value_heads", source, int, num_heads),
        embed_dim=embed_dim,
        ffn_dim=_positive(values, "intermediate_size", source, int),
        head_dim=_positive(values, "head_dim", source, int, embed_dim // num_heads),
        vocab_size=_positive(values, "vocab_size", source, int),
        max_seq_len=_positive(values, "max_position_embeddings", source, int, 2048),
        tie_embeddings=_is_tied(values, source, missing),
        rope_theta=_rope_theta(values, source),
        norm_eps=_positive(values, "rms_norm_eps", source, float, 1e-6),
        init_std=_positive(values, "initializer_range", source, float, 0.02),
    )


def _check_kind(values: Mapping[str, Any], source: str) -> None:
    """Refuses everything that is not plain Llama arithmetic; unknown keys are warned about."""
    if (kind := values.get("model_type")) not in _MODEL_TYPES:
        raise UserError(
            f"{source}: model_type = {kind!r:.80}: only {' and '.join(_MODEL_TYPES)} can be read"
        )
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(a in _ARCHITECTURES for a in architectures)
    ):
        raise UserError(
            f"{source}: architectures = {architectures!r:.120}: only language models can be read, "
            f"{' or '.join(_ARCHITECTURES)}"
        )
    for key, allowed in _ONLY_VALUES.items():
        if (value := values.get(key)) not in allowed:
            raise UserError(
                f"{source}: {key} = {value!r:.120} is not supported: only "
                f"{' or '.join(repr(a) for a in allowed)}"
            )
    kinds = values.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    ):
        raise UserError(
            f"{source}: layer_types = {kinds!r:.120} is not supported: only 'full_attention'"
        )
    if unknown := sorted(values.keys() - _READ - _ONLY_VALUES.keys() - _WITHOUT_EFFECT):
        logging.warning("%s: ignores unknown keys %s", source, ", ".join(unknown)[:300])


def _is_tied(values: Mapping[str, Any], source: str, missing: Collection[str]) -> bool:
    """Whether input and output embedding are one; without a key they are not, as in transformers.

    The published MobileLLM configs say `tie_word_embeddings: false` and tie by `share_embedding`.
    """
    if _flag(values, "tie_word_embeddings", source):
        return True
    if _flag(values, "share_embedding", source):
        logging.warning("%s: share_embedding ties the embeddings, as MobileLLM means it", source)
        return True
    if missing:
        said = "is false" if "tie_word_embeddings" in values else "is absent, which means false"
        raise UserError(
            f"{source}: tie_word_embeddings {said}, but the weight files have no "
            f"{' and no '.join(sorted(missing))}; get all files of the model again, or set "
            "tie_word_embeddings to true if one matrix is both input embedding and head"
        )
    return False


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    bases = {}
    if values.get("rope_theta") is not None:
        bases["rope_theta"] = _positive(values, "rope_theta", source, float)
    for key in ("rope_parameters", "rope_scaling"):
        if (rope := values.get(key)) is None:
            continue
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
        if not plain or any(rope.get(k, "default") != "default" for k in ("rope_type", "type")):
            raise UserError(
                f"{source}: {key} = {rope!r:.200} is not supported: only rope_type 'default'"
            )
        if "rope_theta" in rope:
            bases[f"{key}.rope_theta"] = _positive(rope, "rope_theta", source, float)
    if len(set(bases.values())) > 1:
        raise UserError(f"{source}: contradicts itself: {bases}")
    return next(iter(bases.values()), 10_000.0)


def _positive(values: Mapping[str, Any], key: str, source: str, kind: type, default=None) -> Any:
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{source}: has no {key}")
    largest = 2**31 if kind is int else 1e300
    if type(value) not in (int, kind) or not 0 < value < largest:
        number = "whole number below 2^31" if kind is int else "finite number"
        raise UserError(f"{source}: {key} = {value!r:.80}: expected a positive {number}")
    return kind(value)


def _flag(values: Mapping[str, Any], key: str, source: str) -> bool:
    value = values.get(key)
    if value not in (None, True, False):
        raise UserError(f"{source}: {key} = {value!r:.80}: expected true or false")
    return bool(value)
