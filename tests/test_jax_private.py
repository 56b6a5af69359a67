"""JAX's private parts: one file uses them, these names, and they behave as it is assumed there.

Run with each supported version of JAX before its pin is raised.
"""

import ast
import inspect
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from jax._src import clusters, distributed

from mobilellm_jax.machine import jax_private

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mobilellm_jax"
PRIVATE = PACKAGE / "machine" / "jax_private.py"
# Modules that no file may import, but for one.
KEPT = {
    "jax._src": PRIVATE,
    "jaxlib": None,
    "unittest.mock": None,
    "ctypes": PACKAGE / "export" / "gguf" / "runtime.py",
}


def used_names(tree):
    """Dotted names of all that a file imports, and of all that it reads by attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def offenders(tree):
    return {
        kept
        for kept in KEPT
        for name in used_names(tree)
        if name == kept or name.startswith(f"{kept}.")
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_private_parts_mocks_and_ctypes_stay_where_they_are_allowed(path):
    found = offenders(ast.parse(path.read_text()))
    assert found == {kept for kept, allowed in KEPT.items() if allowed == path}


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("import jax._src.xla_bridge", "jax._src"),
        ("from jax._src import distributed", "jax._src"),
        ("from jax import _src", "jax._src"),
        ("import jax\njax._src.core.Tracer", "jax._src"),
        ("from jaxlib import xla_client", "jaxlib"),
        ("from unittest import mock", "unittest.mock"),
        ("import unittest.mock as m", "unittest.mock"),
        ("def f():\n  from ctypes import CDLL", "ctypes"),
    ],
)
def test_offenders_are_found(line, kept):
    assert offenders(ast.parse(line)) == {kept}


def test_these_are_all_the_private_names():
    tree = ast.parse(PRIVATE.read_text())
    imported = {name for name in used_names(tree) if name.startswith("jax.")}
    assert imported == {"jax._src.clusters", "jax._src.distributed"}
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    assert {ast.unparse(node) for node in nodes if id(node) not in inner} == {
        "distributed.global_state.client",
        "clusters.ClusterEnv.auto_detect_unset_distributed_params",
    }


def test_the_names_exist_with_these_arguments():
    assert hasattr(distributed.global_state, "client")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    assert list(inspect.signature(detect).parameters) == [
        "coordinator_address",
        "num_processes",
        "process_id",
        "local_device_ids",
        "cluster_detection_method",
        "initialization_timeout",
    ]


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": "1234",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, (None, None, None, None)), (SLURM, ("node3:1234", 2, 1, [0]))],
)
def test_processes_are_detected_or_not(environment, found, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert jax_private.detected_processes(None, None, 1) == found


def run_connected(body):
    """Runs `body` in a process that JAX has connected with itself, as with the others of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = f"""
import time
import jax
from jax.experimental import multihost_utils
from mobilellm_jax.machine import jax_private
jax.distributed.initialize({address!r}, 1, 0)
store = jax_private.store()
{textwrap.dedent(body)}
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_store_keeps_lists_and_waits_and_its_errors_are_those_of_jax():
    run_connected("""
    for value in ("a", "b"):
        store.key_value_set("folder/key/1", value, allow_overwrite=True)
    assert store.blocking_key_value_get("folder/key/1", 1000) == "b"
    assert store.key_value_dir_get("folder/key/") == [("folder/key/1", "b")]
    assert store.key_value_dir_get("folder/other/") == []
    store.wait_at_barrier("barrier", 1000)
    try:
        store.blocking_key_value_get("nothing", 10)
    except jax.errors.JaxRuntimeError:
        pass
    else:
        raise AssertionError("no error")
""")


def test_the_notice_makes_jax_find_a_step_to_stop_at():
    run_connected("""
    assert not multihost_utils.reached_preemption_sync_point(1)
    store.key_value_set(jax_private.PREEMPTION_NOTICE, "2026-01-01T00:00:00+00:00",
                        allow_overwrite=True)
    for step in range(2, 500):
        if multihost_utils.reached_preemption_sync_point(step):
            break
        time.sleep(0.02)
    else:
        raise AssertionError("no step")
""")


def test_devices_of_a_program_that_has_used_jax_before_are_noticed():
    program = (
        "import jax\n"
        "from mobilellm_jax.machine.processes import _has_devices\n"
        "assert not _has_devices() and not jax.distributed.is_initialized()\n"
        "jax.devices()\n"
        "assert _has_devices() and not jax.distributed.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
