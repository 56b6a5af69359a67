"""The plans in docs/plans, compiled again: memory and collectives must not have grown.

Needs the compilers of TPUs and GPUs (`make test-plans`); no TPU or GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The layer-shared ones differ in depth only and would take the suite over its ten minutes.
PLANS = sorted((ROOT / "docs" / "plans").glob("[hv]*-*/*[bm].json"))
COMPILERS = {"v5": ("libtpu", "tpu"), "h1": ("jax_cuda13_plugin", "cuda")}
MEMORY_GROWTH = 1.05
TRAFFIC_TOLERANCE = 0.01

# Each in a process of its own: one process loads one kind of compiler.
COMPILE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, plan_dict
from mobilellm_jax.planning.topologies import topology
from mobilellm_jax.training.run_config import load_config
hardware = topology(sys.argv[1])
for preset in sys.argv[2:]:
    plan = make_plan(load_config(f"configs/{preset}.py:{sys.argv[1]}"), hardware, 2048)
    print("PLAN", preset, json.dumps(plan_dict(plan, Budget(1e12, None))), flush=True)
"""


def traffic(plan: dict) -> dict[str, float]:
    """Bytes that a chip sends, by mesh axis."""
    totals = {}
    for collective in plan["collectives"]:
        axes = "+".join(collective["axes"])
        totals[axes] = totals.get(axes, 0) + collective["sent_per_chip"]
    return totals


@pytest.fixture(scope="session")
def compiled():
    """Compiles all plans of a platform at once, when the first of them is asked for."""
    done = {}

    def compile(platform):
        if platform not in done:
            presets = [path.stem for path in PLANS if path.parent.name == platform]
            result = subprocess.run(
                [sys.executable, "-c", COMPILE, platform, *presets],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                capture_output=True,
                text=True,
                timeout=3000,
            )
            assert result.returncode == 0, result.stderr[-3000:]
            lines = [line.split(" ", 2) for line in result.stdout.splitlines()]
            done[platform] = {x[1]: json.loads(x[2]) for x in lines if x[0] == "PLAN"}
        return done[platform]

    return compile


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_plan_needs_no_more_than_when_it_was_written(path, compiled):
    module, extra = COMPILERS[path.parent.name[:2]]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"its compiler is not installed: pip install '.[{extra}]'")
    budget = json.loads(path.read_text())
    now = compiled(path.parent.name)[path.stem]
    assert now["fits"]
    assert now["attention"] == budget["attention"] != "xla"
    assert now["memory"]["returned"] <= 0.001 * now["donated"]  # the metrics alone
    assert now["memory"]["total"] <= MEMORY_GROWTH * budget["memory"]["total"]
    for axes, sent in traffic(now).items():
        assert sent <= (1 + TRAFFIC_TOLERANCE) * traffic(budget).get(axes, 0) + 1e6, axes


MEMORY = """
import dataclasses, json
import jax
jax.config.update("jax_platforms", "cpu")
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, plan_dict, plan_text
from mobilellm_jax.planning.topologies import topology
from mobilellm_jax.training.run_config import load_config
hardware = topology("v5e:2x2")
for rows in (4, 1 << 14):
    config = load_config("configs/quickstart.py")
    config.mesh.data, config.train.global_batch_size = 4, 4 * rows
    plan = make_plan(config, hardware, config.model.max_seq_len)
    found = plan_dict(plan, Budget(1e12, None)), plan_text(plan, Budget(1e12, None))
    print("PLAN", json.dumps(found))
"""


@pytest.mark.slow
def test_a_tpu_holds_padded_arguments_and_the_program_and_refuses_too_large_a_batch():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("its compiler is not installed: pip install '.[tpu]'")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    (small, _), (large, text) = (json.loads(text) for word, text in lines if word == "PLAN")
    memory = small["memory"]
    assert small["fits"] and memory["padding"] > 0 and memory["program"] > 1e6
    # The state, in place, is all of the arguments but the batch; both as the compiler pads them.
    arguments = sum(memory[part] for part in ("weights", "optimizer", "batch", "padding"))
    assert 0 <= arguments - small["donated"] < 2 * memory["batch"] + 1e5
    assert not large["fits"] and large["memory"]["total"] is None
    assert "RESOURCE_EXHAUSTED" in large["refused"] and "DOES NOT FIT" in text


THEORY = """
import itertools, json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from mobilellm_jax.planning.collectives import expected_collectives, traffic_by_axes
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.topologies import topology
from mobilellm_jax.training.run_config import load_config, model_config
hardware = topology("h100:8")
meshes = [(8, 1, "step"), (1, 8, "step"), (1, 8, "layer")]
for preset, (data, fsdp, gather) in itertools.product(sys.argv[1:], meshes):
    config = load_config(f"configs/{preset}.py")
    config.mesh.update(data=data, fsdp=fsdp, gather=gather)
    config.train.global_batch_size = 16
    found = make_plan(config, hardware, 2048).collectives
    theory = expected_collectives(
        model_config(config), {"data": data, "fsdp": fsdp}, compute_dtype="bfloat16", gather=gather
    )
    sent, needed = (sum(traffic_by_axes(x).values()) for x in (found, theory))
    print("RATIO", json.dumps([preset, data, fsdp, gather, sent / needed]), flush=True)
"""


@pytest.mark.slow
def test_traffic_of_every_size_is_that_of_theory():
    """Data parallel, ZeRO and FSDP on 8 H100s: nothing is sent that need not be."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("its compiler is not installed: pip install '.[cuda]'")
    sizes = ["125m", "350m", "600m", "1b", "1.5b"]
    result = subprocess.run(
        [sys.executable, "-c", THEORY, *sizes],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    ratios = [json.loads(text) for word, text in lines if word == "RATIO"]
    assert len(ratios) == 3 * len(sizes)
    wrong = [ratio for ratio in ratios if abs(ratio[-1] - 1) > TRAFFIC_TOLERANCE]
    assert wrong == []
