"""tokenizer.json against sentencepiece itself, in the tokenizers and transformers libraries."""

import argparse
import functools
import io
import json
import lzma
import random
import time
from pathlib import Path

import pytest
import sentencepiece

from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.huggingface_json import build_tokenizer_json, tokenizer_files
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
MAX_BUILD_SECONDS = 5.0  # for 32,000 pieces

# Python source: real English, runs of spaces, and in every installation.
SAMPLE = Path(argparse.__file__).read_text()

ADVERSARIAL = [
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "  both  sides  ",
    "a    b     c",
    "\n",
    "\n\n a\n  b\n",
    "\ttab\tand\r\nreturn",
    "emoji \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "control \x00\x01\x07\x1b\x7f\x85\u200b\ufeff",
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01 \u2168 \u6211\u7231\u4f60 \u0627\u0644\u0639",
    "supercalifragilistic" * 40,
    "0123456789 3.14159 1,000,000",
    "\u2581already\u2581marked\u2581\u2581",
    "<0x0A> <0x41> <unk",
    "a" * 1001,
]
CONTROL_LITERALS = ["<s>", "a </s> b", "<unk>"]  # the known exception


def train(lines=None, **options) -> bytes:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "vocab_size": 700,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or SAMPLE.splitlines()),
        model_writer=model,
        **settings | options,
    )
    return model.getvalue()


@functools.cache
def load_model(name: str) -> bytes:
    if name == "trained":
        return train()
    path = SHARED / "tokenizers" / f"{name}_tokenizer.model"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data/tokenizers")
    return path.read_bytes()


@functools.cache
def load_pair(name: str):
    """The same tokenizer in `tokenizers` and in `sentencepiece`."""
    tokenizers = pytest.importorskip("tokenizers")
    model = load_model(name)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(build_tokenizer_json(model)))
    return theirs, sentencepiece.SentencePieceProcessor(model_proto=model)


def assert_same_ids(name: str, texts) -> None:
    theirs, ours = load_pair(name)
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), repr(text)


def read_lines(name: str) -> list[str]:
    path = SHARED / "text" / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data/text")
    with lzma.open(path, "rt") as file:
        return [line for row in file for line in json.loads(row)["text"].split("\n")]


MODELS = pytest.mark.parametrize("name", ["trained", "llama2", "mistral_v1"])


@pytest.mark.parametrize("bos", [True, False])
def test_both_files_say_whether_bos_is_put_in_front(bos):
    files = tokenizer_files(SentencePieceTokenizer(load_model("trained")), 10, bos)
    described, config = (json.loads(files[f"tokenizer{x}.json"]) for x in ("", "_config"))
    assert (described["post_processor"] is not None) == config["add_bos_token"] == bos


@MODELS
def test_adversarial_texts_get_the_ids_of_sentencepiece(name):
    assert_same_ids(name, ADVERSARIAL)


@MODELS
def test_runs_of_every_length_get_the_ids_of_sentencepiece(name):
    assert_same_ids(name, [c * n for c in " \n-=*#a0." for n in range(1, 130)])


@MODELS
def test_random_texts_get_the_ids_of_sentencepiece(name):
    rng = random.Random(0)
    processor = load_pair(name)[1]
    pieces = [processor.id_to_piece(i) for i in range(259, processor.vocab_size())]
    pieces = [p.replace("\u2581", " ") for p in pieces] + [
        "\n",
        "\t",
        " ",
        "  ",
        "\u00e9",
        "\u6211",
    ]
    assert_same_ids(name, ["".join(rng.choices(pieces, k=rng.randrange(20))) for _ in range(4000)])
    points = [*range(1, 0x300), *range(0x2000, 0x2700), *range(0x1F600, 0x1F650)]
    texts = ["".join(map(chr, rng.choices(points, k=rng.randrange(30)))) for _ in range(2000)]
    assert_same_ids(name, texts)


@MODELS
def test_real_lines_get_the_ids_of_sentencepiece(name):
    lines = SAMPLE.splitlines()
    if name != "trained":
        lines += read_lines("c4_sample.jsonl.xz")[:5000]
        lines += read_lines("books_litbank.jsonl.xz")[:20000:4]
    assert_same_ids(name, lines)
    assert_same_ids(name, [SAMPLE[:20000]])


@MODELS
def test_decoding_gives_the_text_of_sentencepiece(name):
    theirs, ours = load_pair(name)
    for text in (*ADVERSARIAL, SAMPLE[:3000]):
        ids = ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)


@MODELS
@pytest.mark.parametrize("text", CONTROL_LITERALS)
def test_known_exception_a_literal_control_token_becomes_the_token(name, text):
    theirs, ours = load_pair(name)
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids != ours.encode(text)
    assert set(ids) & {0, 1, 2}


@pytest.mark.parametrize("name", ["trained", "mistral_v1"])
def test_transformers_loads_the_files_with_bos_and_special_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = SentencePieceTokenizer(load_model(name))
    for file, content in tokenizer_files(tokenizer, max_seq_len=2048).items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_pair(name)[1]
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.model_max_length == 2048
    for text in (*ADVERSARIAL, *SAMPLE.splitlines()[:500]):
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)], repr(text)
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), repr(text)
    decoded = theirs.decode(theirs("a  b\n c")["input_ids"], skip_special_tokens=True)
    assert decoded == "a  b\n c"


def test_pieces_of_one_character_may_be_user_defined():
    model = train(user_defined_symbols=["\n", "\u00a7"])
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(build_tokenizer_json(model)))
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("\n", "a\nb", "\n\n a \u00a7\u00a7b \n", *SAMPLE.split("\n\n")[:200]):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), repr(text)


def test_models_without_dummy_prefix_or_bos_are_reproduced():
    model = train(add_dummy_prefix=False, bos_id=-1)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(build_tokenizer_json(model)))
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (*ADVERSARIAL, *SAMPLE.splitlines()[:300]):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)


def test_runs_of_unknown_characters_are_one_token_without_byte_fallback():
    model = train(byte_fallback=False)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(build_tokenizer_json(model)))
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("\u6211\u7231\u4f60", "a \u6211\u7231 b", *ADVERSARIAL):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), repr(text)


def test_text_never_merges_into_a_byte_piece():
    whole = {"split_digits": False, "split_by_number": False, "split_by_unicode_script": False}
    model = train(lines=["x<0x41 <0x41 >"] * 200, vocab_size=271, **whole)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(build_tokenizer_json(model)))
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("<0x41>", "x<0x41>", "x<0x41><0x41>", "<0x41"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), repr(text)
        assert 3 + 0x41 not in ids  # the byte piece of that name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
        ({"user_defined_symbols": ["<|user|>"]}, "user-defined"),
        ({"treat_whitespace_as_suffix": True}, "behind words"),
    ],
)
def test_models_that_would_get_other_ids_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        build_tokenizer_json(train(**options))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
def test_other_files_are_refused(content):
    with pytest.raises(UserError, match="my.model"):
        build_tokenizer_json(content, "my.model")


def test_thirty_two_thousand_pieces_take_a_few_seconds():
    model = load_model("mistral_v1")
    start = time.perf_counter()
    build_tokenizer_json(model)
    assert time.perf_counter() - start < MAX_BUILD_SECONDS
