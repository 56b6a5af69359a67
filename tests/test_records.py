"""The bytes of a record, packing, and a header that trusts nothing."""

import errno
import hashlib
import json
import random
import struct
import zlib

import chex
import numpy as np
import pytest

from mobilellm_jax.data import packing
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import open_split
from mobilellm_jax.data.packing import SplitWriter
from mobilellm_jax.data.records import (
    MASKED_FORMAT,
    PLAIN_FORMAT,
    DatasetHeader,
    SourceFile,
    checksum_seed,
    decode_record,
    encode_record,
    token_dtype,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

TEXT = "one two three four five six seven eight nine ten\n" * 5


def _write_dataset(folder, documents, sequence_length=4, records_per_shard=None):
    """A dataset of the given token lists, without prepare in between."""
    folder.mkdir()
    tokenizer = train_tokenizer([TEXT], 280, folder / "tokenizer.model")
    writer = SplitWriter(
        folder,
        "train",
        sequence_length=sequence_length,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        records_per_shard=records_per_shard,
    )
    for document in documents:
        writer.add(np.asarray(document, np.int32), 10, True)
    header = DatasetHeader(
        sequence_length=sequence_length,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        bos=True,
        eos=True,
        splits={"train": writer.close()},
        sources=(SourceFile("a.txt", 10, "0" * 64),),
        settings={},
        created_by="test",
    )
    header.save(folder)
    return header


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 128256])
def test_a_record_survives_encoding_and_decoding(vocab_size):
    tokens = np.array([0, 5, vocab_size - 1, 7])
    form = {"sequence_length": 6, "vocab_size": vocab_size, "seed": 3}
    record = decode_record(encode_record(tokens, [0, 2], **form), **form)
    chex.assert_trees_all_equal(record.tokens, np.array([0, 5, vocab_size - 1, 7, 0, 0, 0]))
    chex.assert_trees_all_equal(record.starts, np.array([0, 2]))
    assert record.num_valid == 4 and record.tokens.dtype == np.int32


def test_tokens_take_two_bytes_up_to_65536_pieces():
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def test_every_flipped_bit_of_a_record_is_noticed():
    form = {"sequence_length": 8, "vocab_size": 300, "seed": checksum_seed("abc", "train", 0)}
    data = encode_record(np.arange(9), [0, 4], **form)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError):
            decode_record(bytes(damaged), **form)
    for length in range(len(data)):
        with pytest.raises(UserError):
            decode_record(data[:length], **form)


@pytest.mark.parametrize("place", [("abd", "train", 0), ("abc", "valid", 0), ("abc", "train", 1)])
def test_a_record_of_another_tokenizer_split_or_place_is_noticed(place):
    form = {"sequence_length": 8, "vocab_size": 300}
    data = encode_record(np.arange(9), [0], seed=checksum_seed("abc", "train", 0), **form)
    with pytest.raises(UserError, match="another place or dataset"):
        decode_record(data, seed=checksum_seed(*place), **form)


def test_a_token_id_beyond_the_vocabulary_is_noticed():
    data = encode_record(np.array([1, 299]), [0], sequence_length=4, vocab_size=300, seed=0)
    with pytest.raises(UserError, match="token id 299, outside of"):
        decode_record(data, sequence_length=4, vocab_size=299, seed=0)


def test_a_token_id_that_a_signed_integer_cannot_hold_is_noticed():
    form = {"sequence_length": 4, "vocab_size": 128256, "seed": 0}
    data = encode_record(np.array([1, 2**31 + 5], np.uint32), [0], **form)
    with pytest.raises(UserError, match="outside of"):
        decode_record(data, **form)


@pytest.mark.parametrize(("num_valid", "num_starts"), [(0, 1), (6, 1), (5, 0), (5, 2)])
def test_counts_that_do_not_agree_with_the_length_are_refused_with_a_right_checksum(
    num_valid, num_starts
):
    body = struct.pack("<II5HI", num_valid, num_starts, 1, 5, 6, 7, 2, 0)
    data = struct.pack("<I", zlib.crc32(body)) + body
    with pytest.raises(UserError, match="do not agree with sequence_length 4"):
        decode_record(data, sequence_length=4, vocab_size=300, seed=0)


