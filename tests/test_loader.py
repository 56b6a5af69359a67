"""The loader: an order that is a pure function, batches for any hosts, and damaged shards."""

import itertools
import os
import random
import resource
from collections import Counter

import chex
import numpy as np
import pytest

from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.data.loader import RecordOrder, eval_batches, open_split, train_batches
from mobilellm_jax.data.packing import SplitWriter
from mobilellm_jax.data.records import SPLITS, DatasetHeader
from mobilellm_jax.errors import UserError
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

TEXT = "one two three four five six seven eight nine ten\n" * 5
T = 16


def _write_dataset(folder, num_train, *, num_valid=0, first=0, length=T, shard=8, vocab_size=280):
    """Records whose first token tells which one it is: ``first`` + its number, modulo 250."""
    folder.mkdir()
    tokenizer = train_tokenizer([TEXT], vocab_size, folder / "tokenizer.model")
    splits = {}
    for split, count in zip(SPLITS, (num_train, num_valid), strict=True):
        writer = SplitWriter(
            folder,
            split,
            sequence_length=length,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            records_per_shard=shard,
        )
        for index in range(count):
            tokens = np.full(length + 1, (first + index) % 250, np.int32)
            writer.add_record(tokens, np.array([0, 5]), 10)
        if count:
            splits[split] = writer.close()
    header = DatasetHeader(
        sequence_length=length,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        bos=True,
        eos=True,
        splits=splits,
        sources=(),
        settings={},
        created_by="test",
    )
    header.save(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return _write_dataset(tmp_path_factory.mktemp("data") / "d", 40, num_valid=10)


def _train(dataset, **settings):
    settings = {"seed": 3, "global_batch_size": 8, "sequence_length": T, "num_steps": 12} | settings
    return train_batches([(Dataset.open(dataset), 1.0)], **settings)


# The order ----------------------------------------------------------------------------------------


def test_the_order_is_a_pure_function_of_seed_and_position():
    positions = list(range(500))
    expected = [RecordOrder((40, 7), (1.0, 0.5), 3)(p) for p in positions]
    order = RecordOrder((40, 7), (1.0, 0.5), 3)
    random.Random(0).shuffle(positions)
    for position in positions:
        assert order(position) == expected[position]
    assert [RecordOrder((40, 7), (1.0, 0.5), 4)(p) for p in range(500)] != expected


def test_the_order_is_the_one_that_earlier_versions_had():
    """A changed order (of ours, or of grain) would silently break every resumed run."""
    order = RecordOrder((1000, 100_000), (3.0, 1.0), 17)
    assert [order(position) for position in (0, 1, 2, 3, 4, 1000, 10**9)] == [
        (0, 37),
        (0, 171),
        (0, 827),
        (1, 6048),
        (0, 700),
        (0, 698),
        (0, 576),
    ]


@pytest.mark.parametrize("num_records", [1, 2, 7, 1000, 65536, 65537, 65538])
def test_every_record_appears_exactly_once_in_every_epoch(num_records):
    order = RecordOrder((num_records,), (1.0,), 0)
    for epoch in (0, 10**6):
        start = epoch * num_records
        seen = [order(position)[1] for position in range(start, start + num_records)]
        assert sorted(seen) == list(range(num_records))


def test_epochs_datasets_and_neighbouring_seeds_have_different_orders():
    orders = []
    for seed in (0, 1, 2):
        order = RecordOrder((200, 200), (1.0, 1.0), seed)
        places = [order(position) for position in range(1200)]
        for dataset in (0, 1):
            records = [record for number, record in places if number == dataset]
            orders += [tuple(records[e * 200 : (e + 1) * 200]) for e in range(3)]
    assert len(set(orders)) == len(orders) == 18


def test_a_shuffle_is_uniform_enough():
    """Each record comes first about equally often; chi-squared with 19 degrees of freedom."""
    firsts = Counter(RecordOrder((20,), (1.0,), seed)(0)[1] for seed in range(4000))
    chi2 = sum((firsts[record] - 200) ** 2 / 200 for record in range(20))
    assert chi2 < 43.8  # p = 0.001


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (8.0, 1.0, 1.0), (1e-3, 5e-3)])
def test_a_mixture_keeps_its_proportions_in_every_stretch(weights):
    order = RecordOrder((50, 1000, 3)[: len(weights)], weights, 0)
    for start in (0, 12345):
        counts = Counter(order(start + position)[0] for position in range(2000))
        for dataset, weight in enumerate(weights):
            assert abs(counts[dataset] / 2000 - weight / sum(weights)) < 0.01


# Batches ------------------------------------------------------------------------------------------


