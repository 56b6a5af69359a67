"""Checkpoints: bitwise round trips, retention, and nothing damaged, foreign or partial gets in."""

import contextlib
import dataclasses
import importlib.util
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hf_folders import train_small_tokenizer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model_cases import save_params

from mobilellm_jax.checkpoints.files import list_steps, load_checkpoint
from mobilellm_jax.checkpoints.store import Checkpoints
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import abstract_params
from mobilellm_jax.model_bundle import read_record
from mobilellm_jax.storage.manifest import write_manifest

with contextlib.suppress(RuntimeError):  # JAX has started, as conftest.py told it to
    jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parents[1]
FAULTS_PATH = ROOT / "benchmarks" / "checkpoint_faults.py"
_spec = importlib.util.spec_from_file_location("checkpoint_faults", FAULTS_PATH)
faults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faults)

CONFIG = ModelConfig(
    num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=32, head_dim=16, vocab_size=64, ffn_dim=64
)
TOKENIZER = SimpleNamespace(files={"tokenizer.model": b"\x00sp"}, sha256="5f" * 32)
METADATA = {"model": CONFIG.to_dict(), "run": {"peak_lr": 2e-3}}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = abstract_params(CONFIG)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def _save(workdir, *steps, keep_last=5, size=1000, **options):
    with Checkpoints(workdir, keep_last=keep_last, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, **faults.state(step, size))


def _restore(workdir, **options):
    with Checkpoints(workdir, keep_last=5) as checkpoints:
        return faults.restore(checkpoints, **options)


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _flip(path):
    faults.mutate(path, "flip", random.Random(0))


def _data_file(workdir, step, item="params"):
    folder = workdir / "checkpoints" / str(step) / item
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _mesh(*shape):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


# What goes in comes out.


def test_params_and_optimizer_state_come_back_bit_for_bit(tmp_path, params):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.linear_schedule(1e-3, 0.0, 10),
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
        ),
        optax.masked(optax.trace(0.9), lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)),
    )
    opt_state = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p)[1])(params)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(
            3, params=params, opt_state=opt_state, metadata=METADATA, tokenizer=TOKENIZER
        )
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        restored = checkpoints.restore(
            config=CONFIG,
            params_like=jax.eval_shape(lambda: params),
            opt_state_like=jax.eval_shape(lambda: opt_state),
        )
    assert restored.step == 3
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {name: (folder / name).read_bytes() for name in TOKENIZER.files} == TOKENIZER.files
    assert restored.metadata["run"] == METADATA["run"]
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(opt_state)
    chex.assert_trees_all_equal(restored.params, params, strict=True)
    chex.assert_trees_all_equal(restored.opt_state, opt_state, strict=True)


def test_dtypes_and_odd_numbers_survive(tmp_path):
    odd = jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-45, 3.4e38], jnp.float32)
    tree = {"f": odd, "h": odd.astype(jnp.bfloat16), "i": jnp.arange(3, dtype=jnp.int8)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, params=tree, opt_state=tree, metadata=METADATA, tokenizer=None)
        restored = checkpoints.restore(config=CONFIG, params_like=tree, opt_state_like=tree)
    for name, leaf in tree.items():
        assert restored.params[name].dtype == leaf.dtype
        assert np.asarray(restored.params[name]).tobytes() == np.asarray(leaf).tobytes()


def test_state_saved_on_one_mesh_restores_on_another(tmp_path):
    value = jnp.arange(64.0).reshape(8, 8)
    here = NamedSharding(_mesh(4, 2), PartitionSpec("x", "y"))
    there = NamedSharding(_mesh(2, 4), PartitionSpec("y", None))
    tree = {"w": jax.device_put(value, here)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, params=tree, opt_state=tree, metadata=METADATA, tokenizer=None)
        for sharding in (here, there, None):
            like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
            restored = checkpoints.restore(config=CONFIG, params_like=like, opt_state_like=like)
            chex.assert_trees_all_equal(restored.params, {"w": value})
            assert len(restored.opt_state["w"].devices()) == (8 if sharding else 1)
            if sharding:
                assert restored.params["w"].sharding == sharding


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    size = 500_000
    advance(faults.state(1, size)["params"])
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        for step in range(1, 4):
            state = faults.state(step, size)
            checkpoints.save(step, **state)
            for _ in range(3):
                state["params"] = advance(state["params"])
    for step in range(1, 4):
        assert _restore(tmp_path, size=size, step=step).step == step


def test_an_empty_workdir_restores_nothing(tmp_path):
    assert _restore(tmp_path) is None