def test_packing_agrees_with_an_example_written_by_hand(tmp_path):
    header = _write_dataset(tmp_path / "d", [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2]])
    split = header.splits["train"]
    assert (split.num_records, split.num_tokens, split.num_documents) == (3, 11, 3)
    source = open_split(tmp_path / "d", "train")
    records = [source.record(i) for i in range(len(source))]
    assert [record.tokens.tolist() for record in records] == [
        [1, 5, 6, 2, 1],
        [1, 7, 2, 1, 8],  # begins with the last token of the record before
        [8, 9, 10, 2, 0],
    ]
    assert [record.num_valid for record in records] == [5, 5, 4]
    assert [record.starts.tolist() for record in records] == [[0, 4], [0, 3], []]


def test_rows_agree_with_an_example_written_by_hand(tmp_path):
    _write_dataset(tmp_path / "d", [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2]])
    source = open_split(tmp_path / "d", "train")
    rows = source.__getitems__([0, 1, 2])
    assert [row["inputs"].tolist() for row in rows] == [[1, 5, 6, 2], [1, 7, 2, 1], [8, 9, 10, 2]]
    assert [row["targets"].tolist() for row in rows] == [[5, 6, 2, 1], [7, 2, 1, 8], [9, 10, 2, 0]]
    assert [row["loss_weights"].tolist() for row in rows] == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
    assert [row["segment_ids"].tolist() for row in rows] == [[1] * 4, [1, 1, 1, 2], [1] * 4]


@pytest.mark.parametrize(("num_tokens", "num_records"), [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2)])
def test_every_token_but_the_first_is_predicted_once(tmp_path, num_tokens, num_records):
    header = _write_dataset(tmp_path / "d", [list(range(num_tokens))])
    split = header.splits["train"]
    assert (split.num_records, split.num_tokens) == (num_records, num_tokens - 1)


def test_records_go_on_over_shards(tmp_path):
    header = _write_dataset(tmp_path / "d", [list(range(100))], records_per_shard=7)
    assert [shard.num_records for shard in header.splits["train"].shards] == [7, 7, 7, 4]
    source = open_split(tmp_path / "d", "train")
    assert [source.record(i).tokens[0] for i in range(25)] == list(range(0, 100, 4))


def test_a_shard_holds_as_many_records_as_fit_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_SHARD_BYTES", 30)  # a record has 5 tokens of 2 bytes
    header = _write_dataset(tmp_path / "d", [list(range(33))])
    assert [shard.num_records for shard in header.splits["train"].shards] == [3, 3, 2]


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        ("No space left on device", errno.ENOSPC),
        ("Disk quota exceeded", errno.ENOSPC),
        ("Input/output error", errno.EIO),
    ],
)
def test_a_full_disk_is_told_from_a_broken_one(tmp_path, monkeypatch, problem, code):
    class Failing(packing.array_record_module.ArrayRecordWriter):
        def write(self, data):
            raise RuntimeError(problem)

    monkeypatch.setattr(packing.array_record_module, "ArrayRecordWriter", Failing)
    with pytest.raises(OSError, match=problem) as error:
        _write_dataset(tmp_path / "d", [list(range(100))])
    assert error.value.errno == code
    assert error.value.filename == str(tmp_path / "d" / "train-00000.array_record")


def test_a_header_survives_saving_and_loading(tmp_path):
    header = _write_dataset(tmp_path / "d", [list(range(100))], records_per_shard=7)
    assert Dataset.open(tmp_path / "d").header == header
    header.verify_shards(tmp_path / "d")


def _edit(**changes):
    def edit(values):
        values.update(changes)

    return edit


def _edit_split(**changes):
    def edit(values):
        values["splits"]["train"].update(changes)

    return edit


