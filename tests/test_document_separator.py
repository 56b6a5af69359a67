"""Several documents in a plain-text file, and warnings of separators that are read as text."""

import argparse
import gzip
import json
import random
import re

import pytest
from prepared import DOCUMENTS, run_prepare, stream, texts, write_lines

from mobilellm_jax.data import command, plain_text, sources
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

STORIES = "Once there was a fox.\n<|endoftext|>\nTom had a red ball.\n<|endoftext|>\nIt was late.\n"
MARK = "<|endoftext|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*DOCUMENTS, STORIES], 330, path)
    return path


def test_a_separator_that_no_text_can_hold_is_refused(tmp_path, model):
    (tmp_path / "a.txt").write_text(STORIES)
    separator = command._unescaped(r"\ud83d")
    with pytest.raises(UserError, match=r"--document_separator '\\ud83d'"):
        run_prepare(
            [tmp_path / "a.txt"], tmp_path / "o", tokenizer=model, document_separator=separator
        )


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_separator_in_a_line_of_its_own_ends_documents(tmp_path, model, name, caplog):
    data = STORIES.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    inputs, out = [tmp_path / name], tmp_path / "out"
    header = run_prepare(inputs, out, tokenizer=model, document_separator=MARK)
    expected = ["Once there was a fox.", "Tom had a red ball.", "It was late."]
    assert texts(out) == expected
    assert (stream(out).count(1), stream(out).count(2)) == (3, 3)
    split = header.splits["train"]
    assert (split.num_documents, split.num_bytes) == (3, sum(map(len, expected)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a<|x|>b <|x|> c", "<|x|>", ["a", "b ", " c"]),
        ("a\n\nb\nc\n\n\n\nd\n", "\n\n", ["a", "b\nc", "d"]),
        ("a\r\n\r\nb\r\nc\r\n\r\nd\r\n", "\n\n", ["a", "b\r\nc", "d"]),
        ("\ufeff\n\na\n\nb", "\n\n", ["", "a", "b"]),  # what a byte order mark leaves is dropped
        ("one\ntwo\r\n\nthree", "\n", ["one", "two", "three"]),
        ("one\0two\0", "\0", ["one", "two"]),
        ("ééßéé\n", "ß", ["éé", "éé"]),
        ("  indented\n===\n \n===\nlast", "===", ["  indented", "last"]),
    ],
)
def test_a_separator_may_stand_anywhere_and_line_ends_beside_it_go(
    tmp_path, text, separator, expected
):
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(sources.iter_documents([tmp_path / "a.txt"], separator=separator))
    assert [document.text for document in found] == expected
    assert all(document.first and document.last for document in found)


@pytest.mark.parametrize("separator", [MARK, "\n\n", "\n", " ab", "aa", "\n-\n"])
def test_documents_in_blocks_are_those_of_the_whole_text(monkeypatch, separator):
    """However the bytes come, and where blocks, characters and separators are cut."""
    rng, num_blocks = random.Random(separator), 0
    words = ["a", "b", "é", " ", "\n", "-", "\r\n", MARK, separator, "<|end"]
    for _ in range(200):
        monkeypatch.setattr(plain_text, "BLOCK_BYTES", rng.choice([5, 9, 30]))
        text = "".join(rng.choices(words, k=80))
        data = text.encode()
        cuts = sorted(rng.choices(range(len(data)), k=rng.randrange(9)))
        chunks = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        found = []
        for block in plain_text.separated_documents("a.txt", chunks, separator):
            found += [""] * block.first
            found[-1] += block.text
            num_blocks += 1
        mark = "\r?\n".join(map(re.escape, separator.split("\n")))
        expected = [part.strip("\r\n") for part in re.split(mark, text)]
        assert list(filter(str.strip, found)) == list(filter(str.strip, expected))
    assert num_blocks > 2000