def test_metadata_says_what_was_saved_with_what(tmp_path):
    _save(tmp_path, 4)
    restored = _restore(tmp_path)
    metadata = restored.metadata
    assert metadata["step"] == 4
    assert metadata["tokenizer_sha256"] == TOKENIZER.sha256
    assert metadata["arrays"]["params"] == {"a": "float32[1000]", "b/c": "float32[10,100]"}
    assert metadata["versions"]["jax"] == jax.__version__


# Which steps are kept.


def test_the_newest_steps_and_each_nth_are_kept(tmp_path):
    _save(tmp_path, *range(1, 10), keep_last=2, keep_every=4)
    assert _steps(tmp_path) == [4, 8, 9]


def test_an_old_step_goes_only_after_the_new_one_has_its_manifest(tmp_path):
    _save(tmp_path, 1, keep_last=1)
    failure = mock.patch(
        "mobilellm_jax.checkpoints.store.write_manifest", side_effect=OSError(28, "full")
    )
    with pytest.raises(UserError, match="step 2 was not saved.*full"), failure:
        _save(tmp_path, 2, keep_last=1)
    assert _restore(tmp_path).step == 1
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_a_folder_whose_name_only_looks_like_a_step_is_left_alone(tmp_path):
    _save(tmp_path, 1)
    for name in ("007", "8 ", "\u0669"):  # the last one is a nine in Arabic
        (tmp_path / "checkpoints" / name).mkdir()
    assert _restore(tmp_path).step == 1
    assert not (tmp_path / "checkpoints_damaged").exists()


def test_saving_the_restored_step_again_does_nothing(tmp_path):
    _save(tmp_path, 5)
    before = (tmp_path / "checkpoints" / "5" / "manifest.json").stat().st_mtime_ns
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        faults.restore(checkpoints)
        checkpoints.save(5, **faults.state(5))
    assert (tmp_path / "checkpoints" / "5" / "manifest.json").stat().st_mtime_ns == before


def test_a_step_that_is_not_the_newest_is_refused(tmp_path):
    _save(tmp_path, 5, 6)
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        assert faults.restore(checkpoints, step=5).step == 5
        with pytest.raises(UserError, match="already has step 6"):
            checkpoints.save(6, **faults.state(6))


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_last": 1, "keep_every": 0}])
def test_keeping_nothing_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="= 0: use 1 or more"):
        Checkpoints(tmp_path, **options)


# What is of something else is refused.


def test_another_model_is_refused_with_its_differences(tmp_path):
    _save(tmp_path, 1)
    like = faults.state(0)
    other = dataclasses.replace(faults.CONFIG, num_layers=3, rope_theta=5e5)
    with (
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
        pytest.raises(UserError, match="model.num_layers is 1 there, 3 here; model.rope_theta"),
    ):
        checkpoints.restore(
            config=other, params_like=like["params"], opt_state_like=like["opt_state"]
        )
    assert _steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("item", "change", "message"),
    [
        ("params", {"a": jnp.zeros(999)}, r"a is float32\[1000\] there, float32\[999\] here"),
        ("params", {"a": jnp.zeros(1000, jnp.bfloat16)}, r"there, bfloat16\[1000\] here"),
        ("params", {"z": jnp.zeros(1)}, r"z is nothing there"),
        ("opt_state", None, r"0 is float32\[1000\] there, nothing here"),
    ],
)
def test_arrays_of_another_shape_dtype_or_name_are_refused(tmp_path, item, change, message):
    _save(tmp_path, 1)
    likes = {name: faults.state(0)[name] for name in ("params", "opt_state")}
    likes[item] = (likes[item] | change) if change else ()
    with (
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
        pytest.raises(UserError, match=message),
    ):
        checkpoints.restore(
            config=faults.CONFIG,
            params_like=likes["params"],
            opt_state_like=likes["opt_state"],
        )


def test_of_many_differences_five_are_listed_and_the_others_counted(tmp_path):
    _save(tmp_path, 1)
    like = faults.state(0)
    more = {f"z{number}": jnp.zeros(1) for number in range(8)}
    with (
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
        pytest.raises(UserError, match=r"z4 is nothing there, float32\[1\] here; and 3 more;"),
    ):
        checkpoints.restore(
            config=faults.CONFIG,
            params_like=like["params"] | more,
            opt_state_like=like["opt_state"],
        )


# Parameters only, and reading without a run.


