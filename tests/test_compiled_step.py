"""What the training step is for a GPU once XLA has compiled it: what was won there stays won.

Needs XLA's compiler for GPUs (`make test-plans`); no GPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled_traffic import SEQUENCE_LENGTH, kernels
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.hlo import parse

ROOT = Path(__file__).parents[1]
ROWS, CHIPS = 8, 8
TOKENS = ROWS * SEQUENCE_LENGTH
SETTINGS = {
    "scanned": ("125m", ["remat=dots"]),
    "unrolled": ("125m", ["remat=none", "unroll_layers=true"]),
    "shared": ("125m_ls", ["remat=dots"]),
}
COMPILE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from benchmarks.compiled_traffic import compile_step
for name, (preset, settings) in json.loads(sys.argv[1]).items():
    compiled = compile_step(preset, int(sys.argv[2]), settings)
    open(f"{sys.argv[3]}/{name}.hlo", "w").write(compiled.as_text())
    sizes = compiled.memory_analysis()
    found = {key: getattr(sizes, f"{key}_size_in_bytes") for key in ("temp", "alias")}
    open(f"{sys.argv[3]}/{name}.json", "w").write(json.dumps(found))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="XLA's compiler for GPUs is not installed: pip install '.[cuda]'",
    ),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Name -> (text of the compiled program, sizes)."""
    folder = tmp_path_factory.mktemp("compiled")
    subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(SETTINGS), str(ROWS), str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
        timeout=1200,
    )
    return {
        name: (
            (folder / f"{name}.hlo").read_text(),
            json.loads((folder / f"{name}.json").read_text()),
        )
        for name in SETTINGS
    }


def moved(text, kind):
    """Bytes per token that kernels of a kind move in a step."""
    return sum(k.times * k.bytes for k in kernels(text) if k.kind == kind) / TOKENS


def arrays(text):
    computations, _ = parse(text)
    return {
        array
        for computation in computations.values()
        for instruction in computation.values()
        for array in instruction.arrays
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_is_cudnn_once_forward_and_once_backward(steps, name):
    text, _ = steps[name]
    ran = {"forward": 0, "backward": 0}
    for kernel in kernels(text):
        if kernel.kind == "attention":
            ran["backward" if "transpose(" in kernel.where else "forward"] += kernel.times
    depth = PRESETS[SETTINGS[name][0]].depth
    assert ran == {"forward": depth, "backward": depth}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_is_updated_in_place(steps, name):
    _, sizes = steps[name]
    assert sizes["alias"] >= 12 * 124_635_456  # fp32 weights and two moments


@pytest.mark.parametrize("name", SETTINGS)
def test_the_logits_of_the_whole_batch_never_exist(steps, name):
    largest = max(size for _, dims, size in arrays(steps[name][0]) if 32_000 in dims)
    assert largest <= 64 * 1024 * 1024 * 4 < TOKENS * 32_000 * 2


@pytest.mark.parametrize("name", ["scanned", "shared"])
def test_no_activation_is_kept_in_fp32(steps, name):
    """Of all stacks over layers only the normalisers of attention are [layers, B, heads, T]."""
    kept = {
        (dtype, dims)
        for dtype, dims, _ in arrays(steps[name][0])
        if dims[:2] == (30, ROWS) and SEQUENCE_LENGTH in dims
    }
    in_fp32 = {dims for dtype, dims in kept if dtype == "f32"}
    assert in_fp32 == {(30, ROWS, 9, SEQUENCE_LENGTH)}
    assert ("bf16", (30, ROWS, SEQUENCE_LENGTH, 1536)) in kept


def test_a_scan_keeps_and_moves_what_products_and_attention_give(steps):
    """By hand, per token and block: x, q, k, v, attention's result and its projection, gate and up
    are 5,760 bf16 values, 346 KB over 30 blocks; the rest is gradients, weights and logits."""
    text, sizes = steps["scanned"]
    assert sizes["temp"] / TOKENS < 346e3 + 60e3
    assert moved(text, "other") < 4.6e6


def test_unrolled_layers_move_a_third_less(steps):
    text, sizes = steps["unrolled"]
    assert sizes["temp"] / TOKENS < 560e3
    assert moved(text, "other") < 0.72 * moved(steps["scanned"][0], "other")


def test_layer_sharing_costs_no_memory_for_weights_and_no_optimizer_work(steps):
    (plain, plain_sizes), (shared, shared_sizes) = steps["scanned"], steps["shared"]
    assert shared_sizes["alias"] == plain_sizes["alias"]

    def optimizer(text):
        return sum(k.times * k.bytes for k in kernels(text) if "/optimizer/" in k.where)

    assert optimizer(plain) > 12 * 124_635_456
    assert optimizer(shared) == pytest.approx(optimizer(plain), rel=0.01)


def test_every_matmul_is_in_bf16(steps):
    """Operands of 16 bits; what they sum up to may be fp32."""
    dots = re.findall(r" = (\w+)\[[\d,]*\]\S* dot\(%([\w.\-]+), %([\w.\-]+)\)", steps["scanned"][0])
    computations, _ = parse(steps["scanned"][0])
    types = {
        computation[name].arrays[0][0]
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode == "dot"
        for name in instruction.operands
    }
    assert dots and types == {"bf16"}
