"""The house: pins, light imports, a README that names every file."""

import ast
import importlib.metadata
import re
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


def run_python(program):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
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
        run_python(
            "import sys, time\n"
            "start = time.perf_counter()\n"
            "import mobilellm_jax\n"
            "print(time.perf_counter() - start)\n"
            "for name in ('torch', 'transformers', 'tensorflow'):\n"
            "    assert name not in sys.modules, name\n"
            "from jax._src import xla_bridge\n"
            "assert not xla_bridge._backends\n"
        )
    )
    assert seconds < IMPORT_SECONDS


@pytest.mark.parametrize("module", ["training.trainer", "cli"])
def test_training_loads_no_other_framework_and_starts_no_backend(module):
    run_python(
        f"import sys, mobilellm_jax.{module}\n"
        "for name in ('torch', 'transformers', 'tensorflow', 'datasets', 'matplotlib'):\n"
        "    assert name not in sys.modules, name\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
    )


def test_the_readme_names_every_file_of_the_package():
    readme = (ROOT / "README.md").read_text()
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    missing = [path for path in files if not re.search(rf"\b{re.escape(path.name)}\b", readme)]
    assert [str(path.relative_to(ROOT)) for path in missing] == []


def test_the_rooms_import_one_way():
    """The model knows nothing of data or training, and nobody but the command line of `cli`."""
    for path in PACKAGE.rglob("*.py"):
        inner = set(re.findall(r"mobilellm_jax\.(\w+)", "\n".join(import_lines(path))))
        room = path.relative_to(PACKAGE).parts[0]
        if room == "model":
            assert inner <= {"model", "errors"}, path
        if room == "data":
            assert inner <= {"data", "errors", "files"}, path
        if room not in ("cli.py", "__main__.py"):
            assert "cli" not in inner, path


def import_lines(path):
    return [line for line in path.read_text().splitlines() if re.match(r"\s*(import|from) ", line)]