def test_a_batch_has_the_records_of_its_positions(dataset):
    order = RecordOrder((40,), (1.0,), 3)
    for step, batch in enumerate(_train(dataset)):
        expected = [order(position)[1] for position in range(step * 8, step * 8 + 8)]
        assert batch["inputs"][:, 0].tolist() == expected
    assert step == 11


def test_batches_have_the_promised_shapes_and_types(dataset):
    batch = next(_train(dataset))
    assert {name: array.dtype for name, array in batch.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "loss_weights": np.float32,
        "segment_ids": np.int32,
    }
    chex.assert_shape(list(batch.values()), (8, T))
    chex.assert_trees_all_equal(batch["segment_ids"][0], np.array([1] * 5 + [2] * (T - 5)))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_hosts(dataset, process_count):
    whole = list(_train(dataset, num_steps=5))
    share = 8 // process_count
    parts = [
        _train(dataset, num_steps=5, rows=range(first, first + share))
        for first in range(0, 8, share)
    ]
    for expected, *rows in zip(whole, *parts, strict=True):
        together = {name: np.concatenate([row[name] for row in rows]) for name in expected}
        chex.assert_trees_all_equal(together, expected)


def test_a_run_that_resumes_at_any_step_gets_the_same_batches(dataset):
    whole = list(_train(dataset))
    for start in range(13):
        resumed = list(_train(dataset, start_step=start))
        assert len(resumed) == 12 - start
        chex.assert_trees_all_equal(resumed, whole[start:])


def test_any_number_of_threads_gives_the_same_batches(dataset):
    batches = [list(_train(dataset, num_threads=n, prefetch=p)) for n, p in [(1, 1), (8, 16)]]
    chex.assert_trees_all_equal(*batches)


def test_without_a_last_step_the_batches_go_on(dataset):
    batches = _train(dataset, num_steps=None, start_step=10**7)
    assert len(list(itertools.islice(batches, 20))) == 20
    batches.close()


def test_a_mixture_of_datasets_is_read_from_both(tmp_path):
    paths = [_write_dataset(tmp_path / n, 30, first=f) for n, f in [("a", 0), ("b", 100)]]
    weights = (3.0, 1.0)
    batches = train_batches(
        list(zip(map(Dataset.open, paths), weights, strict=True)),
        seed=0,
        global_batch_size=8,
        sequence_length=T,
        num_steps=50,
    )
    first = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    assert (first < 100).sum() == 300
    assert set(first[first < 100]) == set(range(30))
    assert set(first[first >= 100]) == set(range(100, 130))


def test_evaluation_reads_every_record_once_in_order_and_pads_the_last_batch(dataset):
    batches = list(eval_batches(open_split(dataset, "valid"), batch_size=4))
    assert len(batches) == 3
    chex.assert_shape([batch["inputs"] for batch in batches], (4, T))
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    assert weights.sum() == 10 * T and weights[10:].sum() == 0
    first = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    assert first[:10].tolist() == list(range(10))
    assert batches[-1]["segment_ids"][2:].sum() == 0
    limited = list(eval_batches(open_split(dataset, "valid"), batch_size=4, max_records=5))
    assert sum(batch["loss_weights"].sum() for batch in limited) == 5 * T


def test_evaluation_on_two_hosts_sees_the_same_records(dataset):
    whole = list(eval_batches(open_split(dataset, "valid"), batch_size=8))
    parts = [
        list(eval_batches(open_split(dataset, "valid"), batch_size=8, rows=rows))
        for rows in (range(4), range(4, 8))
    ]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 2
    for expected, *rows in zip(whole, *parts, strict=True):
        together = {name: np.concatenate([row[name] for row in rows]) for name in expected}
        chex.assert_trees_all_equal(together, expected)


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 8}, "d: sequence_length 16, but the run's is 8"),
    ],
)
def test_settings_that_do_not_go_with_the_dataset_are_explained(dataset, settings, message):
    with pytest.raises(UserError, match=message):
        _train(dataset, **settings)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 281}, "a and .*b: made with different tokenizers"),
        ({"length": 8}, "a and .*b: sequence_length 16 and 8 do not mix"),
    ],
)
def test_datasets_that_do_not_go_together_are_both_named(tmp_path, other, message):
    first = _write_dataset(tmp_path / "a", 10)
    second = _write_dataset(tmp_path / "b", 10, **other)
    with pytest.raises(UserError, match=message):
        datasets = [(Dataset.open(first), 1.0), (Dataset.open(second), 1.0)]
        train_batches(datasets, seed=0, global_batch_size=2, sequence_length=T)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_positive_number(dataset, weight):
    with pytest.raises(UserError, match="weight .* must be"):
        datasets = [(Dataset.open(dataset), weight)]
        train_batches(datasets, seed=0, global_batch_size=2, sequence_length=T)


