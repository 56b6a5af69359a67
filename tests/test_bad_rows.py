"""Bad rows: an error that names the first one, or left out up to a number of them."""

import io
import json

import pytest
from prepared import DOCUMENTS, run_prepare, texts

from mobilellm_jax.data.loader import open_split
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

GOOD = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
BAD = [
    b'{"text": ',
    b'["a"]',
    b'{"body": "a"}',
    b'{"text": null}',
    b'{"text": "caf\xe9"}',
    rb'{"text": "\udc00"}',
    b'{"text": "a", "text": "b"}',
    b'{"token_ids": [1, -5]}',
    b'{"token_ids": ' + json.dumps([999] * 32).encode() + b"}",
    b"[" * 100_000,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(DOCUMENTS, 310, path)
    return path


def _write_bad(path):
    """One bad line after each of the first good ones; the bad lines are 2, 4, 6, ..."""
    lines = [line for pair in zip(GOOD, BAD, strict=False) for line in pair] + GOOD[len(BAD) :]
    path.write_bytes(b"\n".join(lines))
    return path


def test_bad_rows_are_left_out_up_to_the_number_allowed(tmp_path, model, caplog):
    path = _write_bad(tmp_path / "a.jsonl")
    run_prepare([path], tmp_path / "out", tokenizer=model, skip_bad=len(BAD))
    assert texts(tmp_path / "out") == DOCUMENTS
    [record] = caplog.records
    lines = record.getMessage().splitlines()
    assert lines[0] == f"left out {len(BAD)} bad rows (of at most {len(BAD)}):"
    assert [line.split(":")[0] for line in lines[1:6]] == [
        f"  {path}, line {number}" for number in (2, 4, 6, 8, 10)
    ]
    assert lines[6:] == ["  ..."]


def test_one_bad_row_too_many_is_an_error_that_names_it(tmp_path, model):
    path = _write_bad(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not valid JSON.*--skip_bad N leaves"):
        run_prepare([path], tmp_path / "out", tokenizer=model)
    last = rf"a.jsonl, line {2 * len(BAD)}: not valid JSON .*bad row {len(BAD)}, and --skip_bad is"
    with pytest.raises(UserError, match=last):
        run_prepare([path], tmp_path / "out", tokenizer=model, skip_bad=len(BAD) - 1)
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_rows_do_not_count_twice_where_a_tokenizer_is_trained(tmp_path):
    path = _write_bad(tmp_path / "a.jsonl")
    header = run_prepare([path], tmp_path / "out", vocab_size=300, skip_bad=len(BAD))
    assert texts(tmp_path / "out") == DOCUMENTS
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(GOOD))
    good = run_prepare([tmp_path / "good.jsonl"], tmp_path / "good", vocab_size=300)
    assert header.tokenizer_sha256 == good.tokenizer_sha256


@pytest.mark.parametrize("trained", [True, False])
def test_a_parquet_row_that_is_no_utf8_is_named_or_left_out(tmp_path, model, trained, caplog):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = [text.encode() for text in DOCUMENTS for _ in range(10)]
    raw.insert(300, b"caf\xe9")
    binary = pyarrow.array(raw, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.utf8(), len(raw), binary.buffers())
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": text}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    settings = {"vocab_size": 300} if trained else {"tokenizer": model}
    with pytest.raises(UserError, match="a.parquet, row 301: cannot be read .*0xe9") as error:
        run_prepare([tmp_path / "a.parquet"], tmp_path / "out", **settings)
    assert "vocab_size" not in str(error.value) and "tokenizer" not in str(error.value)
    run_prepare([tmp_path / "a.parquet"], tmp_path / "out", skip_bad=1, **settings)
    assert texts(tmp_path / "out") == [text for text in DOCUMENTS for _ in range(10)]
    assert "left out 1 bad rows" in caplog.text


def test_good_rows_of_token_ids_stay_beside_bad_ones(tmp_path, model):
    good = [[1, *range(5, 12)], [1, *range(6, 13)]]
    rows = [good[0], [5] * 3, good[1], [400] * 8]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"token_ids": row}) for row in rows))
    run_prepare([path], tmp_path / "out", tokenizer=model, sequence_length=8, skip_bad=2)
    source = open_split(tmp_path / "out", "train")
    records = [source.record(i) for i in range(len(source))]
    assert [record.tokens[: record.num_valid].tolist() for record in records] == good


def test_another_number_is_another_dataset(tmp_path, model):
    path = _write_bad(tmp_path / "a.jsonl")
    run_prepare([path], tmp_path / "out", tokenizer=model, skip_bad=20)
    with pytest.raises(UserError, match="made with skip_bad 20, now asked for 0"):
        run_prepare([path], tmp_path / "out", tokenizer=model)


def test_datasets_that_do_not_record_it_were_made_of_good_rows(tmp_path, model):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    header = run_prepare([path], tmp_path / "out", tokenizer=model)
    del header.settings["skip_bad"]
    header.save(tmp_path / "out")
    assert run_prepare([path], tmp_path / "out", tokenizer=model) == DatasetHeader.load(
        tmp_path / "out"
    )
