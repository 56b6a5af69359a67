"""BOS of folders of other people: what transformers puts around a text is what is read."""

import dataclasses
import itertools
import json
import logging

import pytest
from hf_folders import TINY, edit_config, make_params, train_small_tokenizer

from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.folder import read_hf, save_hf

BOS, EOS = 1, 2
NO_FILE = "no tokenizer.json"


def template(*names):
    """A post-processor of the marks and "A", the text."""
    ids = {"<s>": BOS, "</s>": EOS}
    pieces = [
        {"SpecialToken" if name in ids else "Sequence": {"id": name, "type_id": 0}}
        for name in names
    ]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]}
            for name, i in ids.items()
            if name in names
        },
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
PROCESSORS = {
    "none": None,
    "nothing": template("A"),
    "BOS": template("<s>", "A"),
    "BOS, EOS": template("<s>", "A", "</s>"),
    "EOS": template("A", "</s>"),
    "EOS in front": template("</s>", "A"),
    "sequence": {"type": "Sequence", "processors": [BYTES, template("<s>", "A")]},
    "sequence of two": {
        "type": "Sequence",
        "processors": [template("A", "</s>"), template("<s>", "A")],
    },
    "twice": {"type": "Sequence", "processors": [template("<s>", "A"), template("<s>", "A")]},
    "bert": {"type": "BertProcessing", "sep": ["</s>", EOS], "cls": ["<s>", BOS]},
    NO_FILE: None,
}


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def foreign(tmp_path, tokenizer_model):
    """A folder without our record in config.json."""
    config = dataclasses.replace(TINY, vocab_size=600)
    save_hf(tmp_path / "m", config, make_params(config), tokenizer_model=tokenizer_model)
    edit_config(tmp_path / "m", mobilellm=None)
    return tmp_path / "m"


def edit(file, **changes):
    """Changes keys; "absent" removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize("add_bos_token", ["absent", True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_bos_is_put_in_front_where_transformers_puts_it(name, add_bos_token, foreign, caplog):
    transformers = pytest.importorskip("transformers")
    edit(foreign / "tokenizer_config.json", add_bos_token=add_bos_token, add_eos_token="absent")
    if name == NO_FILE:
        (foreign / "tokenizer.json").unlink()
    else:
        edit(foreign / "tokenizer.json", post_processor=PROCESSORS[name])
    ids = transformers.AutoTokenizer.from_pretrained(foreign)("hi")["input_ids"]
    with caplog.at_level(logging.WARNING):
        model = read_hf(foreign)
    front = list(itertools.takewhile(lambda i: i in (BOS, EOS), ids))
    assert (model.bos_id is not None) == (front == [BOS])
    said = caplog.text
    assert ("behind a text" in said) == (ids[-1] == EOS)
    assert ("in front of a text, which are not" in said) == (front not in ([], [BOS]))
    assert ("has no add_bos_token" in said) == (name == NO_FILE and add_bos_token == "absent")


@pytest.mark.parametrize(
    "processor",
    [
        "BOS",
        {},
        {"type": "Other"},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
        {"type": "Sequence", "processors": 3},
        {"type": "BertProcessing", "sep": None, "cls": None},
    ],
)
def test_a_post_processor_that_is_none_is_refused(processor, foreign):
    edit(foreign / "tokenizer.json", post_processor=processor)
    with pytest.raises(UserError, match="tokenizer.json: post_processor is none"):
        read_hf(foreign)


def test_a_flag_that_is_neither_true_nor_false_is_refused(foreign):
    (foreign / "tokenizer.json").unlink()
    edit(foreign / "tokenizer_config.json", add_bos_token="no")
    with pytest.raises(UserError, match="tokenizer_config.json: add_bos_token = 'no'"):
        read_hf(foreign)
