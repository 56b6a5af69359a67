"""`load_hf` on folders of other people: what it understands, what it refuses, damaged files."""

import dataclasses
import json
import logging
import os
import random
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import (
    TINY,
    VARIANTS,
    edit_config,
    edit_tensors,
    load_hf,
    make_params,
    shard,
    train_small_tokenizer,
    write_index,
)

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import read_hf, save_hf
from mobilellm_jax.model.config import ModelConfig

NUM_CHECKED_MUTATIONS = 400
NUM_UNCHECKED_MUTATIONS = 400


@pytest.fixture
def saved(tmp_path):
    """An export of the tied GQA model without our own key in config.json: a foreign folder."""
    folder = tmp_path / "model"
    save_hf(folder, TINY, make_params(TINY))
    edit_config(folder, mobilellm=None)
    return folder


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> bytes:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


# ---------------------------------------------------------------- what import understands


def test_published_mobilellm_keys_tie_and_share(saved, caplog):
    changes = {"model_type": "mobilellm", "architectures": ["MobileLLMForCausalLM"]}
    changes |= {"share_embedding": True, "layer_sharing": True, "rope_parameters": None}
    edit_config(saved, **changes, tie_word_embeddings=False, rope_theta=20000.0)
    with caplog.at_level(logging.WARNING):
        config, params = load_hf(saved)
    expected = {"sharing": "immediate", "num_repeats": 2, "rope_theta": 20000.0}
    assert config == dataclasses.replace(TINY, **expected)
    assert "share_embedding" in caplog.text and "'first_visit'" in caplog.text
    chex.assert_trees_all_equal(params, make_params(TINY))
    config, _ = load_hf(saved, shared_kv="first_visit")
    assert config.shared_kv == "first_visit"


def test_a_tied_model_of_which_only_the_head_was_saved_is_read(saved, caplog):
    """MobileLLM's first safetensors: huggingface/transformers issue 34759."""

    def edit(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(saved, edit)
    edit_config(saved, tie_word_embeddings=False, share_embedding=True)
    with caplog.at_level(logging.WARNING):
        config, params = load_hf(saved)
    assert config == TINY and "read from lm_head.weight" in caplog.text
    chex.assert_trees_all_equal(params, make_params(TINY))


def test_head_dim_and_kv_heads_have_the_defaults_of_llama(tmp_path):
    config = dataclasses.replace(TINY, num_kv_heads=4, head_dim=6)
    save_hf(tmp_path / "model", config, make_params(config))
    edit_config(tmp_path / "model", mobilellm=None, head_dim=None, num_key_value_heads=None)
    assert load_hf(tmp_path / "model")[0] == config


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(tmp_path):
    changes = {"max_seq_len": 64, "rope_theta": 5e5, "norm_eps": 1e-3, "init_std": 0.1}
    config = dataclasses.replace(TINY, **changes)
    save_hf(tmp_path / "model", config, make_params(config))
    keys = ["max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps"]
    keys += ["initializer_range", "mobilellm"]
    edit_config(tmp_path / "model", **dict.fromkeys(keys))
    defaults = {"max_seq_len": 2048, "rope_theta": 1e4, "norm_eps": 1e-6, "init_std": 0.02}
    assert load_hf(tmp_path / "model")[0] == dataclasses.replace(TINY, **defaults)


def test_derived_buffers_and_an_equal_head_are_tolerated(saved):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(saved, edit)
    config, params = load_hf(saved)
    assert config == TINY
    chex.assert_trees_all_equal(params, make_params(TINY))


def test_unknown_keys_are_named_in_a_warning(saved, caplog):
    edit_config(saved, frobnicate=3)
    with caplog.at_level(logging.WARNING):
        load_hf(saved)
    assert "frobnicate" in caplog.text


def test_links_of_the_hugging_face_cache_are_followed(saved, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (saved / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert load_hf(snapshot)[0] == TINY


def test_sharded_weights_are_read(saved):
    shard(saved)
    chex.assert_trees_all_equal(load_hf(saved)[1], make_params(TINY))


# ---------------------------------------------------------------- what import refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"rope_scaling": 7}, "rope_scaling = 7"),
        ({"rope_theta": 5e5}, "contradicts"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": -24}, "hidden_size = -24"),
        ({"hidden_size": "24"}, "hidden_size = '24'"),
        ({"hidden_size": 2**30}, "embed_tokens.*shape"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"vocab_size": 96}, "embed_tokens.*97.*96"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false.* no lm_head.weight"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is absent.* no lm_head.weight"),
    ],
)
def test_configs_that_cannot_be_expressed_are_refused_by_key(changes, message, saved):
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=message):
        load_hf(saved)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [True, -1, 97, "2", 2.0, [2, 97], [2, None], {"a": 2}])