def test_a_missing_split_or_dataset_is_explained(tmp_path):
    folder = _write_dataset(tmp_path / "d", 4)
    with pytest.raises(UserError, match="no 'valid' split, only 'train'"):
        eval_batches(open_split(folder, "valid"), batch_size=2)
    with pytest.raises(UserError, match="nowhere: not a finished dataset"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no dataset"):
        train_batches([], seed=0, global_batch_size=2, sequence_length=T)


@pytest.mark.parametrize("index", [-1, 40])
def test_a_record_outside_of_the_split_is_an_index_error(dataset, index):
    with pytest.raises(IndexError, match=f"record {index} of 40"):
        open_split(dataset, "train").record(index)


# Damage -------------------------------------------------------------------------------------------


def _records(folder):
    source = open_split(folder, "train")
    return [source.record(index).tokens.tolist() for index in range(len(source))]


def test_none_of_300_random_damages_of_a_shard_is_silent(tmp_path):
    """A damage is noticed, by an error that names the shard, or it changed no record."""
    folder = _write_dataset(tmp_path / "d", 1500, length=64, shard=1500)
    good_records = _records(folder)
    shard = folder / "train-00000.array_record"
    good, rng, noticed = shard.read_bytes(), random.Random(0), Counter()
    used = len(good.rstrip(b"\0"))
    for number in range(300):
        kind = ("flip", "zeros", "noise", "swap", "truncate")[number % 5]
        data, at, to = bytearray(good), rng.randrange(used), rng.randrange(used)
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "zeros":
            data[at : at + 512] = bytes(512)
        elif kind == "noise":
            data[at : at + 64] = rng.randbytes(64)
        elif kind == "swap":
            data[at : at + 256], data[to : to + 256] = data[to : to + 256], data[at : at + 256]
        else:
            data = data[:at]
        shard.write_bytes(data[: len(good)])
        try:
            assert _records(folder) == good_records
        except UserError as error:
            assert "train-00000.array_record" in str(error)
            noticed[kind] += 1
    assert noticed["truncate"] == 60 and noticed.total() >= 250


def test_a_damaged_record_is_named_with_file_number_and_byte(tmp_path):
    folder = _write_dataset(tmp_path / "d", 40, shard=16)
    shard = folder / "train-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[data.find(bytes([20, 0] * T))] ^= 1  # inside the tokens of record 20, the fifth of shard 1
    shard.write_bytes(data)
    source = open_split(folder, "train")
    source.record(19)
    with pytest.raises(
        UserError, match=r"train-00001.*record 4 \(of train: 20\).* at \d+"
    ) as error:
        source.record(20)
    assert "copy it again" in str(error.value)


def test_shards_in_each_others_place_are_noticed(tmp_path):
    folder = _write_dataset(tmp_path / "d", 32, shard=16)
    one, two = folder / "train-00000.array_record", folder / "train-00001.array_record"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(UserError, match="another place or dataset"):
        open_split(folder, "train").record(0)


def test_an_error_in_the_background_reaches_the_caller_when_the_batch_is_due(tmp_path):
    folder = _write_dataset(tmp_path / "d", 40, shard=40)
    shard = folder / "train-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.find(bytes([20, 0] * T))] ^= 1
    shard.write_bytes(data)
    order = RecordOrder((40,), (1.0,), 3)
    due = next(position for position in range(40) if order(position)[1] == 20) // 8
    batches = _train(folder)
    for _ in range(due):
        next(batches)
    with pytest.raises(UserError, match="train-00000.*record 20"):
        next(batches)


@pytest.fixture
def few_files():
    """A soft limit that leaves some 20 further files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_are_read_than_the_soft_limit_of_open_files(tmp_path, few_files):
    folder = _write_dataset(tmp_path / "d", 60, shard=1)
    assert [tokens[0] for tokens in _records(folder)] == list(range(60))


def test_too_many_shards_for_the_hard_limit_are_no_damage(tmp_path, few_files, monkeypatch):
    folder = _write_dataset(tmp_path / "d", 60, shard=1)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    with pytest.raises(UserError, match=r"its 60 shards stay open .* hard limit \(ulimit -Hn\)"):
        _records(folder)


def test_a_shard_that_vanishes_after_the_start_is_named(tmp_path):
    folder = _write_dataset(tmp_path / "d", 8)
    source = open_split(folder, "train")
    (folder / "train-00000.array_record").unlink()
    with pytest.raises(UserError, match="train-00000.array_record"):
        source.record(0)
