"""What stands beside the weights in a Hugging Face folder: files, chat template, model card."""

import json

import pytest
from hf_folders import train_small_tokenizer
from model_cases import random_params, tiny

from mobilellm_jax.huggingface.folder import read_hf, save_hf
from mobilellm_jax.model.costs import count_params

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> bytes:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_the_folder_has_these_files(tmp_path, tokenizer_model):
    config = tiny("immediate", 2, vocab_size=600)
    options = {"tokenizer_model": tokenizer_model, "chat_template": TEMPLATE}
    common = {"README.md", "SHA256SUMS", "chat_template.jinja", "config.json", "tokenizer.json"}
    common |= {"generation_config.json", "model.safetensors", "tokenizer.model"}
    common |= {"tokenizer_config.json"}
    for form, code in (("expanded", set()), ("compact", {"model.py", "modeling_mobilellm.py"})):
        save_hf(tmp_path / form, config, random_params(config), form=form, **options)
        assert {f.name for f in (tmp_path / form).iterdir()} == common | code


def test_a_chat_template_is_applied_by_transformers_and_comes_back(tmp_path, tokenizer_model):
    transformers = pytest.importorskip("transformers")
    config = tiny(vocab_size=600)
    options = {"tokenizer_model": tokenizer_model, "chat_template": TEMPLATE}
    known = {"step": 7, "by": "us"}
    save_hf(tmp_path / "m", config, random_params(config), provenance=known, **options)
    record = known | {"chat_template": TEMPLATE}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for file in ("chat_template.jinja", None):  # then from tokenizer_config.json alone
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == "[user] Hi\n[assistant] Ho\n"
        assert read_hf(tmp_path / "m").to_record() == record
        if file:
            (tmp_path / "m" / file).unlink()
            (tmp_path / "m" / "SHA256SUMS").unlink()
    save_hf(tmp_path / "plain", config, random_params(config), tokenizer_model=tokenizer_model)
    assert read_hf(tmp_path / "plain").to_record() == {}
    # A folder of others whose tokenizer we cannot read, so that only the template comes along.
    save_hf(tmp_path / "x", config, random_params(config), chat_template=TEMPLATE)
    assert read_hf(tmp_path / "x").prompt.chat_template == TEMPLATE


def test_a_tokenizer_that_puts_no_bos_in_front_is_believed(tmp_path, tokenizer_model):
    config = tiny(vocab_size=600)
    save_hf(tmp_path, config, random_params(config), tokenizer_model=tokenizer_model)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    (tmp_path / "SHA256SUMS").unlink()
    assert read_hf(tmp_path).to_record() == {"bos": False}
    # But not against the record of the training.
    config_file = tmp_path / "config.json"
    values = json.loads(config_file.read_text())
    values["mobilellm"]["provenance"] = {"bos": True}
    config_file.write_text(json.dumps(values))
    assert read_hf(tmp_path).to_record() == {"bos": True}


def card_of(folder) -> str:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and text.count("\n---\n") == 1
    return text


def test_the_card_says_what_is_special_about_the_model(tmp_path, tokenizer_model):
    config = tiny("immediate", 2, "first_visit", vocab_size=600)
    options = {"form": "compact", "tokenizer_model": tokenizer_model}
    provenance = {"step": 120, "bos": True}
    save_hf(tmp_path / "m", config, random_params(config), provenance=provenance, **options)
    card = card_of(tmp_path / "m")
    for expected in (
        f"{count_params(config):,}",
        "each block 2 times in a row; later visits attend to the keys and values of the first",
        "64 tokens",
        "120 steps",
        "In training, documents began with BOS.",
        "num_bos=1",
        "trust_remote_code=True",
    ):
        assert expected in card
    save_hf(tmp_path / "n", config, random_params(config), provenance={"bos": False}, **options)
    assert "num_bos" not in card_of(tmp_path / "n")
    assert "the tokenizer of this folder adds none" in card_of(tmp_path / "n")
    save_hf(tmp_path / "plain", tiny(), random_params(tiny()))
    card = card_of(tmp_path / "plain")
    assert "BOS" not in card and "trust_remote_code" not in card and "AutoTokenizer" not in card
