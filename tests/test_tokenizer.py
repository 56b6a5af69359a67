"""The tokenizer: round trips, LLaMA's conventions, and errors that can be acted on."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from mobilellm_jax.tokenizers.tokenizer import text_bytes

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
CODE = "def f(x):\n    if x:\n        return x  # comment\n\n\n\treturn 12345\n"
PROSE = "The quick brown fox jumps over the lazy dog. It was a bright cold day in April.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([PROSE * 3 + CODE * 3], 330, path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "  two  spaces ",
        CODE,
        "\n\n    x",
        "tab\tnul\0cr\r\n",
        "é漢字😀\u200d",
        "\ufeff",
    ],
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_the_bytes_of_a_text_do_not_depend_on_where_its_ids_are_cut(tokenizer):
    texts = ["é漢字😀", "the  fox\n", "", " 12 ", CODE]
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    ids = np.array(sum(rows, []))
    expected = len("".join(texts).encode())
    assert any("\ufffd" in tokenizer.decode(ids[:cut]) for cut in range(len(ids)))
    for cut in range(len(ids) + 1):
        parts = [text_bytes(tokenizer, part, part == 1) for part in (ids[:cut], ids[cut:])]
        if cut and ids[cut - 1] == 1:  # the second part cannot know that it begins a text
            parts[1][:1] = tokenizer.first_bytes[ids[cut]]
        assert sum(part.sum() for part in parts) == expected, cut
    assert np.flatnonzero(tokenizer.token_bytes == 0).tolist() == [1, 2]  # BOS and EOS


def test_control_pieces_have_no_bytes_and_all_others_have_some():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROSE] * 3),
        model_writer=model,
        vocab_size=39,
        control_symbols=["<pause>"],
        user_defined_symbols=["<b>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pause>": 3, "<b>": 4}
    sizes = {piece: tokenizer.token_bytes[i] for piece, i in ids.items()}
    assert sizes == {"<unk>": len(" \u2047 ".encode()), "<s>": 0, "</s>": 0, "<pause>": 0, "<b>": 3}
    assert (tokenizer.token_bytes[4:] > 0).all()


def test_without_bos_a_text_begins_where_one_is_told(tokenizer):
    ids = np.array(tokenizer.encode("the fox") + tokenizer.encode("dog"))
    begins = np.zeros(len(ids), bool)
    begins[[0, len(tokenizer.encode("the fox"))]] = True
    assert text_bytes(tokenizer, ids, begins).sum() == len("the foxdog")


def test_a_newline_and_a_run_of_spaces_are_single_pieces_and_digits_are_split(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    pieces = processor.encode("a\n    12", out_type=str)
    assert pieces[-4:] == ["<0x0A>", "▁▁▁▁", "1", "2"]


def test_ids_are_those_of_plain_sentencepiece_with_llamas_special_ids(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert tokenizer.encode(CODE) == processor.encode(CODE)
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *processor.encode("a"), 2]
    assert (processor.unk_id(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        0,
        1,
        2,
        None,
    )
    assert tokenizer.vocab_size == 330


def test_blocks_cut_at_line_ends_encode_as_the_whole_text(tokenizer):
    text = (PROSE + CODE) * 3
    lines = text.splitlines(keepends=True)
    for cut in range(1, len(lines)):
        head, tail = "".join(lines[:cut]), "".join(lines[cut:])
        assert tokenizer.encode(head) + tokenizer.encode_continuation(tail) == tokenizer.encode(
            text
        )


def test_training_is_deterministic_and_the_file_loads_again(tokenizer, tmp_path):
    again = train_tokenizer([PROSE * 3 + CODE * 3], 330, tmp_path / "t.model")
    assert again.sha256 == tokenizer.sha256
    assert SentencePieceTokenizer.load(tmp_path / "t.model").sha256 == tokenizer.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["t.model"]


def test_training_reads_no_more_than_the_sample(tmp_path):
    def documents():
        yield PROSE * 100
        yield PROSE * 100
        raise AssertionError("read past the sample")

    train_tokenizer(documents(), 300, tmp_path / "t.model", max_sample_bytes=len(PROSE) * 150)


def test_long_lines_are_not_dropped_from_the_sample(tmp_path):
    long_line = "zebra quagga " * 2000
    tokenizer = train_tokenizer([long_line], 275, tmp_path / "t.model")
    assert len(tokenizer.encode("zebra quagga")) <= 6


def test_long_lines_of_wide_characters_are_not_dropped_from_the_sample(tmp_path):
    tokenizer = train_tokenizer(["😀🐈 " * 2000], 264, tmp_path / "t.model")
    assert len(tokenizer.encode("😀🐈")) <= 3  # their bytes would be 8


@pytest.mark.parametrize("mark", ["\u2585", "\u2581\u2582\u2583\u2585\u2587 "])
def test_lines_with_the_reserved_sign_train_as_without_it(tmp_path, mark):
    marked = "\n".join(mark + line for line in CODE.split("\n"))
    with_sign, without = (
        train_tokenizer([text], 300, tmp_path / "t.model")
        for text in (marked, marked.replace("\u2585", ""))
    )
    assert with_sign.sha256 == without.sha256
    assert len(with_sign.encode("return")) <= 4  # of its six letters and the space before
    # U+2581 is SentencePiece's own sign for a space.
    assert with_sign.decode(with_sign.encode(marked)) == marked.replace("\u2581", " ")


def test_no_character_makes_sentencepiece_drop_its_line(tmp_path):
    """Of the characters that have a meaning to SentencePiece or to other programs."""
    controls, others = (
        "\0\t\r\v\f\x1a\x1c\x85\xa0\xad",
        "\u2028\u2029\u200b\u2047\u2581\ufdd0\ufeff\ufffd\uffff",
    )
    for sign in controls + others:
        lines = [PROSE * 3, *[f"zebraquagga{sign}zebraquagga"] * 50]
        tokenizer = train_tokenizer(["\n".join(lines)], 310, tmp_path / "t.model")
        assert len(tokenizer.encode("zebraquagga")) <= 3, hex(ord(sign))


@pytest.mark.parametrize(
    "error", [UserError("a.jsonl, line 2"), OSError(28, "full"), RuntimeError("x"), SystemExit(143)]
)
def test_an_error_of_the_text_is_not_blamed_on_the_vocabulary(tmp_path, error):
    def documents():
        yield PROSE
        raise error

    with pytest.raises(type(error)) as raised:
        train_tokenizer(documents(), 300, tmp_path / "t.model")
    assert raised.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([PROSE], 100_000, "too large for this text; the largest possible value is [0-9]+"),
        ([PROSE], 270, "too small.*already need [0-9]+"),
        ([], 300, "no text"),
        (["", "\n\n"], 300, "no text"),
    ],
)
def test_an_impossible_vocabulary_is_explained(tmp_path, documents, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(documents, vocab_size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_the_value_that_the_error_names_works(tmp_path):
    with pytest.raises(UserError) as error:
        train_tokenizer([PROSE * 5], 100_000, tmp_path / "t.model")
    largest = int(str(error.value).split("value is ")[1].split()[0])
    assert train_tokenizer([PROSE * 5], largest, tmp_path / "t.model").vocab_size == largest


@pytest.mark.parametrize("content", [None, b"", b"<html>not a model</html>", b"\x00" * 100])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="some.model.*--vocab_size"):
        SentencePieceTokenizer.load(path)


def test_a_device_is_no_tokenizer():
    with pytest.raises(UserError, match="/dev/zero: is a device"):
        SentencePieceTokenizer.load("/dev/zero")


@pytest.mark.parametrize("ids", [[-1], [330]])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer, ids):
    with pytest.raises(UserError, match="outside of this tokenizer's"):
        tokenizer.decode(ids)


def test_the_llama_tokenizer_has_its_known_ids():
    path = SHARED / "tokenizers" / "llama2_tokenizer.model"
    if not path.exists():
        pytest.skip("the LLaMA tokenizer is not at ../shared")
    llama = SentencePieceTokenizer.load(path)
    assert (llama.vocab_size, llama.bos_id, llama.eos_id, llama.pad_id) == (32000, 1, 2, None)
    assert llama.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert llama.decode(llama.encode(CODE)) == CODE
