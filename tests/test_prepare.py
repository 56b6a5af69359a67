"""Prepare: any number of workers, splits, the folder that is whole or not there, being killed."""

import argparse
import bz2
import itertools
import json
import lzma
import sys
import types
from pathlib import Path

import pytest
import sentencepiece
from prepared import DOCUMENTS, files_in, make_documents, run_prepare, stream, texts, write_lines

from mobilellm_jax.data import command, prepare, rows, sources
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(DOCUMENTS, 310, path)
    return path


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos"), list(itertools.product([True, False], repeat=2)))
def test_the_records_hold_exactly_the_tokens_of_all_documents(tmp_path, model, bos, eos):
    path = write_lines(tmp_path / "a.jsonl")
    header = run_prepare([path], tmp_path / "out", tokenizer=model, bos=bos, eos=eos)
    tokenizer = SentencePieceTokenizer.load(model)
    expected = [i for text in DOCUMENTS for i in tokenizer.encode(text, bos=bos, eos=eos)]
    assert stream(tmp_path / "out") == expected
    split = header.splits["train"]
    assert split.num_tokens == len(expected) - 1
    assert split.num_documents == len(DOCUMENTS)
    assert split.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_document_starts_are_where_the_bos_tokens_are(tmp_path, model):
    write_lines(tmp_path / "a.jsonl")
    run_prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model)
    source = open_split(tmp_path / "out", "train")
    for index in range(len(source)):
        record = source.record(index)
        assert record.starts.tolist() == [i for i, token in enumerate(record.tokens) if token == 1]