def test_loading_takes_a_workdir_its_checkpoints_or_one_step(tmp_path, params, monkeypatch):
    model_bytes = train_small_tokenizer(tmp_path / "tokenizer.model")
    save_params(tmp_path / "run", CONFIG, params, model_bytes)
    (tmp_path / "best").symlink_to(tmp_path / "run" / "checkpoints" / "0")
    monkeypatch.chdir(tmp_path)
    for path in ("run", tmp_path / "run" / "checkpoints", "run/checkpoints/0", "best"):
        saved = load_checkpoint(path)
        assert (saved.config, saved.tokenizer.model_bytes) == (CONFIG, model_bytes)
        chex.assert_trees_all_equal(saved.params, params, strict=True)


def test_documents_begin_with_bos_unless_the_metadata_says_otherwise(tmp_path, params):
    for name, metadata, bos in (("a", None, True), ("b", {"bos": False}, False)):
        save_params(tmp_path / name, CONFIG, params, metadata=metadata)
        assert load_checkpoint(tmp_path / name).prompt.begins_with_bos is bos


def test_the_folder_of_a_step_that_has_lost_its_params_is_called_damaged(tmp_path, params):
    save_params(tmp_path, CONFIG, params)
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "params")
    with pytest.raises(UserError, match="0 is damaged: params/.*: missing"):
        load_checkpoint(tmp_path / "checkpoints" / "0")


def test_imported_params_restore_without_optimizer_state(tmp_path, params):
    save_params(tmp_path, CONFIG, params)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        restored = checkpoints.restore(
            config=CONFIG, params_like=params, opt_state_like=optax.adam(1.0).init(params)
        )
    assert (restored.step, restored.opt_state) == (0, None)
    chex.assert_trees_all_equal(restored.params, params, strict=True)
    assert load_checkpoint(tmp_path).tokenizer is None


def test_texts_begin_with_bos_unless_documents_are_known_not_to():
    for record, bos in (({}, True), ({"bos": True}, True), ({"bos": False}, False)):
        prompt, _ = read_record(record)
        assert prompt.begins_with_bos is bos


def test_stop_ids_outside_the_vocabulary_are_refused(tmp_path, params):
    save_params(tmp_path, CONFIG, params, metadata={"stop_ids": [2, CONFIG.vocab_size]})
    with pytest.raises(UserError, match=r"metadata.json: stop_ids = \[2, .*of the vocabulary"):
        load_checkpoint(tmp_path)


def test_only_folders_named_by_a_number_are_steps(tmp_path):
    for name in ("5", "12", "05", "7.tmp", "-1", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "8").write_text("a file")
    assert sorted(list_steps(tmp_path)) == [5, 12]
    assert list_steps(tmp_path / "nowhere") == []


def test_importing_never_adds_to_a_run(tmp_path, params):
    save_params(tmp_path, CONFIG, params)
    with pytest.raises(UserError, match="already has step 0"):
        save_params(tmp_path, CONFIG, params)


def test_loading_skips_damaged_steps_but_not_for_the_optimizer(tmp_path, params, caplog):
    with Checkpoints(tmp_path, keep_last=5) as checkpoints:
        for step in (1, 2, 3):
            state = {"params": params, "opt_state": params, "metadata": METADATA | {"mark": step}}
            checkpoints.save(step, **state, tokenizer=None)
    _flip(_data_file(tmp_path, 3))
    _flip(_data_file(tmp_path, 2, "opt_state"))
    saved = load_checkpoint(tmp_path)
    chex.assert_trees_all_equal(saved.params, params)
    assert saved.provenance.step == 2
    assert "CHECKPOINT DAMAGED" in caplog.text
    with pytest.raises(UserError, match="is damaged: params/"):
        load_checkpoint(tmp_path / "checkpoints" / "3")
    assert _steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("path", ["", "nowhere", "checkpoints/7"])
def test_loading_from_where_nothing_is_says_what_to_give(tmp_path, path):
    with pytest.raises(UserError, match="no checkpoint here; use a run's workdir"):
        load_checkpoint(tmp_path / path)


def test_loading_params_that_do_not_make_their_model_is_refused(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(UserError, match="params does not fit: a is float32.* there, nothing here"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {}, "arrays": []}', "[" * 9999, ""])
def test_metadata_of_someone_else_is_refused(tmp_path, params, content):
    save_params(tmp_path, CONFIG, params)
    folder = tmp_path / "checkpoints" / "0"
    (folder / "metadata.json").write_text(content)
    write_manifest(folder, 0)
    with pytest.raises(UserError, match="metadata.json is not the metadata"):
        load_checkpoint(tmp_path)
