"""Hugging Face folders: names, transformers as the reference, round trips, what is not exported."""

import argparse
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hf_folders import (
    TINY,
    VARIANTS,
    edit_config,
    edit_tensors,
    load_hf,
    make_params,
    train_small_tokenizer,
)
from model_cases import save_params

from mobilellm_jax.checkpoints.files import load_checkpoint
from mobilellm_jax.errors import UserError
from mobilellm_jax.export import command
from mobilellm_jax.huggingface import names as hf_names
from mobilellm_jax.huggingface.folder import read_hf, save_hf
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS

LOGIT_TOLERANCE = 1e-4
BF16_RELATIVE_TOLERANCE = 2**-8
# Beyond the parameters, as a share of their size.
MAX_SAVING_MEMORY, MAX_LOADING_MEMORY = 0.4, 1.4

ALL_VARIANTS = pytest.mark.parametrize("variant", list(VARIANTS))


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> bytes:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def our_logits(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    from mobilellm_jax.model.transformer import MobileLLM

    return np.asarray(MobileLLM(config).apply({"params": params}, tokens))


def their_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def assert_same_logits(config: ModelConfig, params: dict, folder: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 33))
    ours, theirs = our_logits(config, params, tokens), their_logits(folder, tokens)
    np.testing.assert_allclose(ours, theirs, atol=LOGIT_TOLERANCE, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


# ---------------------------------------------------------------- names and values


def test_names_and_shapes_are_those_of_llama(tmp_path):
    config = dataclasses.replace(TINY, num_layers=1, tie_embeddings=False)
    save_hf(tmp_path / "model", config, make_params(config))
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {
        "model.embed_tokens.weight": (97, 24),
        "model.layers.0.input_layernorm.weight": (24,),
        "model.layers.0.self_attn.q_proj.weight": (32, 24),
        "model.layers.0.self_attn.k_proj.weight": (16, 24),
        "model.layers.0.self_attn.v_proj.weight": (16, 24),
        "model.layers.0.self_attn.o_proj.weight": (24, 32),
        "model.layers.0.post_attention_layernorm.weight": (24,),
        "model.layers.0.mlp.gate_proj.weight": (40, 24),
        "model.layers.0.mlp.up_proj.weight": (40, 24),
        "model.layers.0.mlp.down_proj.weight": (24, 40),
        "model.norm.weight": (24,),
        "lm_head.weight": (97, 24),
    }


def test_values_stand_where_llama_has_them(tmp_path):
    config = dataclasses.replace(TINY, tie_embeddings=False)
    params = make_params(config)
    save_hf(tmp_path / "model", config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    attention, ffn = params["blocks"]["attention"], params["blocks"]["ffn"]
    layer, d, n, k, h, f = 2, 5, 3, 1, 6, 7
    prefix = f"model.layers.{layer}."
    for name, place, value in (
        ("self_attn.q_proj", (n * 8 + h, d), attention["query"][layer, d, n, h]),
        ("self_attn.k_proj", (k * 8 + h, d), attention["key"][layer, d, k, h]),
        ("self_attn.v_proj", (k * 8 + h, d), attention["value"][layer, d, k, h]),
        ("self_attn.o_proj", (d, n * 8 + h), attention["output"][layer, n, h, d]),
        ("mlp.gate_proj", (f, d), ffn["gate"][layer, d, f]),
        ("mlp.up_proj", (f, d), ffn["up"][layer, d, f]),
        ("mlp.down_proj", (d, f), ffn["down"][layer, f, d]),
        ("input_layernorm", (d,), params["blocks"]["attention_norm"]["scale"][layer, d]),
        ("post_attention_layernorm", (d,), params["blocks"]["ffn_norm"]["scale"][layer, d]),
    ):
        assert tensors[f"{prefix}{name}.weight"][place] == value, name
    assert tensors["lm_head.weight"][50, d] == params["head"][d, 50]
    assert tensors["model.embed_tokens.weight"][50, d] == params["embedding"][50, d]


def test_the_names_cover_the_whole_model():
    transformer = pytest.importorskip("mobilellm_jax.model.transformer")
    for config in VARIANTS.values():
        expected = flatten_dict(transformer.abstract_params(config))
        shapes = {weight.path: weight.shape(config) for weight in hf_names.weights(config)}
        assert shapes == {path: leaf.shape for path, leaf in expected.items()}


# ---------------------------------------------------------------- against transformers


@ALL_VARIANTS
def test_transformers_gives_our_logits(variant, tmp_path):
    config = VARIANTS[variant]
    params = make_params(config)
    save_hf(tmp_path / "model", config, params)
    assert_same_logits(config, params, tmp_path / "model")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_by_transformers_gives_the_same_logits_here(tied, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=101,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    )
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    config, params = load_hf(tmp_path / "model")
    assert config.tie_embeddings == tied and config.norm_eps == 1e-6 and config.head_dim == 8
    assert_same_logits(config, params, tmp_path / "model")


@pytest.mark.parametrize("tied", [None, False, True])
@pytest.mark.parametrize("lost", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_matrix_that_transformers_would_draw_at_random_is_refused(tied, lost, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, tie_embeddings=False)
    params = make_params(config)
    if tied:
        params["head"] = params["embedding"].T
    save_hf(tmp_path / "m", config, params)
    edit_config(tmp_path / "m", mobilellm=None, tie_word_embeddings=tied)
    if lost:
        edit_tensors(tmp_path / "m", lambda tensors: tensors.pop(lost))
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    if loading["missing_keys"]:
        with pytest.raises(UserError, match=rf"config.json: tie_word_embeddings is .*no {lost}"):
            load_hf(tmp_path / "m")
    else:
        assert_same_logits(*load_hf(tmp_path / "m"), tmp_path / "m")


def test_a_shared_model_comes_back_shared_after_transformers_saved_it_again(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = VARIANTS["immediate"]
    params = make_params(config)
    save_hf(tmp_path / "model", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "again")
    loaded_config, loaded = load_hf(tmp_path / "again")
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)


def test_transformers_loads_tokenizer_ids_and_generation_defaults(tmp_path, tokenizer_model):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, vocab_size=640)  # padded
    save_hf(tmp_path / "m", config, make_params(config), tokenizer_model=tokenizer_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert tokenizer("def main():")["input_ids"][0] == 1
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert read_hf(tmp_path / "m").tokenizer.model_bytes == tokenizer_model
    load_hf(tmp_path / "m")


# ---------------------------------------------------------------- round trips


@ALL_VARIANTS
def test_round_trip_is_bitwise(variant, tmp_path):
    config = VARIANTS[variant]
    params = make_params(config)
    save_hf(tmp_path / "model", config, params)
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)
    chex.assert_trees_all_equal_dtypes(loaded, params)
    assert read_hf(tmp_path / "model").tokenizer is None


def test_the_arrays_of_a_file_begin_at_a_multiple_of_8_bytes(tmp_path):
    """Whoever maps a file reads the arrays where they lie."""
    for num_layers in range(1, 9):  # headers of many lengths
        config = dataclasses.replace(TINY, num_layers=num_layers)
        save_hf(tmp_path / "model", config, make_params(config))
        with open(tmp_path / "model" / "model.safetensors", "rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0


def test_half_precision_files_keep_the_rounded_values(tmp_path):
    params = make_params(TINY)
    for dtype in ("bfloat16", "float16"):
        save_hf(tmp_path / dtype, TINY, params, dtype=dtype)
        _, loaded = load_hf(tmp_path / dtype)
        chex.assert_trees_all_close(loaded, params, rtol=BF16_RELATIVE_TOLERANCE, atol=1e-7)
        save_hf(tmp_path / "again", TINY, loaded, dtype=dtype)
        chex.assert_trees_all_equal(load_hf(tmp_path / "again")[1], loaded)


def test_a_block_whose_visits_differ_is_not_folded(tmp_path):
    config = VARIANTS["immediate"]
    save_hf(tmp_path / "model", config, make_params(config))

    def edit(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1

    edit_tensors(tmp_path / "model", edit)
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj.*'mobilellm'"):
        load_hf(tmp_path / "model")
    edit_config(tmp_path / "model", mobilellm=None)
    assert load_hf(tmp_path / "model")[0].num_layers == 6


def test_a_record_that_contradicts_the_llama_keys_is_refused(tmp_path):
    save_hf(tmp_path / "model", TINY, make_params(TINY))
    edit_config(tmp_path / "model", rms_norm_eps=1e-6)
    with pytest.raises(UserError, match=r"norm_eps = 1e-05.*1e-06"):
        load_hf(tmp_path / "model")


# ---------------------------------------------------------------- what export refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": "relu"}, "SwiGLU"),
        ({"sharing": "immediate", "num_repeats": 2, "shared_kv": "first_visit"}, "'own'"),
    ],
)
def test_what_llama_cannot_express_is_not_exported(changes, message, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(UserError, match=message):
        save_hf(tmp_path / "model", config, make_params(config))
    assert os.listdir(tmp_path) == []


def test_heads_that_transformers_does_not_load_are_not_exported(tmp_path):
    config = dataclasses.replace(TINY, num_heads=5, num_kv_heads=5)
    with pytest.raises(UserError, match="24 is not a multiple of model.num_heads = 5.*hf_compact"):
        save_hf(tmp_path / "model", config, make_params(config))
    save_hf(tmp_path / "model", config, make_params(config), form="compact")
    assert load_hf(tmp_path / "model")[0] == config


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_exported(value, tmp_path):
    params = make_params(TINY)
    params["blocks"]["ffn"]["gate"][1, 2, 3] = value
    with pytest.raises(UserError, match=r"blocks/ffn/gate\[1\].*NaN"):
        save_hf(tmp_path / "model", TINY, params)
    assert os.listdir(tmp_path) == []


def test_values_too_large_for_float16_are_not_exported(tmp_path):
    params = make_params(TINY)
    params["final_norm"]["scale"][0] = 1e5
    with pytest.raises(UserError, match="final_norm/scale.*too large for float16"):
        save_hf(tmp_path / "model", TINY, params, dtype="float16")
    save_hf(tmp_path / "model", TINY, params, dtype="bfloat16")


def test_parameters_of_another_config_are_not_exported(tmp_path):
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    with pytest.raises(UserError, match="parameter head has shape None"):
        save_hf(tmp_path / "model", untied, make_params(TINY))
    with pytest.raises(UserError, match="attention/key"):
        save_hf(tmp_path / "model", TINY, make_params(VARIANTS["mha"]))


def test_a_tokenizer_with_more_pieces_than_embeddings_is_refused(tmp_path, tokenizer_model):
    with pytest.raises(UserError, match="600 pieces.*97"):
        save_hf(tmp_path / "model", TINY, make_params(TINY), tokenizer_model=tokenizer_model)


def test_an_earlier_export_is_replaced_and_anything_else_is_not(tmp_path):
    folder = tmp_path / "model"
    save_hf(folder, TINY, make_params(TINY, 0))
    save_hf(folder, TINY, make_params(TINY, 1))
    chex.assert_trees_all_equal(load_hf(folder)[1], make_params(TINY, 1))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an earlier export"):
        save_hf(folder, TINY, make_params(TINY))
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_an_export_without_its_checksums_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    save_hf(folder, TINY, make_params(TINY, 0))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="not an earlier export"):
        save_hf(folder, TINY, make_params(TINY, 1))
    chex.assert_trees_all_equal(load_hf(folder)[1], make_params(TINY, 0))


def test_an_earlier_export_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", os.rename
    save_hf(folder, TINY, make_params(TINY, 0))

    def fail_for_the_new_one(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_for_the_new_one)
        with pytest.raises(UserError, match="cannot be written"):
            save_hf(folder, TINY, make_params(TINY, 1))
    chex.assert_trees_all_equal(load_hf(folder)[1], make_params(TINY, 0))
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_hf(tmp_path / "model", TINY, make_params(TINY))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- command line and imports


def test_convert_goes_there_and_back(tmp_path, capsys, tokenizer_model):
    config = dataclasses.replace(VARIANTS["reverse"], vocab_size=600)
    params = make_params(config)
    save_params(tmp_path / "run", config, params, tokenizer_model)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def run(*arguments):
        command.main(parser.parse_args([str(a) for a in arguments]))

    output = tmp_path / "hf"
    run("--to", "hf", "--checkpoint", tmp_path / "run", "--output", output, "--no-verify")
    run("--from", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    saved = load_checkpoint(tmp_path / "back")
    assert (saved.config, saved.tokenizer.model_bytes) == (config, tokenizer_model)
    chex.assert_trees_all_equal(saved.params, params)
    printed = capsys.readouterr().out
    assert f"{output}/README.md" in printed and "each is stored 3 times" in printed
    with pytest.raises(UserError, match="--input"):
        run("--from", "hf", "--output", tmp_path / "x")
    with pytest.raises(UserError, match="--dtype has no meaning"):
        run("--from", "hf", "--input", "x", "--output", "y", "--dtype", "float16")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, mobilellm_jax.export.command; "
        "print([m for m in ('torch', 'transformers', 'jax', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ---------------------------------------------------------------- full size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["125m", "125m_ls"])
def test_full_size_round_trip_needs_the_weights_once(name, tmp_path):
    config = PRESETS[name]
    params = make_params(config)
    size = sum(leaf.nbytes for leaf in flatten_dict(params).values())
    tracemalloc.start()
    save_hf(tmp_path / "model", config, params)
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    loaded_config, loaded = load_hf(tmp_path / "model")
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert saving < MAX_SAVING_MEMORY * size and loading < MAX_LOADING_MEMORY * size
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)
    shutil.rmtree(tmp_path / "model")