def test_one_and_two_workers_write_the_same_bytes(tmp_path, model, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.data.encoding.BLOCK_BYTES", 2000)  # many small batches
    monkeypatch.setattr("mobilellm_jax.data.prepare.BLOCK_BYTES", 2000)
    monkeypatch.setattr("mobilellm_jax.data.rows.BLOCK_BYTES", 500)  # documents in blocks
    monkeypatch.setattr("mobilellm_jax.data.plain_text.BLOCK_BYTES", 500)
    write_lines(tmp_path / "a.jsonl", make_documents(300))
    (tmp_path / "b.txt").write_text("\n".join(make_documents(50, seed=1)))
    results = []
    for num_workers in (1, 2):
        folder = tmp_path / str(num_workers)
        inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
        run_prepare(inputs, folder, tokenizer=model, num_workers=num_workers, valid_fraction=0.1)
        results.append(files_in(folder))
    assert results[0] == results[1]


def test_blocks_of_a_long_text_share_one_bos_and_one_eos(tmp_path, model, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.data.rows.BLOCK_BYTES", 700)
    monkeypatch.setattr("mobilellm_jax.data.plain_text.BLOCK_BYTES", 700)
    text = "\n".join(make_documents(80)) + "\n" + "no line end " * 200 + "漢" * 2000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    blocks = list(sources.iter_documents([tmp_path / "a.txt"]))
    assert len(blocks) > 20 and "".join(block.text for block in blocks) == text
    for name in ("a.txt", "a.jsonl"):
        header = run_prepare([tmp_path / name], tmp_path / f"{name}.out", tokenizer=model)
        tokens = stream(tmp_path / f"{name}.out")
        assert (tokens.count(1), tokens.count(2)) == (1, 1)
        assert header.splits["train"].num_documents == 1
        assert SentencePieceTokenizer.load(model).decode(tokens) == text


def test_a_tokenizer_is_trained_where_none_is_given(tmp_path):
    write_lines(tmp_path / "a.jsonl")
    header = run_prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300)
    assert header.vocab_size == 300
    assert texts(tmp_path / "out") == DOCUMENTS


# Official lines of token ids ----------------------------------------------------------------------


def _write_ids(path, *lines):
    path.write_text("".join(json.dumps({"token_ids": line}) + "\n" for line in lines))
    return path


def test_a_line_of_token_ids_is_one_record(tmp_path, model):
    lines = [[1, 5, 6, 2, 1, 8, 9, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
    _write_ids(tmp_path / "a.jsonl", *lines)
    header = run_prepare(
        [tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model, sequence_length=8
    )
    source = open_split(tmp_path / "out", "train")
    records = [source.record(i) for i in range(len(source))]
    assert [r.tokens[: r.num_valid].tolist() for r in records] == lines
    assert [r.starts.tolist() for r in records] == [[0, 4], [0]]
    assert header.splits["train"].num_tokens == 7 + 8
    assert header.splits["train"].num_bytes == 5 + 9  # each id but BOS and EOS is of one byte


def test_bytes_of_token_ids_are_those_of_the_text_wherever_a_line_was_cut(tmp_path, model):
    text = "the cat 😀漢é and a dog"
    ids = SentencePieceTokenizer.load(model).encode(text, bos=True)
    for cut in range(2, len(ids) - 1):
        lines = [part + [2] * (len(ids) - len(part)) for part in (ids[:cut], ids[cut:])]
        _write_ids(tmp_path / "a.jsonl", *lines)
        header = run_prepare(
            [tmp_path / "a.jsonl"],
            tmp_path / f"out{cut}",
            tokenizer=model,
            sequence_length=len(ids) - 1,
        )
        assert header.splits["train"].num_bytes == len(text.encode()), cut


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([5] * 10, "a.jsonl, line 2: 10 token_ids.*is 8; pass --sequence_length 10"),
        ([5] * 7 + [310], r"a.jsonl, line 2: token_ids\[7\] is 310, outside of.*310"),
        ([5] * 7 + [-1], r"line 2: token_ids\[7\] is -1"),
        ([5] * 7 + [1.5], r"line 2: token_ids\[7\] is 1.5"),
        ([5] * 7 + [True], r"line 2: token_ids\[7\] is True"),
        ([], r"line 2: token_ids is \[\]"),
        ("5 5", "line 2: token_ids is '5 5'"),
    ],
)
def test_a_bad_line_of_token_ids_is_named(tmp_path, model, line, message):
    _write_ids(tmp_path / "a.jsonl", [5] * 8, line)
    with pytest.raises(UserError, match=message):
        run_prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model, sequence_length=8)


def test_a_hugging_face_dataset_is_streamed_by_its_name(monkeypatch, tmp_path, model):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return ({"text": text} for text in DOCUMENTS)

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    run_prepare(
        ["hf:owner/stories"],
        tmp_path / "out",
        valid_inputs=["hf:owner/stories:en:validation"],
        tokenizer=model,
    )
    assert asked == [
        ("owner/stories", None, "train", True),
        ("owner/stories", "en", "validation", True),
    ]
    assert stream(tmp_path / "out") == stream(tmp_path / "out", "valid")


# Splits -------------------------------------------------------------------------------------------


def test_a_split_field_decides(tmp_path, model):
    names = itertools.cycle(["train", "Validation", "dev", "train"])
    lines = [json.dumps({"text": text, "part": next(names)}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    header = run_prepare(
        [tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model, split_field="part"
    )
    assert {name: split.num_documents for name, split in header.splits.items()} == {
        "train": 30,
        "valid": 30,
    }


def test_a_fraction_holds_out_documents_by_content(tmp_path, model):
    texts = make_documents(400)
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl", texts[::-1])
    streams = []
    for name in ("a", "b"):
        header = run_prepare(
            [tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer=model, valid_fraction=0.2
        )
        assert 50 < header.splits["valid"].num_documents < 110
        streams.append(sorted(stream(tmp_path / name, "valid")))
    assert streams[0] == streams[1]


def test_the_blocks_of_a_long_document_all_go_to_one_split(tmp_path, model, monkeypatch):
    """Else a part of a text that is trained on would be in the validation data."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 100)
    longs = ["\n".join(make_documents(20, seed)) for seed in range(12)]
    path = write_lines(tmp_path / "a.jsonl", longs)
    assert len(list(sources.iter_documents([path]))) > 100
    run_prepare([path], tmp_path / "out", tokenizer=model, valid_fraction=0.5)
    train, valid = (texts(tmp_path / "out", split) for split in ("train", "valid"))
    assert train and valid and sorted(train + valid) == sorted(longs)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.bz2"])
def test_a_fraction_of_a_single_text_is_its_end(tmp_path, model, name):
    text = "\n".join(make_documents(200))
    data = bz2.compress(text.encode()) if name.endswith("bz2") else text.encode()
    (tmp_path / name).write_bytes(data)
    header = run_prepare([tmp_path / name], tmp_path / "out", tokenizer=model, valid_fraction=0.1)
    tokenizer = SentencePieceTokenizer.load(model)
    head, tail = (tokenizer.decode(stream(tmp_path / "out", s)) for s in ("train", "valid"))
    assert head + tail == text and head.endswith("\n")
    size = len(text.encode())
    assert 0.09 * size < len(tail.encode()) <= 0.1 * size + 1
    assert [split.num_documents for split in header.splits.values()] == [1, 1]


def test_a_cut_at_the_end_of_a_block_begins_a_document(tmp_path, model, monkeypatch):
    """Where a block has no further line end, as in text8, which is one line."""
    monkeypatch.setattr("mobilellm_jax.data.plain_text.BLOCK_BYTES", 1000)
    text = "the cat and the dog " * 400
    path = tmp_path / "a.txt"
    path.write_text(text)
    header = run_prepare([path], tmp_path / "out", tokenizer=model, valid_fraction=0.3)
    tokenizer = SentencePieceTokenizer.load(model)
    streams = [stream(tmp_path / "out", split) for split in ("train", "valid")]
    assert "".join(map(tokenizer.decode, streams)) == text
    for tokens, split in zip(streams, header.splits.values(), strict=True):
        assert tokens[0] == tokenizer.bos_id and tokens.count(tokenizer.bos_id) == 1
        assert split.num_documents == 1
    source = open_split(tmp_path / "out", "valid")
    assert source.record(0).starts.tolist() == [0]


def test_all_blocks_of_a_document_are_held_out_or_none(tmp_path, model, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 50)
    path = write_lines(tmp_path / "a.jsonl")
    run_prepare([path], tmp_path / "out", tokenizer=model, valid_fraction=0.5)
    train, valid = (texts(tmp_path / "out", split) for split in ("train", "valid"))
    assert min(len(train), len(valid)) > 10
    assert sorted(train + valid) == sorted(DOCUMENTS)


def test_what_is_held_out_does_not_train_the_tokenizer(tmp_path):
    write_lines(tmp_path / "train.jsonl", split="train")
    write_lines(tmp_path / "valid.jsonl", ["zebra quagga okapi " * 20] * 9, split="valid")
    both = [(tmp_path / f"{name}.jsonl").read_text() for name in ("train", "valid")]
    (tmp_path / "both.jsonl").write_text("".join(both))
    alone, by_file, by_line = (
        run_prepare(
            [tmp_path / name],
            tmp_path / f"{name}.out{number}",
            valid_inputs=[tmp_path / valid for valid in held_out],
            split_field=field,
            vocab_size=300,
        )
        for number, (name, held_out, field) in enumerate(
            [
                ("train.jsonl", [], None),
                ("train.jsonl", ["valid.jsonl"], None),
                ("both.jsonl", [], "split"),
            ]
        )
    )
    assert list(by_file.splits) == list(by_line.splits) == ["train", "valid"]
    assert by_file.tokenizer_sha256 == by_line.tokenizer_sha256 == alone.tokenizer_sha256


def test_the_sample_for_the_tokenizer_has_of_each_input_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SAMPLE_BYTES", 8000)
    for letter, count in (("a", 300), ("b", 100)):
        write_lines(tmp_path / f"{letter}.jsonl", [letter * 100] * count)
    settings = types.SimpleNamespace(
        field="text", split_field=None, document_separator=None, skip_bad=0
    )
    sample = list(prepare._training_sample(sources.find_sources([tmp_path]), settings))
    assert sample == ["a" * 100] * 60 + ["b" * 100] * 20


def test_named_files_are_held_out(tmp_path, model):
    write_lines(tmp_path / "a.jsonl", DOCUMENTS[:40])
    write_lines(tmp_path / "b.jsonl", DOCUMENTS[40:])
    header = run_prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "out",
        valid_inputs=[tmp_path / "b.jsonl"],
        tokenizer=model,
    )
    assert [split.num_documents for split in header.splits.values()] == [40, 20]


# Bad settings -------------------------------------------------------------------------------------


def test_inputs_without_text_and_bad_files_leave_no_folder(tmp_path, model):
    for content, message in [('{"text": ""}\n', "holds no text"), ('{"text": "a"}\n{', "line 2")]:
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            run_prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either --tokenizer FILE or --vocab_size"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model: cannot read"),
        ({"vocab_size": 100_000}, "too large for this text"),
        (
            {"vocab_size": 300, "sequence_length": 1},
            "--sequence_length 1 is not possible.* from 2 to",
        ),
        ({"vocab_size": 300, "sequence_length": 10**20}, "10{20} is not possible.* to 1,048,576"),
        ({"vocab_size": 300, "sequence_length": -5}, "--sequence_length -5 is not possible"),
        ({"vocab_size": 0}, "--vocab_size 0 is not possible; use a number from 260 to 1,048,576"),
        ({"vocab_size": -1}, "--vocab_size -1 is not possible"),
        ({"vocab_size": 10**20}, "--vocab_size 10{20} is not possible"),
        ({"vocab_size": 300, "valid_fraction": float("nan")}, "--valid_fraction nan must be"),
        ({"vocab_size": 300, "valid_fraction": float("inf")}, "--valid_fraction inf must be"),
        ({"vocab_size": 300, "valid_fraction": -0.1}, "--valid_fraction -0.1 must be"),
        ({"vocab_size": 300, "records_per_shard": 0}, "--records_per_shard 0 is not possible"),
        ({"vocab_size": 300, "skip_bad": -1}, "--skip_bad -1 is not possible"),
        ({"vocab_size": 300, "num_workers": 10**20}, "--workers 10{20} is not possible.* 1,024"),
        ({"vocab_size": 300, "valid_fraction": 1.0}, "less than 1"),
        ({"vocab_size": 300, "valid_fraction": 0.1, "split_field": "s"}, "only one of"),
        ({"vocab_size": 300, "valid_fraction": 1e-9}, "held out no text"),
        ({"vocab_size": 300, "valid_fraction": 0.999999}, "left no text to train on"),
        ({"vocab_size": 300, "split_field": "s"}, "line 1: split field 's' is 'x'"),
        ({"vocab_size": 300, "split_field": "t"}, "line 1: split field 't' is None"),
        ({"vocab_size": 300, "num_workers": 0}, "--workers 0 is not possible; use a number from 1"),
    ],
)
def test_bad_settings_are_explained(tmp_path, settings, message):
    write_lines(tmp_path / "a.jsonl", s="x")
    with pytest.raises(UserError, match=message):
        run_prepare([tmp_path / "a.jsonl"], tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_tokenizer_is_given_or_trained_but_not_both(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="either --tokenizer FILE or --vocab_size"):
        run_prepare([path], tmp_path / "out", tokenizer=model, vocab_size=300)


def test_numbers_that_cannot_be_are_refused_before_any_input_is_read(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("read an input")

    monkeypatch.setattr(sources.Source, "documents", fail)
    path = write_lines(tmp_path / "a.jsonl")
    for settings in ({"num_workers": 0}, {"sequence_length": 10**20}, {"vocab_size": 0}):
        with pytest.raises(UserError, match="is not possible"):
            run_prepare([path], tmp_path / "out", **{"vocab_size": 300} | settings)


@pytest.mark.parametrize("mark", ["bos", "eos"])
def test_a_tokenizer_without_a_mark_is_refused_where_the_mark_is_asked_for(tmp_path, mark):
    path, without = write_lines(tmp_path / "a.jsonl"), tmp_path / "without.model"
    with open(without, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS),
            model_writer=file,
            vocab_size=310,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **{f"{mark}_id": -1},
        )
    with pytest.raises(UserError, match=f"no {mark.upper()}; pass --no-{mark}"):
        run_prepare([path], tmp_path / "out", tokenizer=without)
    run_prepare([path], tmp_path / "out", tokenizer=without, **{mark: False})


def test_an_input_that_is_listed_twice_is_refused(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="listed twice"):
        run_prepare([path], tmp_path / "out", valid_inputs=[path], tokenizer=model)


# The command line ---------------------------------------------------------------------------------


def test_the_command_prints_a_summary_and_its_help_has_an_example(tmp_path, model, capsys):
    parser = argparse.ArgumentParser(prog="mobilellm prepare")
    command.add_arguments(parser)
    assert "mobilellm prepare --input stories/" in parser.format_help()
    path = write_lines(tmp_path / "a.jsonl")
    flags = f"--input {path} --tokenizer {model} --output {tmp_path}/out --no-eos"
    command.main(parser.parse_args(flags.split()))
    printed = capsys.readouterr()
    assert "train: 60 documents" in printed.out and "records of 2048" in printed.out
    assert "tokens/s" in printed.err
    assert 2 not in stream(tmp_path / "out")


def test_real_text_survives_with_the_llama_tokenizer(tmp_path):
    text = SHARED / "text" / "c4_sample.jsonl.xz"
    llama = SHARED / "tokenizers" / "llama2_tokenizer.model"
    if not text.exists():
        pytest.skip("no real text at ../shared")
    header = run_prepare(
        [text], tmp_path / "out", tokenizer=llama, sequence_length=2048, split_field="split"
    )
    with lzma.open(text, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert texts(tmp_path / "out") == [row["text"] for row in rows if row["split"] == "train"]
    assert sum(split.num_documents for split in header.splits.values()) == len(rows)
