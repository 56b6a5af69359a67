"""Ids of llama.cpp, from the vocabulary in a GGUF file, against sentencepiece itself."""

import logging
import random
from pathlib import Path

import pytest
import sentencepiece
from model_cases import bundle, tiny
from test_tokenizer_json import ADVERSARIAL, CONTROL_LITERALS, SAMPLE, load_model, read_lines, train

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.export import write_gguf
from mobilellm_jax.export.gguf.runtime import LlamaCppRuntime

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("llama_cpp", reason="the extra [gguf] is not installed")

NUM_REAL_LINES = 5000  # of each of two texts


def write(folder: Path, tokenizer_model: bytes) -> Path:
    """A file with the tokenizer and a model of no meaning."""
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).vocab_size()
    config, path = tiny(num_layers=1, vocab_size=vocab_size), folder / "model.gguf"
    model = bundle(config, tokenizer_model=tokenizer_model)
    write_gguf(path, model, weight_type="F32", name="small")
    return path


def load_pair(tokenizer_model: bytes, folder: Path):
    """The same tokenizer in llama.cpp and in `sentencepiece`."""
    theirs = LlamaCppRuntime(write(folder, tokenizer_model), 1)
    return theirs, sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)


def assert_same_ids(tokenizer_model: bytes, texts, folder: Path) -> None:
    theirs, ours = load_pair(tokenizer_model, folder)
    for text in texts:
        assert theirs.encode(text) == ours.encode(text), repr(text)


def random_texts(processor) -> list[str]:
    """Pieces, code points and bytes that are no UTF-8, in random order."""
    rng = random.Random(0)
    pieces = [processor.id_to_piece(i) for i in range(259, processor.vocab_size())]
    pieces = [piece.replace("\u2581", " ") for piece in pieces] + ["\n", "\t", " ", "  ", "\u6211"]
    points = [*range(0, 0x300), *range(0x2000, 0x2700), *range(0x1F600, 0x1F650)]
    return [
        *("".join(rng.choices(pieces, k=rng.randrange(20))) for _ in range(2000)),
        *("".join(map(chr, rng.choices(points, k=rng.randrange(30)))) for _ in range(1000)),
        *(rng.randbytes(rng.randrange(30)).decode(errors="replace") for _ in range(1000)),
    ]


MODELS = pytest.mark.parametrize("name", ["trained", "llama2", "mistral_v1"])


@MODELS
def test_adversarial_texts_get_the_ids_of_sentencepiece(name, tmp_path):
    runs = [c * n for c in " \n-=*#a0." for n in range(1, 70)]
    texts = [*ADVERSARIAL, *CONTROL_LITERALS, *runs, "\0", "word" * 5000, SAMPLE[:20000]]
    assert_same_ids(load_model(name), texts, tmp_path)


@MODELS
def test_random_texts_get_the_ids_of_sentencepiece(name, tmp_path):
    model = load_model(name)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert_same_ids(model, random_texts(processor), tmp_path)


@pytest.mark.slow
@MODELS
def test_real_lines_get_the_ids_of_sentencepiece(name, tmp_path):
    lines = read_lines("c4_sample.jsonl.xz")[:NUM_REAL_LINES]
    lines += read_lines("books_litbank.jsonl.xz")[: 4 * NUM_REAL_LINES : 4]
    assert_same_ids(load_model(name), [*SAMPLE.splitlines(), *lines], tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"bos_id": -1},
        {"eos_id": -1},
        {"pad_id": 3},
        {"user_defined_symbols": ["\n", "\u00a7"]},
        {"control_symbols": ["<|user|>", "<|end|>"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_tokenizers_get_the_ids_of_sentencepiece(options, tmp_path):
    texts = [*ADVERSARIAL, *CONTROL_LITERALS, "a\nb", "\n\n \u00a7\u00a7b", "<|user|> a<|end|>"]
    assert_same_ids(train(**options), texts, tmp_path)


def test_special_ids_are_those_of_the_tokenizer(tmp_path):
    def ids(**options):
        found = gguf.GGUFReader(write(tmp_path, train(**options))).fields
        names = ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token")
        values = (found.get(f"tokenizer.ggml.{name}") for name in names)
        return tuple(value and value.contents() for value in values)

    assert ids(pad_id=3) == (1, 2, 3, True)
    assert ids(bos_id=2, eos_id=1) == (2, 1, None, True)
    assert ids(bos_id=-1) == (None, 2, None, False)
    # llama.cpp stops at id 2 where none is named, here a byte: the unknown token is never said.
    assert ids(eos_id=-1) == (1, 0, None, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 500}, "not BPE"),
        ({"byte_fallback": False}, "no byte fallback"),  # llama.cpp ends the process
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
        ({"user_defined_symbols": ["<|user|>"]}, "user-defined"),
        ({"treat_whitespace_as_suffix": True}, "behind words"),
    ],
)
def test_tokenizers_that_would_get_other_ids_are_refused(options, reason, tmp_path):
    with pytest.raises(UserError, match=rf"tokenizer\.model: llama\.cpp .*{reason}"):
        write(tmp_path, train(**options))


@pytest.mark.parametrize(
    ("mark", "token", "line"),
    [("<s>", 1, "x s> s>"), ("<0x41>", 3 + 0x41, "x<0x41 <0x41 >")],
)
def test_known_exception_marks_that_pieces_can_be_joined_to(mark, token, line, tmp_path, caplog):
    """sentencepiece never makes BOS or a byte of characters, llama.cpp does: we warn of it."""
    whole = {"split_digits": False, "split_by_number": False, "split_by_unicode_script": False}
    model = train(lines=[line] * 200, vocab_size=271, hard_vocab_limit=False, **whole)
    with caplog.at_level(logging.WARNING, logger="absl"):
        theirs, ours = load_pair(model, tmp_path)
    assert [r.getMessage() for r in caplog.records if repr(mark) in r.getMessage()]
    assert token in theirs.encode(mark) and token not in ours.encode(mark)
    assert_same_ids(model, [line, mark[:-1], mark[1:], ADVERSARIAL[-1]], tmp_path)


@MODELS
def test_the_usual_tokenizers_have_no_exception(name, tmp_path, caplog):
    load_pair(load_model(name), tmp_path)
    assert not caplog.records


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    theirs, _ = load_pair(load_model("trained"), tmp_path)
    invalid = b"a\xff b".decode(errors="surrogateescape")
    with pytest.raises(UserError, match="cannot be encoded as UTF-8"):
        theirs.encode(invalid)