def test_stop_ids_that_are_no_ids_are_refused_by_file_and_key(file, value, saved):
    (saved / "SHA256SUMS").unlink(missing_ok=True)
    values = json.loads((saved / file).read_text())
    (saved / file).write_text(json.dumps(values | {"eos_token_id": value}))
    with pytest.raises(UserError, match=f"model/{file}: eos_token_id = .*0 to 96"):
        read_hf(saved)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, None),
        (2, None, (2,)),
        (2, 2, (2,)),
        (2, [13, 2], (2, 13)),
        ([2, 13], 5, (2, 13, 5)),
        (None, [13], (13,)),
    ],
)
def test_answers_end_at_the_ids_of_both_files(config, generation, expected, saved):
    edit_config(saved, eos_token_id=config)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_hf(saved).prompt.stop_ids == expected
    (saved / "generation_config.json").unlink()
    if generation is None:
        assert read_hf(saved).prompt.stop_ids == expected


def set_tensor(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors.*model\.norm"),
        (set_tensor("model.layers.0.self_attn.q_norm.weight", np.ones(8, np.float32)), "q_norm"),
        (set_tensor("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)), "bias"),
        (set_tensor("model.norm.weight", np.ones(23, np.float32)), r"\[23\].*\[24\]"),
        (set_tensor("model.norm.weight", np.ones(24, np.int8)), "dtype I8"),
        (set_tensor("model.norm.weight", np.ones(24, np.float64)), "dtype F64"),
        (set_tensor("model.norm.weight", np.full(24, np.nan, np.float32)), "model.norm.*NaN"),
        (set_tensor("lm_head.weight", np.ones((97, 24), np.float32)), "lm_head.*differ"),
    ],
)
def test_tensors_that_are_missing_unknown_or_wrong_are_refused(edit, message, saved):
    edit_tensors(saved, edit)
    with pytest.raises(UserError, match=message):
        load_hf(saved)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_index_names_that_leave_the_folder_are_refused(name, saved):
    index = shard(saved)
    write_index(saved, dict.fromkeys(index, name))
    with pytest.raises(UserError, match="leaves the folder"):
        load_hf(saved)


def test_links_out_of_the_folder_are_refused(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (saved / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="outside of the folder"):
        load_hf(saved)


def test_an_index_that_is_wrong_about_a_tensor_is_refused(saved):
    index = shard(saved)
    for change in ({"model.norm.weight": None}, {"extra": "part-0.safetensors"}):
        wrong = {k: v for k, v in (index | change).items() if v is not None}
        write_index(saved, wrong)
        with pytest.raises(UserError, match=next(iter(change))):
            load_hf(saved)
    moved = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    write_index(saved, index | {"model.norm.weight": moved[index["model.norm.weight"]]})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_hf(saved)


def test_an_index_beside_weights_that_it_does_not_name_is_refused(saved):
    content = (saved / "model.safetensors").read_bytes()
    shard(saved)
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not name it; remove the one that is out of date"):
        load_hf(saved)


def test_a_tensor_in_two_files_is_refused(saved):
    shard(saved)
    first = safetensors.numpy.load_file(saved / "part-0.safetensors")
    second = safetensors.numpy.load_file(saved / "part-1.safetensors")
    name = next(iter(first))
    safetensors.numpy.save_file(second | {name: first[name]}, saved / "part-1.safetensors")
    with pytest.raises(UserError, match="is also in"):
        load_hf(saved)


def test_a_header_that_describes_a_tensor_twice_is_refused(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps({"model.norm.weight": json.loads(header)["model.norm.weight"]})
    header = header[:-1] + b"," + entry[1:].encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(UserError, match="twice"):
        load_hf(saved)


def test_a_folder_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors, pytorch_model\.bin"):
        load_hf(saved)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\ufffe", '{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000, "\0"]
)
def test_malformed_json_is_refused(content, saved):
    (saved / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        load_hf(saved)


def test_folders_without_the_files_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_hf(tmp_path / "nothing")
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        load_hf(saved)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "config.json"]
)
def test_a_pointer_of_git_lfs_is_named_as_one(name, saved):
    if name == "pytorch_model.bin":
        (saved / "model.safetensors").unlink()
    (saved / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS.*git lfs pull"):
        read_hf(saved)


def test_a_pointer_of_git_lfs_in_a_sealed_export_is_named_as_one(tmp_path):
    save_hf(tmp_path / "model", TINY, make_params(TINY))
    (tmp_path / "model" / "model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match="model.safetensors: is a pointer of Git LFS"):
        read_hf(tmp_path / "model")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(saved, tokenizer_model):
    (saved / "tokenizer.model").write_bytes(tokenizer_model)
    with pytest.raises(UserError, match="600 pieces.*97"):
        load_hf(saved)
    (saved / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match="tokenizer.model"):
        read_hf(saved)


# ---------------------------------------------------------------- damage


def mutate(rng: random.Random, content: bytes, end: int) -> bytes:
    """One random flip, cut or overwrite before byte `end`."""
    place = rng.randrange(end)
    kind = rng.randrange(4)
    if kind == 0:
        return content[:place]
    replacement = {
        1: bytes([content[place] ^ (1 << rng.randrange(8))]),
        2: bytes([rng.randrange(256)]),
        3: b"",
    }[kind]
    return content[:place] + replacement + content[place + 1 :]


def loads_or_refuses(folder: Path, config: ModelConfig, params: dict) -> bool:
    """Whether it was refused; anything but a UserError or the exact model fails."""
    try:
        loaded_config, loaded = load_hf(folder)
    except UserError:
        return True
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)
    return False


def test_damage_anywhere_is_noticed_by_the_checksums(tmp_path, tokenizer_model):
    config = dataclasses.replace(VARIANTS["immediate"], vocab_size=600)
    params, folder = make_params(config), tmp_path / "model"
    save_hf(folder, config, params, tokenizer_model=tokenizer_model)
    rng = random.Random(0)
    names = sorted(os.listdir(folder))
    refused = 0
    for i in range(NUM_CHECKED_MUTATIONS):
        path = folder / names[i % len(names)]
        content = path.read_bytes()
        damaged = mutate(rng, content, len(content))
        path.write_bytes(damaged)
        refused += loads_or_refuses(folder, config, params) or damaged == content
        path.write_bytes(content)
    assert refused >= NUM_CHECKED_MUTATIONS * 0.98  # an empty list of checksums checks nothing


def test_a_file_that_is_missing_or_has_two_checksums_is_noticed(tmp_path):
    save_hf(tmp_path / "model", TINY, make_params(TINY))
    sums = tmp_path / "model" / "SHA256SUMS"
    lines = sums.read_text()
    sums.write_text("0" * 64 + "  config.json\n" + lines)
    with pytest.raises(UserError, match="SHA256SUMS: is damaged in the line .*config.json"):
        load_hf(tmp_path / "model")
    sums.write_text(lines)
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(UserError, match="generation_config.json: is missing"):
        load_hf(tmp_path / "model")


def test_without_checksums_damaged_headers_never_give_another_model(saved):
    params = make_params(TINY)
    # With our own record, as an edited digit of a plain config is simply another config.
    edit_config(saved, mobilellm={"config": TINY.to_dict()})
    rng = random.Random(1)
    for i in range(NUM_UNCHECKED_MUTATIONS):
        path = saved / ("model.safetensors" if i % 2 else "config.json")
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little") if i % 2 else len(content)
        path.write_bytes(mutate(rng, content, end))
        loads_or_refuses(saved, TINY, params)
        path.write_bytes(content)
