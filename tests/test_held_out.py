"""Test sets stay out of training: rows that say so, files whose names do, the table of inputs."""

import itertools
import json

import pytest
from prepared import DOCUMENTS, make_documents, run_prepare, texts, write_lines

from mobilellm_jax.data import rows
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(DOCUMENTS, 310, path)
    return path


def _write_splits(path, documents=DOCUMENTS):
    names = itertools.cycle(["train", "valid", "test"])
    lines = [json.dumps({"text": text, "part": next(names)}) for text in documents]
    path.write_text("\n".join(lines))
    return path


def test_rows_of_a_test_set_are_left_out_unless_they_are_asked_for(tmp_path, model, caplog):
    path = _write_splits(tmp_path / "a.jsonl")
    settings = {"tokenizer": model, "split_field": "part"}
    run_prepare([path], tmp_path / "without", **settings)
    assert texts(tmp_path / "without", "train") == DOCUMENTS[::3]
    assert texts(tmp_path / "without", "valid") == DOCUMENTS[1::3]
    assert "left out 20 rows whose part is 'test'; --keep_test" in caplog.text
    caplog.clear()
    run_prepare([path], tmp_path / "with", keep_test=True, **settings)
    assert texts(tmp_path / "with", "train") == DOCUMENTS[::3]
    kept = [text for number, text in enumerate(DOCUMENTS) if number % 3]
    assert texts(tmp_path / "with", "valid") == kept
    assert not caplog.records


def test_long_rows_of_a_test_set_are_left_out_whole(tmp_path, model, caplog, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 100)
    documents = ["\n".join(make_documents(20, seed)) for seed in range(6)]
    path = _write_splits(tmp_path / "a.jsonl", documents)
    run_prepare([path], tmp_path / "out", tokenizer=model, split_field="part")
    assert texts(tmp_path / "out", "train") == documents[::3]
    assert texts(tmp_path / "out", "valid") == documents[1::3]
    assert "left out 2 rows" in caplog.text


def test_rows_of_a_test_set_do_not_train_the_tokenizer(tmp_path):
    hashes = []
    for number, text in enumerate(["zebra quagga " * 30, "okapi gnu " * 30]):
        path = write_lines(tmp_path / f"{number}.jsonl", part="train")
        with path.open("a") as file:
            file.write(json.dumps({"text": text, "part": "test"}))
        settings = {"vocab_size": 300, "split_field": "part"}
        hashes.append(run_prepare([path], tmp_path / f"out{number}", **settings).tokenizer_sha256)
    assert hashes[0] == hashes[1]


def test_nothing_but_a_test_set_is_refused_with_the_reason(tmp_path, model, caplog):
    path = write_lines(tmp_path / "a.jsonl", part="test")
    with pytest.raises(UserError, match="holds no text to train on or hold out"):
        run_prepare([path], tmp_path / "out", tokenizer=model, split_field="part")
    assert "left out 60 rows" in caplog.text


def test_keep_test_needs_a_split_field(tmp_path, model):
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="add --split_field"):
        run_prepare([path], tmp_path / "out", tokenizer=model, keep_test=True)


@pytest.mark.parametrize(
    ("split_field", "keep_test"),
    [(None, False), ("part", True)],
)
def test_datasets_that_do_not_record_it_compare_as_they_were_made(
    tmp_path, model, split_field, keep_test
):
    path = _write_splits(tmp_path / "a.jsonl")
    settings = {"tokenizer": model, "split_field": split_field}
    header = run_prepare([path], tmp_path / "out", keep_test=keep_test, **settings)
    del header.settings["keep_test"]
    header.save(tmp_path / "out")
    run_prepare([path], tmp_path / "out", keep_test=keep_test, **settings)
    if split_field is not None:
        with pytest.raises(UserError, match="made with keep_test True, now asked for False"):
            run_prepare([path], tmp_path / "out", **settings)


NAMES = ["c4.jsonl", "wiki.test.jsonl", "latest.jsonl", "valid-00000-of-00002.jsonl", "dev/a.jsonl"]


def _write_names(folder):
    (folder / "dev").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write_lines(folder / name, make_documents(3, seed=number))


def test_files_that_are_named_as_tests_are_warned_of_where_a_folder_led_to_them(
    tmp_path, model, caplog
):
    folder = tmp_path / "test" / "text"
    _write_names(folder)
    run_prepare([f"{tmp_path}/test/./text"], tmp_path / "folder", tokenizer=model)
    [record] = caplog.records
    suspects = [str(folder / NAMES[i]) for i in (4, 3, 1)]
    assert f"for tests: {', '.join(suspects)}; hold it out" in record.getMessage()
    caplog.clear()
    run_prepare([folder / "*.jsonl"], tmp_path / "pattern", tokenizer=model)
    assert "wiki.test.jsonl" in caplog.text and "dev" not in caplog.text


def test_files_that_are_named_by_the_user_or_held_out_are_not_warned_of(tmp_path, model, caplog):
    folder = tmp_path / "text"
    _write_names(folder)
    by_name = [folder / name for name in NAMES]
    run_prepare(by_name, tmp_path / "names", tokenizer=model)
    run_prepare([folder / "*.test.jsonl"], tmp_path / "pattern", tokenizer=model)
    run_prepare([folder / "dev"], tmp_path / "dev", tokenizer=model)
    run_prepare(by_name[:1], tmp_path / "held", valid_inputs=[folder / "v*"], tokenizer=model)
    assert not caplog.records


# The table ----------------------------------------------------------------------------------------


def test_every_input_is_printed_with_its_documents_and_tokens(tmp_path, model, capsys):
    parts = {"a.jsonl": DOCUMENTS[:10], "b.jsonl": DOCUMENTS[10:25], "c.jsonl": DOCUMENTS[25:]}
    paths = [write_lines(tmp_path / name, part) for name, part in parts.items()]
    run_prepare(paths[:2], tmp_path / "o", valid_inputs=paths[2:], tokenizer=model, progress=True)
    tokenizer = SentencePieceTokenizer.load(model)
    counts = [sum(len(tokenizer.encode(t)) + 2 for t in part) for part in parts.values()]
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = ["input", "documents", "tokens", "held-out documents", "held-out tokens"]
    assert cells[0] == head and cells[2:] == [
        [str(paths[0]), "10", f"{counts[0]:,}", "0", "0"],
        [str(paths[1]), "15", f"{counts[1]:,}", "0", "0"],
        [str(paths[2]), "0", "0", "35", f"{counts[2]:,}"],
        ["3 inputs", "25", f"{counts[0] + counts[1]:,}", "35", f"{counts[2]:,}"],
    ]


def test_of_many_inputs_the_largest_are_printed_and_the_rest_summed(tmp_path, model, capsys):
    for number in range(25):
        write_lines(tmp_path / f"{number:02}.jsonl", ["cat"] * (number + 1))
    run_prepare([tmp_path], tmp_path / "out", tokenizer=model, progress=True)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 22
    assert "24.jsonl" in lines[0] and "05.jsonl" in lines[19]
    assert lines[20].split("|")[1].strip() == "5 more" and int(lines[20].split("|")[2]) == 15
    assert lines[21].split("|")[1].strip() == "25 inputs" and int(lines[21].split("|")[2]) == 325
