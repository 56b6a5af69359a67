"""`config.data.path`: names and weights, and datasets that are the same."""

import contextlib
import shutil

import pytest
from prepared import DOCUMENTS, make_documents, run_prepare, write_lines

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.training.run_config import default_config
from mobilellm_jax.training.run_data import RunData, parse_mixture


@pytest.mark.parametrize(
    ("folders", "path", "expected"),
    [
        ([], "a", [("a", 1.0)]),
        ([], "a=0.7,b/c=3", [("a", 0.7), ("b/c", 3.0)]),
        (["v"], "v=2", [("v", 2.0)]),
        (["v=2"], "v=2", [("v=2", 1.0)]),
        (["v=2"], "v=2=0.5,b=1", [("v=2", 0.5), ("b", 1.0)]),
        (["v=2", "v"], "v=2=1", [("v=2", 1.0)]),
        (["date=1/v", "date"], "date=1/v", [("date=1/v", 1.0)]),
        (["date=1/v", "date"], "date=1/v=3,b", [("date=1/v", 3.0), ("b", 1.0)]),
        (["a,b"], "a,b", [("a,b", 1.0)]),
        (["a=1,b=2"], "a=1,b=2", [("a=1,b=2", 1.0)]),
    ],
)
def test_an_existing_folder_is_found_by_its_whole_name(tmp_path, folders, path, expected):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(tmp_path):
        assert parse_mixture(path) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("v=2", "'v=2' and 'v' are folders both; write 'v=2=1' for the first, or rename"),
        ("", "is empty"),
        ("a,,b", "'' in 'a,,b' names no folder"),
        ("a,", "names no folder"),
        ("=2", "'=2' in '=2' names no folder"),
        ("a=", "'a=' in 'a=' has no number"),
        ("a=x,b=1", "'a=x' in 'a=x,b=1' has no number behind '='; write DIR=0.7,DIR=0.3"),
    ],
)
def test_what_is_no_folder_or_could_be_two_is_refused(tmp_path, path, message):
    for folder in ("v", "v=2"):
        (tmp_path / folder).mkdir()
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=message):
        parse_mixture(path)


def test_the_same_dataset_twice_is_refused(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl")
    run_prepare([lines], tmp_path / "a", vocab_size=300)
    other = write_lines(tmp_path / "b.jsonl", make_documents(20, seed=3) + DOCUMENTS)
    run_prepare([other], tmp_path / "b", tokenizer=tmp_path / "a" / "tokenizer.model")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    config = default_config()
    model = ModelConfig(**PRESETS["125m"].to_dict() | {"vocab_size": 300})
    with contextlib.chdir(tmp_path):
        for again in ("a", "./a", "link", "copy"):
            config.data.path = f"a=0.5,b=1,{again}=0.5"
            with pytest.raises(UserError, match=f"a and {again} hold the same records; name one"):
                RunData(config, model)
        config.data.path = "a=0.5,b=0.5"
        assert [weight for _, weight in RunData(config, model).datasets] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["v=2", "a,b", "a,b/c"])
def test_an_output_that_the_path_could_not_name_is_refused_at_once(tmp_path, name):
    lines = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="could not name this --output"):
        run_prepare([lines], tmp_path / name, vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
