"""What the training step is for a TPU once XLA has compiled it: what was won there stays won.

The steps want XLA's compiler for TPUs (`make test-plans`); no TPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled_tpu import padded_arrays
from benchmarks.compiled_traffic import SEQUENCE_LENGTH
from mobilellm_jax.planning.hlo import parse

ROOT = Path(__file__).parents[1]
ROWS, VOCABULARY = 4, 32_000
SETTINGS = {"dots": "remat=dots", "attention": "remat=attention", "full": "remat=full"}
COMPILE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from benchmarks.compiled_tpu import figures
from benchmarks.compiled_traffic import compile_step
for name, setting in json.loads(sys.argv[1]).items():
    compiled = compile_step("125m", int(sys.argv[2]), [setting], "v5e:2x2")
    open(f"{sys.argv[3]}/{name}.hlo", "w").write(compiled.as_text())
    found = json.dumps(figures(compiled, "125m", int(sys.argv[2])))
    open(f"{sys.argv[3]}/{name}.json", "w").write(found)
"""


def test_padding_is_counted_along_the_two_minor_dimensions():
    """By hand: tiles of 8 x 128, the last of the tile along the minor-most dimension."""
    shape = "(bf16[30,4,9,2048,64]{4,3,2,1,0:T(8,128)(2,1)}, f32[3,576]{1,0:T(8,128)}, s32[])"
    assert list(padded_arrays(shape)) == [
        ("bf16", (30, 4, 9, 2048, 64), 30 * 4 * 9 * 2048 * 64 * 2, 30 * 4 * 9 * 2048 * 128 * 2),
        ("f32", (3, 576), 3 * 576 * 4, 8 * 640 * 4),
    ]
    transposed = "bf16[4,2048,576]{1,2,0:T(8,128)(2,1)}"
    assert next(padded_arrays(transposed))[2:] == (4 * 2048 * 576 * 2,) * 2


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Name -> (text of the compiled program, figures)."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("XLA's compiler for TPUs is not installed: pip install '.[tpu]'")
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "forward"), [("dots", 30), ("attention", 30), ("full", 60)])
def test_splash_runs_once_each_way_where_its_residuals_are_kept(steps, name, forward):
    found = steps[name][1]["splash_kernels"]
    assert found == {"fwd": forward, "dq": 30, "dkv": 30}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_is_updated_in_place_and_hardly_padded(steps, name):
    found = steps[name][1]
    assert found["donated"] > 0.999
    assert found["state_padding"] < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_logits_of_the_whole_batch_never_exist(steps, name):
    computations, _ = parse(steps[name][0])
    largest = max(
        size
        for computation in computations.values()
        for instruction in computation.values()
        for _, dims, size in instruction.arrays
        if VOCABULARY in dims
    )
    assert largest <= 64 * 1024 * 1024 * 4 < ROWS * SEQUENCE_LENGTH * VOCABULARY * 4


@pytest.mark.slow
def test_what_is_kept_is_what_was_counted_by_hand(steps):
    """346 KB per token as on GPUs, and the normaliser (1 KB); without products 35 KB for the input
    of each block and 35 KB for attention's result."""
    assert steps["dots"][1]["kept_per_token"] == pytest.approx(347e3, rel=0.01)
    assert steps["attention"][1]["kept_per_token"] == pytest.approx(70e3, rel=0.03)
    assert steps["full"][1]["kept_per_token"] == pytest.approx(35e3, rel=0.03)
    assert steps["dots"][1]["kept_padding"] < 0.11  # attention's result has 64 of 128 lanes