def test_the_line_of_a_document_is_where_its_text_begins(tmp_path):
    (tmp_path / "a.txt").write_text(STORIES.replace("Tom", "\n\nTom\n"))
    found = sources.iter_documents([tmp_path / "a.txt"], separator=MARK)
    assert [document.line for document in found] == [1, 5, 8]


def test_bad_bytes_are_named_with_their_place_in_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(STORIES.encode().replace(b"red", b"r\xffd"))
    with pytest.raises(UserError, match=r"a.txt: byte 0xff at byte 47 is not valid"):
        list(sources.iter_documents([tmp_path / "a.txt"], separator=MARK))


def test_documents_of_a_text_are_held_out_by_their_content(tmp_path, model):
    (tmp_path / "a.txt").write_text(f"\n{MARK}\n".join(DOCUMENTS))
    path = write_lines(tmp_path / "a.jsonl")
    by_text = tmp_path / "text"
    settings = {"tokenizer": model, "valid_fraction": 0.3}
    run_prepare([tmp_path / "a.txt"], by_text, document_separator=MARK, **settings)
    run_prepare([path], tmp_path / "lines", **settings)
    for split in ("train", "valid"):
        assert texts(by_text, split) == texts(tmp_path / "lines", split)


def test_a_trained_tokenizer_does_not_see_the_separator(tmp_path):
    (tmp_path / "a.txt").write_text(f"\n{MARK}\n".join(DOCUMENTS))
    path = write_lines(tmp_path / "a.jsonl")
    by_text, by_line = (
        run_prepare([item], tmp_path / f"out{number}", vocab_size=300, document_separator=mark)
        for number, (item, mark) in enumerate([(tmp_path / "a.txt", MARK), (path, None)])
    )
    assert by_text.tokenizer_sha256 == by_line.tokenizer_sha256


def test_escapes_in_the_flag_are_those_of_python():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for typed, meant in [
        (r"\n\n", "\n\n"),
        (r"a\tb\x0c\u2029", "a\tb\x0c\u2029"),
        (r"\\n", r"\n"),
        ("é\\d", "é\\d"),
        (MARK, MARK),
    ]:
        args = parser.parse_args(["--output", "o", "--document_separator", typed])
        assert args.document_separator == meant


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_separator_that_is_read_as_text_is_warned_of_and_stays_text(
    tmp_path, model, caplog, name
):
    text = f"He wrote </s> and {MARK} too, and {MARK}."
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    run_prepare([tmp_path / name], tmp_path / "out", tokenizer=model)
    assert texts(tmp_path / "out") == [text] and stream(tmp_path / "out").count(2) == 1
    assert f"{MARK} (2, first: {tmp_path / name}, line 1)" in caplog.text
    assert "</s> (1, first" in caplog.text and f"--document_separator '{MARK}'" in caplog.text


def test_a_separator_that_is_nowhere_is_warned_of(tmp_path, model, caplog):
    (tmp_path / "a.txt").write_text(STORIES)
    run_prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model, document_separator="===")
    assert "'===' is nowhere in the plain-text inputs" in caplog.text


def test_another_separator_is_another_dataset(tmp_path, model):
    (tmp_path / "a.txt").write_text(STORIES)
    arguments = {"inputs": [tmp_path / "a.txt"], "output": tmp_path / "out", "tokenizer": model}
    header = run_prepare(**arguments)
    with pytest.raises(UserError, match="made with document_separator None, now asked for '---'"):
        run_prepare(**arguments, document_separator="---")
    # As the datasets of earlier commits are, which do not have the setting.
    del header.settings["document_separator"]
    header.save(tmp_path / "out")
    assert run_prepare(**arguments) == DatasetHeader.load(tmp_path / "out")
    with pytest.raises(UserError, match="document_separator None, now asked for '---'"):
        run_prepare(**arguments, document_separator="---")


def test_an_empty_separator_is_refused(tmp_path, model):
    (tmp_path / "a.txt").write_text(STORIES)
    with pytest.raises(UserError, match="--document_separator is empty"):
        run_prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=model, document_separator="")
