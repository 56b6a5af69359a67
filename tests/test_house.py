"""The house: pins, light imports, rooms and the arrows between them."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mobilellm_jax"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORT_SECONDS = 2.0  # of the bare package; JAX alone takes one on a slow core
# Distributions whose modules carry another name.
MODULES = {
    "orbax-checkpoint": "orbax",
    "absl-py": "absl",
    "protobuf": "google",
    "llama-cpp-python": "llama_cpp",
}
EXTRAS = ["torch", "executorch", "gguf", "litert", "test", "data", "dev"]


def core_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]


def extra_requirements(extra):
    found = [Requirement(text) for text in PYPROJECT["project"]["optional-dependencies"][extra]]
    return [requirement for requirement in found if requirement.name != "mobilellm_jax"]


def run_without_backends(program):
    """Output of a program that may import JAX, but whose every use of a device is an error."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "there_is_no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_modules(paths):
    """Top-level names of everything imported anywhere in `paths`."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names


def test_core_requirements_are_exact_pins():
    for requirement in core_requirements():
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_exact_pins(extra):
    for requirement in extra_requirements(extra):
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_one_jax(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = [
        str(r.specifier)
        for r in core_requirements()
        if r.name == "jax" and r.marker.evaluate(environment)
    ]
    assert pins == ["==0.10.2" if python == "3.11" else "==0.11.2"]


def test_the_tests_run_on_the_pinned_core():
    pinned = [r for r in core_requirements() if r.marker is None or r.marker.evaluate()]
    installed = {r.name: importlib.metadata.version(r.name) for r in pinned}
    assert [
        f"{r.name} {installed[r.name]}" for r in pinned if installed[r.name] not in r.specifier
    ] == []


def test_pyproject_takes_its_dependencies_from_requirements_txt():
    assert "dependencies" in PYPROJECT["project"]["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {
        "file": ["requirements.txt"]
    }


def test_every_import_is_a_declared_dependency_and_every_core_pin_is_used():
    core = {MODULES.get(r.name, r.name) for r in core_requirements()}
    extras = {
        MODULES.get(r.name, r.name.replace("-", "_"))
        for extra in EXTRAS
        for r in extra_requirements(extra)
    }
    own = {"mobilellm_jax"} | set(sys.stdlib_module_names)
    package = imported_modules(PACKAGE.rglob("*.py")) - own
    tests = imported_modules((ROOT / "tests").rglob("*.py")) - own
    assert package - core - extras == set()
    assert core - package - tests == set()


def test_importing_the_package_starts_no_backend_and_is_quick():
    seconds = float(
        run_without_backends(
            "import sys, time\n"
            "start = time.perf_counter()\n"
            "import mobilellm_jax\n"
            "print(time.perf_counter() - start)\n"
            "for name in ('torch', 'transformers', 'tensorflow'):\n"
            "    assert name not in sys.modules, name\n"
        )
    )
    assert seconds < IMPORT_SECONDS


@pytest.mark.parametrize("module", ["training.trainer", "cli"])
def test_training_loads_no_other_framework_and_starts_no_backend(module):
    run_without_backends(
        f"import sys, mobilellm_jax.{module}\n"
        "for name in ('torch', 'transformers', 'tensorflow', 'datasets', 'matplotlib'):\n"
        "    assert name not in sys.modules, name\n"
    )


def test_a_use_of_a_device_would_be_noticed():
    with pytest.raises(AssertionError, match="Unable to initialize backend"):
        run_without_backends("import jax, mobilellm_jax\njax.numpy.zeros(1)")


# Room -> the rooms that it may import, from the ground up: an arrow runs to a line above only. A
# room is a folder of the package or a module at its top.
ARROWS = {
    "errors": "",
    "interrupts": "",
    "tables": "",
    "storage": "errors interrupts",
    "model": "errors",
    "machine": "errors interrupts",
    "tokenizers": "errors storage",
    "objectives": "model",
    "model_bundle": "errors model tokenizers",
    "data": "errors storage tables tokenizers",
    "huggingface": "errors machine model model_bundle storage tokenizers",
    "checkpoints": "errors huggingface interrupts model model_bundle storage tokenizers",
    "inference": "checkpoints errors machine model model_bundle storage tokenizers",
    "evaluation": "checkpoints data errors machine model model_bundle objectives storage tables",
    "export": "checkpoints errors huggingface inference machine model model_bundle storage tables "
    "tokenizers",
    "training": "checkpoints data errors evaluation machine model objectives storage tables "
    "tokenizers",
    "planning": "errors machine model storage tables training",
    "cli": "data errors evaluation export inference interrupts machine planning storage training",
    "__main__": "cli interrupts",
}
PHONES_AND_TORCH = {
    *("torch", "transformers", "executorch", "pytorch_tokenizers", "gguf", "llama_cpp"),
    *("litert_torch", "litert_lm", "litert_lm_builder", "ai_edge_litert"),
}


def module_names(tree, package):
    """Dotted names of all modules that a syntax tree imports, by statement or by string.

    Args:
      package: parts of the package that the file is in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\Amobilellm_jax(?:\.\w+)+\Z", node.value)


