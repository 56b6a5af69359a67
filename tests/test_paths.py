"""Paths are local: a URL, ~ or nothing is refused wherever a path is taken, and nothing is made."""

import argparse
import importlib
import inspect
import os
import pkgutil
import re
from pathlib import Path

import pytest

import mobilellm_jax
from mobilellm_jax import cli
from mobilellm_jax.data.rows import BadRow
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.training.failures import Diverged
from mobilellm_jax.training.run_config import default_config
from mobilellm_jax.training.run_data import parse_mixture

PATHS = {"DIR", "FILE", "FILES"}
OTHER_TEXT = {"TEXT", "NAME", "FIELD", "DTYPE", "HOST:PORT"}


def flags_of(verb):
    """The flags of a verb that take a value which is no number and no choice."""
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
    return [
        action
        for action in parser._actions
        if action.nargs != 0 and not action.choices and action.type not in (int, float)
    ]


def test_every_flag_says_by_its_metavar_whether_it_takes_a_path():
    for verb in cli.VERBS:
        for action in flags_of(verb):
            assert action.metavar in PATHS | OTHER_TEXT, (verb, action.option_strings)


PATH_FLAGS = [
    (verb, action.option_strings[0])
    for verb in cli.VERBS
    for action in flags_of(verb)
    if action.metavar in PATHS
]


# What `Path` makes another place of, or nothing at all -> how it is refused.
LONG = "x" * 300
REFUSED = {
    "s3://bucket/x": "s3://bucket/x: only local files and folders",
    "": "the path is empty",
    "~/x": f"~/x: only shells replace ~, .*write {os.path.expanduser('~/x')}",
    LONG: "the name is too long",
}


@pytest.mark.parametrize("path", REFUSED)
@pytest.mark.parametrize(("verb", "flag"), PATH_FLAGS)
def test_every_path_flag_refuses_what_is_no_path_here(
    verb, flag, path, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, flag, path])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert re.search(f"argument {flag}: .*{REFUSED[path]}", message)
    assert list(tmp_path.iterdir()) == []


def test_the_flags_with_paths_are_found():
    assert {flag for _, flag in PATH_FLAGS} == {
        *("--input", "--valid_input", "--output", "--tokenizer", "--config", "--workdir"),
        *("--checkpoint", "--data", "--text", "--prompt_file"),
    }


# Values for the arguments that a function cannot do without.
NEEDED = {
    "config": default_config(),
    "params": {},
    "inputs": ["text.txt"],
    "documents": [],
    "vocab_size": 300,
    **dict.fromkeys(("keep_last", "resume_step", "total_steps", "tokens_per_step"), 1),
    **dict.fromkeys(("flops_per_token", "peak_flops_total"), 1.0),
}
# They open what is there and make nothing, or get paths of functions that look first.
EXEMPT = {
    "storage.hashing.sha256_file",
    "export.executorch.runtime.ExecuTorchRuntime",
    "export.transformers_runtime.TransformersRuntime",
    "export.formats.Format",
    "data.sources.iter_documents",
    "data.sources.Source",
    "storage.untrusted.refuse_lfs_pointer",
}


EXCEPTIONS = {UserError, BadRow, Diverged}


def public_functions():
    """Dotted name -> function, class or class method of every module."""
    found = {}
    for module in pkgutil.walk_packages(mobilellm_jax.__path__, "mobilellm_jax."):
        if "remote_code" in module.name or module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.name:
                continue
            dotted = f"{module.name.removeprefix('mobilellm_jax.')}.{name}"
            found[dotted] = value
            for method, kind in vars(value).items() if inspect.isclass(value) else ():
                if isinstance(kind, classmethod):
                    found[f"{dotted}.{method}"] = getattr(value, method)
    return {name: value for name, value in found.items() if name not in EXEMPT}


def path_arguments():
    """(dotted name, function, argument) of all that take text or a path."""
    for name, function in public_functions().items():
        if not callable(function) or function in EXCEPTIONS:
            continue
        for argument in inspect.signature(function).parameters.values():
            hint = str(argument.annotation)
            if re.search("str.*Path", hint) and "Callable" not in hint:
                yield name, function, argument


@pytest.mark.parametrize("path", REFUSED)
def test_every_function_refuses_what_is_no_path_here(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = set()
    for name, function, argument in path_arguments():
        parameters = inspect.signature(function).parameters.values()
        given = {p.name: NEEDED.get(p.name, "absent") for p in parameters if p.default is p.empty}
        if name == "data.prepare.prepare" and argument.name != "tokenizer":
            given["vocab_size"] = 300
        several = re.search("Sequence|Iterable", str(argument.annotation))
        given[argument.name] = [path] if several else path
        refused = pytest.raises(UserError, match=REFUSED[path])
        with refused, function(**given):  # some look when they are entered
            pass
        found.add(name.rpartition(".")[2])
    assert {"load", "load_torch", "save_hf", "prepare", "train", "open"} <= found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "runs/a",
        "./gs:/bucket",
        "C:/data",
        "c:\\data",
        "configs/a.py:h100-8",
        "hf:org/name",
        "a:b",
        "./~/a",
        "a/~",
    ],
)
def test_local_paths_stay_what_they_are(path):
    assert local_path(path) == Path(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file:///home/me/a%20b", "use the plain path, /home/me/a b"),
        ("file://localhost/home/me", "use the plain path, /home/me"),
        ("hf://datasets/org/name", "as hf:NAME"),
        ("https://host/file.txt", "download it first"),
        ("GS://bucket", "not gs://"),
        ("abfss://a@b/c", "not abfss://"),
        (Path("gs://bucket/run"), "not gs://.* ./gs:/"),
    ],
)
def test_a_url_is_refused_with_what_to_write_instead(path, message):
    with pytest.raises(UserError, match=message):
        local_path(path)


def test_the_key_of_the_config_is_named():
    with pytest.raises(UserError, match="config.data.path: gs://b/x: only local"):
        parse_mixture("data/a=0.5,gs://b/x=0.5")
    assert parse_mixture("data/a=0.5,./gs:/b=0.5") == [("data/a", 0.5), ("./gs:/b", 0.5)]