def _edit_shard(**changes):
    def edit(values):
        values["splits"]["train"]["shards"][0].update(changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(format_version=3), "format_version is 3"),
        (_edit(sequence_length="4"), "sequence_length is '4'"),
        (_edit(sequence_length=0), "sequence_length 0"),
        (_edit(vocab_size=281), "vocab_size 281, but the tokenizer has 280"),
        (_edit(token_dtype="uint32"), "token_dtype 'uint32'"),
        (_edit(tokenizer_sha256="0" * 64), "the dataset was made with 000000"),
        (_edit(splits={}), "splits"),
        (_edit(bos=1), "bos is 1"),
        (_edit(unknown=1), "unknown"),
        (lambda values: values.pop("eos"), "eos"),
        (_edit_shard(file="../train-00000.array_record"), "unexpected shard names"),
        (_edit_shard(num_records=24), "not 25 records"),
        (_edit_split(num_records=0, shards=[]), r"hold \[\], not 0 records"),
        (_edit_shard(bytes=-1), "bytes is -1"),
        (_edit_shard(bytes=5), "but dataset.json says 5"),
    ],
)
def test_a_wrong_entry_of_the_header_is_named(tmp_path, edit, message):
    _write_dataset(tmp_path / "d", [list(range(100))])
    path = tmp_path / "d" / "dataset.json"
    values = json.loads(path.read_text())
    edit(values)
    del values["header_sha256"]
    content = json.dumps(values, sort_keys=True).encode()
    values["header_sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        Dataset.open(tmp_path / "d")
    assert str(tmp_path / "d") in str(error.value)


def test_none_of_500_random_damages_of_the_header_is_silent(tmp_path):
    header = _write_dataset(tmp_path / "d", [list(range(100))])
    path = tmp_path / "d" / "dataset.json"
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(500):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            assert Dataset.open(tmp_path / "d").header == header  # a changed space means nothing
        except UserError:
            continue


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff"])
def test_a_header_that_is_no_header_is_refused(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match="dataset.json"):
        Dataset.open(tmp_path)


def test_a_missing_or_resized_file_is_noticed(tmp_path):
    _write_dataset(tmp_path / "d", [list(range(100))])
    shard = tmp_path / "d" / "train-00000.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="train-00000.*truncated"):
        Dataset.open(tmp_path / "d")
    shard.unlink()
    with pytest.raises(UserError, match="train-00000.*cannot read"):
        Dataset.open(tmp_path / "d")
    shard.write_bytes(data)
    (tmp_path / "d" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model"):
        Dataset.open(tmp_path / "d")


def test_an_unfinished_folder_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="not a finished dataset"):
        Dataset.open(tmp_path)


# The loss mask: format 2.


def test_a_loss_mask_survives_encoding_and_decoding_and_a_flipped_bit_is_noticed():
    settings = {"sequence_length": 10, "vocab_size": 300, "seed": 7}
    tokens, mask = np.arange(9), np.array([0, 1, 1, 0, 0, 1, 0, 1, 1], bool)
    data = encode_record(tokens, np.array([0, 4]), loss_mask=mask, **settings)
    plain = encode_record(tokens, np.array([0, 4]), **settings)
    assert data[4:-2] == plain[4:] and data[-2:] == bytes([0b10100110, 0b1])
    record = decode_record(data, format_version=MASKED_FORMAT, **settings)
    assert record.loss_mask.tolist() == [*mask.tolist(), False, False]
    assert record.tokens[:9].tolist() == tokens.tolist() and record.starts.tolist() == [0, 4]
    assert decode_record(plain, **settings).loss_mask is None
    for version, content in ((MASKED_FORMAT, plain), (PLAIN_FORMAT, data)):
        with pytest.raises(UserError, match="do not agree with sequence_length 10"):
            decode_record(content, format_version=version, **settings)
    flipped = data[:-1] + bytes([data[-1] ^ 0b10])
    with pytest.raises(UserError, match="wrong checksum"):
        decode_record(flipped, format_version=MASKED_FORMAT, **settings)