def broken_rules(package):
    """The imports that the table forbids, in words; `package` is the folder of the package."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts == ("__init__.py",):
            continue
        room = parts[0].removesuffix(".py")
        if room not in ARROWS:
            found.append(f"{'/'.join(parts)} is in no room of the table")
            continue
        for name in set(module_names(ast.parse(path.read_text()), ("mobilellm_jax", *parts[:-1]))):
            target = name.split(".")[1] if name.startswith("mobilellm_jax.") else None
            if target in (None, room, "__version__"):
                continue
            if target not in ARROWS[room].split():
                found.append(f"{'/'.join(parts)} imports {name}")
    return found


def test_rooms_import_only_what_stands_below_them():
    assert broken_rules(PACKAGE) == []
    assert {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - set(ARROWS) <= {
        "__init__",
        "__pycache__",
    }


def test_the_table_of_rooms_has_no_circle():
    below = set()
    for room, allowed in ARROWS.items():
        assert set(allowed.split()) <= below, room
        below.add(room)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("model/presets.py", "from mobilellm_jax import loading", "imports mobilellm_jax.loading"),
        ("model/presets.py", "from mobilellm_jax import data", "imports mobilellm_jax.data"),
        ("evaluation/report.py", "from mobilellm_jax.training.trainer import train", "trainer"),
        ("evaluation/report.py", "from ..training import trainer", "mobilellm_jax.training"),
        ("data/x.py", "importlib.import_module('mobilellm_jax.export.pytorch')", "export.pytorch"),
        ("helpers.py", "", "helpers.py is in no room"),
        ("attic/old.py", "", "attic/old.py is in no room"),
    ],
)
def test_a_wrong_arrow_and_a_file_in_no_room_are_seen(tmp_path, file, line, said):
    copy = tmp_path / "mobilellm_jax"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / file).parent.mkdir(exist_ok=True)
    with (copy / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    broken = broken_rules(copy)
    assert broken and all(said in text for text in broken), broken


def test_torch_and_the_runtimes_of_phones_are_imported_by_exports_alone():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] != "export" and parts[:2] != ("huggingface", "remote_code"):
            assert imported_modules([path]) & PHONES_AND_TORCH == set(), path


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [("training.trainer", ["export", "huggingface", "inference"]), ("data.prepare", ["model"])],
)
def test_importing_a_room_loads_nothing_that_it_does_not_need(module, not_loaded):
    loaded = run_without_backends(
        f"import sys, mobilellm_jax.{module}\n"
        "print(*{n.split('.')[1] for n in sys.modules if n.startswith('mobilellm_jax.')})\n"
    ).split()
    assert set(loaded) & set(not_loaded) == set()


def test_what_the_recipes_tell_one_to_run_is_installed_or_comes_with_its_pip_install():
    """Programs are words before a flag or a file of the run: `tensorboard --logdir ...`."""
    said = [
        line
        for path in sorted((ROOT / "launch").glob("*.sh"))
        for line in path.read_text().splitlines()
        if line.lstrip().startswith("echo ") and ">&2" not in line
    ]
    assert any("loss.png" in line for line in said)
    programs = {word for line in said for word in re.findall(r"([a-z][\w-]*) --\w", line)}
    scripts = {script.name for script in importlib.metadata.entry_points(group="console_scripts")}
    core = {requirement.name for requirement in core_requirements()} | {"mobilellm_jax"}
    ours = {s.name for name in core for s in importlib.metadata.distribution(name).entry_points}
    assert programs <= (scripts & ours) | {"mobilellm", "make", "python"}


def tree_of_files(text):
    """Paths in the first code block of a text: the files of a folder are indented below it."""
    block = text.split("```")[1]
    paths, folders = set(), {}
    for line in block.splitlines():
        name = line.split("  ")[0].strip() if line.strip() else ""
        names = re.match(r"(\s*)([\w./]+)", line)
        if not names:
            continue
        depth, name = len(names[1]), names[2]
        folders = {d: f for d, f in folders.items() if d < depth}
        path = "".join(folders.values()) + name
        if name.endswith("/"):
            folders[depth] = name
        elif name.endswith(".py"):
            paths.add(path)
    return paths


def test_the_architecture_page_names_every_file_in_its_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert tree_of_files(text) == {path for path in files if not path.endswith("__init__.py")}
