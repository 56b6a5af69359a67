"""The compact folder: shared blocks once, run by transformers with the code in the folder."""

import dataclasses
import json
import logging
import shutil
import warnings

import chex
import numpy as np
import pytest
import safetensors.numpy
from conversion_cases import EVERY_KIND, TOKENS, assert_same_logits, jax_logits
from hf_folders import edit_config, edit_tensors, load_hf, train_small_tokenizer
from model_cases import ALL_KINDS, random_params, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.transformers_runtime import TransformersRuntime
from mobilellm_jax.huggingface.folder import save_hf
from mobilellm_jax.model.costs import count_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # more only disturb each other on such small models

LOGIT_TOLERANCE = 1e-4
PADDING_TOLERANCE = 1e-4  # of logits whose rows are padded or not
GRADIENT_TOLERANCE = 1e-5
SIZE_TOLERANCE = 1.01

OWN, FIRST_VISIT = "reverse-x2-own", "repeat_all-x2-first_visit"
BOTH_MEANINGS = pytest.mark.parametrize("kind", [OWN, FIRST_VISIT])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(kind)` is the compact folder of a kind."""
    root = tmp_path_factory.mktemp("compact")

    def make(kind):
        if not (root / kind).exists():
            config = ALL_KINDS[kind]
            save_hf(root / kind, config, random_params(config), form="compact")
        return root / kind

    return make


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> bytes:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def load_model(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    ).eval()


def generate(model, tokens, **options):
    tokens = torch.as_tensor(tokens)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, **options)


# ---------------------------------------------------------------- the same function


@EVERY_KIND
def test_transformers_gives_the_logits_of_jax_cached_or_not(kind, folders):
    runtime, expected = TransformersRuntime(folders(kind)), jax_logits(kind)[0]
    row = TOKENS[0].tolist()
    assert_same_logits(runtime.full_logits(row), expected, LOGIT_TOLERANCE)
    assert_same_logits(runtime.logits(row), expected, LOGIT_TOLERANCE)
    assert_same_logits(runtime.last_logits(row), expected[-1], LOGIT_TOLERANCE)
    cached = runtime.greedy(row, 12)
    tokens = torch.tensor([row])
    uncached = generate(runtime.model, tokens, max_new_tokens=12, use_cache=False)
    assert cached == uncached[0, len(row) :].tolist() and len(cached) == 12


@EVERY_KIND
def test_the_cache_has_as_many_layers_as_the_config_says(kind, folders):
    config, model = ALL_KINDS[kind], load_model(folders(kind))
    cache = model(torch.from_numpy(TOKENS)).past_key_values
    assert len(cache) == config.num_cache_slots
    assert len(cache) == model.config.num_hidden_layers
    assert all(layer.keys.shape[2] == TOKENS.shape[1] for layer in cache.layers)


@BOTH_MEANINGS
def test_prompts_of_several_lengths_padded_on_the_left_are_continued_as_alone(kind, folders):
    model = load_model(folders(kind))
    prompts = [TOKENS[0, :9], TOKENS[1, :4], TOKENS[2, :1]]
    batch, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    options = {"attention_mask": torch.from_numpy(mask)}
    together = generate(model, batch, **options)[:, 9:]
    padded = model(torch.from_numpy(batch), **options).logits
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None])[0, len(prompt) :]
        assert together[row].tolist() == alone.tolist()
        expected = model(torch.from_numpy(prompt[None])).logits
        difference = (padded[row, 9 - len(prompt) :] - expected[0]).abs().max()
        assert difference < PADDING_TOLERANCE
    # Each token of the padding attends to itself, lest it divide by nothing.
    nothing_before = model(torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
    assert (padded[2, :8] - nothing_before).abs().max() < PADDING_TOLERANCE


@BOTH_MEANINGS
def test_beam_search_reorders_the_cache(kind, folders):
    model = load_model(folders(kind))
    options = {"num_beams": 4, "max_new_tokens": 10}
    cached = generate(model, TOKENS[:, :5], **options)
    uncached = generate(model, TOKENS[:, :5], use_cache=False, **options)
    assert cached.tolist() == uncached.tolist()
    assert cached.tolist() != generate(model, TOKENS[:, :5], max_new_tokens=10).tolist()


@BOTH_MEANINGS
def test_a_cache_of_static_size_gives_the_same_tokens(kind, folders):
    model = load_model(folders(kind))
    expected = generate(model, TOKENS[:, :5])
    assert generate(model, TOKENS[:, :5], cache_implementation="static").equal(expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    whole, tokens = model(torch.from_numpy(TOKENS)).logits, torch.from_numpy(TOKENS)
    pieces = [model(p, past_key_values=cache).logits for p in tokens.split([7, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=LOGIT_TOLERANCE, rtol=0)


def test_only_the_logits_that_are_asked_for_are_computed(folders):
    model = load_model(folders(OWN))
    whole = model(torch.from_numpy(TOKENS)).logits
    assert model(torch.from_numpy(TOKENS), logits_to_keep=2).logits.shape[1] == 2
    some = model(torch.from_numpy(TOKENS), logits_to_keep=torch.tensor([3, 5])).logits
    torch.testing.assert_close(some, whole[:, [3, 5]], atol=1e-5, rtol=0)


def test_half_precision_is_loaded_as_asked_for(folders):
    model = load_model(folders(OWN), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert generate(model, TOKENS).shape == (3, 17 + 8)


# ---------------------------------------------------------------- training


@BOTH_MEANINGS
def test_loss_and_gradients_are_the_same_with_checkpointing_and_with_padding(kind, folders):
    tokens, gradients, losses = torch.from_numpy(TOKENS), [], []
    mask = torch.ones_like(tokens)
    for recompute, options in ((False, {}), (True, {}), (True, {"attention_mask": mask})):
        model = load_model(folders(kind)).train()
        if recompute:
            with warnings.catch_warnings():  # deprecated in 5, the only name in 4
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": True})
        output = model(tokens, labels=tokens, **options)
        assert output.past_key_values is None
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append([p.grad for p in model.parameters()])
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(jax_logits(kind)[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )
    np.testing.assert_allclose(losses, expected.item(), atol=1e-5)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=GRADIENT_TOLERANCE, rtol=1e-3)


def test_a_model_from_the_config_alone_begins_as_ours_do(folders):
    config = transformers.AutoConfig.from_pretrained(folders(OWN), trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert (model.model.norm.weight == 1).all()
    std = model.model.layers[0].mlp.up_proj.weight.std().item()
    assert 0.9 * ALL_KINDS[OWN].init_std < std < 1.1 * ALL_KINDS[OWN].init_std
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------- folders


@EVERY_KIND
def test_round_trip_is_bitwise(kind, folders):
    config, params = load_hf(folders(kind))
    assert config == ALL_KINDS[kind]
    chex.assert_trees_all_equal(params, random_params(config))


@pytest.mark.parametrize("kind", [OWN, FIRST_VISIT, "untied", "relu"])
def test_what_transformers_saves_again_is_the_same_model(kind, folders, tmp_path, caplog):
    model = load_model(folders(kind))
    model.save_pretrained(tmp_path / "again")
    with caplog.at_level(logging.WARNING):
        config, params = load_hf(tmp_path / "again")
    assert caplog.text == "" and config == ALL_KINDS[kind]
    chex.assert_trees_all_equal(params, random_params(config))
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "again", folders(kind))]
    assert abs(sizes[0] - sizes[1]) < 200  # no tensor twice
    again = load_model(tmp_path / "again")
    assert generate(again, TOKENS).equal(generate(model, TOKENS))
    TransformersRuntime(tmp_path / "again")  # the code is ours, to the byte


def test_a_vocabulary_that_grew_in_transformers_comes_back(folders, tmp_path):
    model = load_model(folders(OWN))
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path / "grown")
    config, params = load_hf(tmp_path / "grown")
    assert config == dataclasses.replace(ALL_KINDS[OWN], vocab_size=60)
    assert params["embedding"].shape[0] == 60
    assert load_model(tmp_path / "grown").lm_head.weight.shape[0] == 60


def test_shared_blocks_take_the_space_of_one_pass(tmp_path):
    sizes = {}
    for name, config in (("shared", tiny("immediate", 2)), ("single", tiny())):
        save_hf(tmp_path / name, config, random_params(config), form="compact")
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert sizes["shared"] == sizes["single"] < SIZE_TOLERANCE * 4 * count_params(tiny()) + 4000
    save_hf(tmp_path / "expanded", tiny("immediate", 2), random_params(tiny()))
    assert (tmp_path / "expanded" / "model.safetensors").stat().st_size > 1.5 * sizes["shared"]


def test_stored_names_are_those_of_a_llama_of_the_stored_blocks(folders):
    names = safetensors.numpy.load_file(folders(OWN) / "model.safetensors").keys()
    assert {name.split(".")[2] for name in names if "layers" in name} == {"0", "1", "2"}
    assert "lm_head.weight" not in names and "model.layers.2.self_attn.q_proj.weight" in names


def test_two_folders_of_one_name_run_each_its_own_code(folders, tmp_path):
    for number in (1, 2):
        shutil.copytree(folders(OWN), tmp_path / str(number) / "model")
    code = tmp_path / "2" / "model" / "model.py"
    code.write_text(code.read_text() + "\nDecoder.edition = 2\n")
    first, second = (load_model(tmp_path / str(number) / "model") for number in (1, 2))
    assert not hasattr(first.model, "edition") and second.model.edition == 2
    assert not hasattr(load_model(tmp_path / "1" / "model").model, "edition")


def test_the_runtime_does_not_run_code_of_others(folders, tmp_path):
    shutil.copytree(folders(OWN), tmp_path / "model")
    code = tmp_path / "model" / "modeling_mobilellm.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="not the code of this version"):
        TransformersRuntime(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["auto_map", "one more", "another file", "tokenizer"])
def test_the_runtime_does_not_run_code_that_was_added(where, tmp_path, tokenizer_model):
    config, folder = tiny("immediate", 2, vocab_size=600), tmp_path / "model"
    options = {"form": "compact", "tokenizer_model": tokenizer_model}
    save_hf(folder, config, random_params(config), **options)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    file = folder / "config.json"
    values = json.loads(file.read_text())
    evil_config, evil_tokenizer = {"AutoConfig": "evil.X"}, {"AutoTokenizer": [None, "evil.X"]}
    if where == "auto_map":
        edit_config(folder, auto_map=values["auto_map"] | evil_config)
    elif where == "one more":
        edit_config(folder, auto_map=values["auto_map"] | evil_tokenizer)
    elif where == "another file":
        (folder / "config.4.0.0.json").write_text(json.dumps(values | {"auto_map": evil_config}))
        edit_config(folder, configuration_files=["config.4.0.0.json"])
    else:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": evil_tokenizer}))
    with pytest.raises(UserError, match=rf"{file.name}: .*names other code"):
        TransformersRuntime(folder).encode("x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, but mobilellm.config makes it 6"),
        ({"hidden_size": 25}, "hidden_size = 25"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"mobilellm": None}, "'mobilellm' has no 'config'"),
        ({"mobilellm": {"config": {"num_layers": 3}}}, "lacks num_heads"),
        ({"mobilellm": {"config": tiny("immediate", 2).to_dict(), "format": [1]}}, "format = "),
        ({"mobilellm": {"config": tiny().to_dict()}}, "num_hidden_layers = 6"),
        ({"mobilellm": {"config": tiny("reverse", 2).to_dict()}}, "visit_order = None"),
        (
            {"mobilellm": {"config": tiny("reverse", 2, num_layers=10**9).to_dict()}},
            "num_layers = 1000000000, but the files have 3",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes, message, folders, tmp_path):
    shutil.copytree(folders(OWN), tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "model")


def test_another_meaning_than_the_recorded_one_is_refused(folders):
    with pytest.raises(UserError, match="shared_kv = 'own', not 'first_visit'"):
        load_hf(folders(OWN), shared_kv="first_visit")


def test_missing_and_unknown_tensors_are_refused(folders, tmp_path):
    shutil.copytree(folders(OWN), tmp_path / "model")
    extra = np.ones((24, 40), np.float32)
    edit_tensors(tmp_path / "model", lambda t: t.update({"model.layers.2.mlp.x.weight": extra}))
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.x\.weight"):
        load_hf(tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda t: t.pop("model.layers.2.mlp.x.weight"))
    edit_tensors(tmp_path / "model", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj"):
        load_hf(tmp_path / "model")


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="form = 'small': use one of expanded, compact"):
        save_hf(tmp_path / "model", tiny(), random_params(tiny()), form="small")


# ---------------------------------------------------------------- as a user runs it


def test_the_runtime_encodes_like_sentencepiece_and_does_not_stop_at_eos(
    tmp_path, tokenizer_model, folders, monkeypatch
):
    config = tiny("immediate", 2, vocab_size=600)
    params = random_params(config)
    save_hf(tmp_path / "m", config, params, form="compact", tokenizer_model=tokenizer_model)
    runtime = TransformersRuntime(tmp_path / "m")
    from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

    questions = []
    monkeypatch.setattr("builtins.input", questions.append)
    for text in ("def main():", "  two  spaces\n", "\u00e9\u2603"):
        assert runtime.encode(text) == SentencePieceTokenizer(tokenizer_model).encode(text)
    assert (
        runtime.name == f"transformers {transformers.__version__}" and runtime.context_length == 64
    )
    first = runtime.greedy([3, 4], 5)
    (tmp_path / "m" / "generation_config.json").write_text(f'{{"eos_token_id": {first[1]}}}')
    assert len(generate(load_model(tmp_path / "m"), [[3, 4]], max_new_tokens=5)[0]) == 2 + 2
    assert TransformersRuntime(tmp_path / "m").greedy([3, 4], 5) == first
    with pytest.raises(UserError, match="no tokenizer.json"):
        TransformersRuntime(folders(OWN)).encode("x")


def test_the_code_of_the_card_runs(tmp_path, tokenizer_model, monkeypatch, capsys):
    config = tiny("immediate", 2, vocab_size=600)
    options, questions = {"tokenizer_model": tokenizer_model}, []
    monkeypatch.setattr("builtins.input", questions.append)
    for form in ("expanded", "compact"):
        save_hf(tmp_path / form, config, random_params(config), form=form, **options)
        card = (tmp_path / form / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path / form)
        exec(compile(code, "README.md", "exec"), {})
        assert "Once upon a time" in capsys.readouterr().out and questions == []
