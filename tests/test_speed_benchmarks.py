"""The speed benchmarks: sides that do the same work, tables from files, failures named."""

import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from benchmarks.speed import attention, cases, gpu, loss, products, report, techniques
from benchmarks.speed.__main__ import main
from benchmarks.speed.columns import result_table
from benchmarks.speed.measure import Side, Workload, compare, run_alone
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.costs import train_flops_per_token
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.model.transformer import abstract_params
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.run_config import default_config

ROOT = Path(__file__).parents[1]
FIRST_LOSS = 1e-5  # relative, between jax and torch in fp32
LOSS_CURVE = 1e-4  # relative, over 50 steps in fp32
SAME_LOSS = 1e-5  # relative, sliced and whole
BF16_ATTENTION = 2e-2
RATES = 1e-6
NOT_ON_GPU_MACHINES = ("ml_collections", "grain", "array_record", "orbax")
TINY = (
    "--model", "num_layers=2", "embed_dim=64", "num_heads=4", "num_kv_heads=2", "head_dim=16",
    "ffn_dim=128", "vocab_size=256", "--batch_size", "2",
)  # fmt: skip
TINY_CONFIG = cases.model_config("125m", TINY[1:-2])


def run_benchmark(*arguments, blocked=None):
    """`python -m benchmarks.speed ...` in a process of its own, some packages missing."""
    paths = [str(ROOT)] if blocked is None else [str(blocked), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A `train` run of a tiny model where some packages cannot be imported."""
    folder = tmp_path_factory.mktemp("speed")
    blocked = folder / "blocked"
    blocked.mkdir()
    for name in NOT_ON_GPU_MACHINES:
        (blocked / f"{name}.py").write_text(
            f"raise ImportError('{name} is blocked', name='{name}')"
        )
    done = run_benchmark(
        "train", *TINY, "--sequence_length", 32, "--samples", 2, "--sides", "jax", "torch",
        "--output", folder / "train.json", blocked=blocked,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "train.json").read_text())


@pytest.mark.slow
def test_training_is_measured_without_the_packages_that_gpu_machines_lack(trained):
    _, result = trained
    assert {name: "error" in side for name, side in result["sides"].items()} == {
        "jax": False,
        "torch": False,
    }


@pytest.mark.slow
def test_both_sides_start_with_the_same_loss(trained):
    sides = trained[1]["sides"]
    ours, theirs = sides["jax"]["first"], sides["torch"]["first"]
    assert abs(ours - theirs) < FIRST_LOSS * theirs
    assert abs(ours - math.log(256)) < 0.1


@pytest.mark.slow
def test_the_file_holds_samples_hardware_versions_and_all_three_flop_counts(trained):
    result = trained[1]
    jax_side = result["sides"]["jax"]
    assert len(jax_side["seconds"]["samples"]) == 2
    assert result["versions"]["jax"] == jax.__version__
    assert result["hardware"]["platform"] == "cpu"
    assert "measured" in jax_side["peak_flops_source"]
    rate = 2 * 32 / jax_side["seconds"]["median"]
    flops = result["figures"]["train_flops_per_token"]
    assert flops["matmul"] < flops["causal"] < flops["full"]
    for count, value in jax_side["mfu"].items():
        assert value == pytest.approx(flops[count] * rate / jax_side["peak_flops"])


@pytest.mark.slow
def test_the_table_printed_is_that_of_the_file(trained):
    done, result = trained
    assert result_table([result], absolute=True) in done.stdout
    slower = copy.deepcopy(result)
    slower["sides"]["torch"]["seconds"]["median"] *= 3
    assert result_table([slower], absolute=True) not in done.stdout


def test_our_optimizer_settings_are_those_of_training_but_for_the_warm_up():
    settings = default_config().optimizer.to_dict()
    assert vars(cases.OPTIMIZER) | {"warmup_steps": 0} == settings | {"warmup_steps": 0}
    assert default_config().train.num_steps == cases.NUM_STEPS


def test_torch_and_jax_take_the_same_learning_rates():
    schedule = learning_rate_schedule(cases.OPTIMIZER, cases.NUM_STEPS)
    for step in (0, 1, 99, 100, 101, 5_000, 119_999, 120_000):
        assert float(schedule(step)) == pytest.approx(
            cases.learning_rate(step), rel=RATES, abs=1e-9
        )


@pytest.mark.parametrize("changes", [(), ("tie_embeddings=false",), ("ffn=relu",)])
def test_random_weights_are_in_our_tree_and_of_our_spread(changes):
    config = cases.model_config("125m", [*TINY[1:-2], *changes])
    weights = cases.random_weights(config)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, abstract_params(config))
    spread = float(np.std(weights["blocks"]["ffn"]["up"]))
    assert spread == pytest.approx(config.init_std, rel=0.05)


def test_every_step_has_fresh_tokens_and_frequent_ones():
    first, second = (cases.random_tokens(256, (8, 64), step) for step in (0, 1))
    assert (first != second).mean() > 0.5
    assert np.bincount(first.ravel(), minlength=256)[:16].sum() > 0.3 * first.size
    np.testing.assert_array_equal(first, cases.random_tokens(256, (8, 64), 0))


def test_the_torch_side_does_not_load_jax():
    program = "import sys, benchmarks.speed.torch_peers; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def sleeper(settings):
    return Workload(
        lambda first, count: count,
        lambda count: [time.sleep(count * settings["seconds"])],
        lambda: {"known": True},
    )


def broken(settings):
    raise UserError("nothing to build")


def out_of_memory(settings):
    def run(count):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    return Workload(lambda first, count: count, run, dict)


@pytest.mark.parametrize("take_turns", [True, False])
@pytest.mark.slow
def test_a_side_that_fails_is_named_and_the_others_are_measured(take_turns):
    sides = [
        Side("fast", sleeper, {"seconds": 0.3}),
        Side("broken", broken, {}),
        Side("large", out_of_memory, {}),
    ]
    found = compare(sides, num_samples=2, take_turns=take_turns)
    assert found["broken"]["error"] == "nothing to build"
    assert "out of memory" in found["large"]["error"]
    assert len(found["fast"]["seconds"]["samples"]) == 2
    assert 0.3 <= found["fast"]["seconds"]["median"] < 0.6  # of one step, however many a sample has
    assert found["fast"]["known"]
    result = {"what": "train", "preset": "125m", "settings": {}, "sides": found}
    assert "nothing to build" in result_table([result], absolute=False)


def environment_of_process(settings):
    value = os.environ.get("OF_ONE_SIDE", "none")
    return Workload(lambda first, count: None, lambda _: [value], dict)


def test_a_side_may_have_an_environment_of_its_own():
    sides = [
        Side("with", environment_of_process, {}, {"OF_ONE_SIDE": "set"}),
        Side("without", environment_of_process, {}),
    ]
    results = compare(sides, num_samples=1, take_turns=True)
    assert {name: side["first"] for name, side in results.items()} == {
        "with": "set",
        "without": "none",
    }
    assert "OF_ONE_SIDE" not in os.environ


def test_sliced_and_whole_losses_are_the_same():
    settings = {
        "model": TINY_CONFIG.to_dict(), "batch_size": 2, "sequence_length": 32, "slices": 4,
        "execution": {"dtype": "float32"},
    }  # fmt: skip
    values = []
    for side in ("sliced", "whole"):
        workload = loss.build(settings | {"side": side})
        values += workload.run(workload.prepare(0, 1))
    assert abs(values[0] - values[1]) < SAME_LOSS * values[1]


def test_the_error_of_a_kernel_is_that_of_its_dtype():
    exact = attention.errors_of_kernel(TINY_CONFIG, 64, "float32", "xla")
    rounded = attention.errors_of_kernel(TINY_CONFIG, 64, "bfloat16", "xla")
    assert set(exact) == {p + n for p in ("", "packed ") for n in ("out", "dq", "dk", "dv")}
    assert max(exact.values()) < 1e-5
    assert 1e-4 < min(rounded.values()) <= max(rounded.values()) < BF16_ATTENTION


def as_if_on_a_gpu(result):
    there = copy.deepcopy(result)
    there["hardware"] |= {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    there["sides"]["jax"] |= {"tokens_per_second": 345_678.0, "peak_flops": 989e12}
    return there


@pytest.mark.slow
def test_the_page_of_a_cpu_has_ratios_that_of_a_gpu_rates_and_both_are_drawn(trained, tmp_path):
    result = trained[1]
    folder = tmp_path / "performance"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps(result))
    assert main(["report", "--results", str(folder)]) == 0
    page = (tmp_path / "performance.md").read_text()
    medians = {name: side["seconds"]["median"] for name, side in result["sides"].items()}
    assert f"| {medians['torch'] / medians['jax']:.2f} " in page
    assert "tokens/s" not in page and report.PICTURE in page
    assert result["command"] in page
    (folder / "gpu.json").write_text(json.dumps([as_if_on_a_gpu(result)]))
    assert main(["report", "--results", str(folder)]) == 0
    page = (tmp_path / "performance.md").read_text()
    assert "345,678" in page and "989 TFLOP/s" in page
    assert (folder / report.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_jobs_that_fail_or_run_too_long_do_not_keep_the_others_from_their_results(
    trained, tmp_path, capsys
):
    (tmp_path / "before.json").write_text(json.dumps(trained[1]))
    failed = trained[1] | {"sides": trained[1]["sides"] | {"jax": {"error": "out of memory"}}}
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    jobs = {
        "before": ["train"],
        "failed": ["train", "--preset", "10b"],
        "wrong": ["train", "--preset", "9b"],
        "long": ["train", "--preset", "1.5b"],
    }
    assert gpu.run_jobs(jobs, tmp_path, budget=90, job_limit=4) == 1
    shown = capsys.readouterr().out
    assert "done before" in shown and "limit of 4 s" in shown
    assert shown.count("failed with status 2") == 2
    assert json.loads((tmp_path / "gpu.json").read_text()) == [trained[1], failed]
    assert "9b" in (tmp_path / "wrong.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "9b"], "use one of 125m"),
        (["train", "--model", "num_layer=2"], "did you mean num_layers=...?"),
        (["train", "--model", "num_layers=two"], "a int is wanted"),
        (["train", "--batch_size", "0"], "use 1 or more"),
        (["report", "--results", "nowhere"], "no results"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_job_for_gpus_is_a_command_that_exists_for_a_preset_that_exists():
    from benchmarks.speed.__main__ import _parser

    for words in map(str.split, gpu.JOBS.values()):
        args = _parser(words[0]).parse_args(words)
        assert args.preset in PRESETS


def run_tiny(folder, what, *arguments):
    done = run_benchmark(what, *TINY, *arguments, "--output", folder / "result.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_losses_follow_those_of_torch_for_50_steps(tmp_path):
    result = run_tiny(tmp_path, "losses", "--sequence_length", 32, "--sides", "jax", "torch")
    side = result["sides"]["torch"]
    assert side["largest_relative_difference"] < LOSS_CURVE
    assert side["losses"][-1] < side["losses"][0] - 0.2  # they learn, so the weights count


@pytest.mark.slow
def test_a_step_without_one_technique_computes_the_same(tmp_path):
    result = run_tiny(tmp_path, "techniques", "--sequence_length", 32, "--samples", 1)
    sides = result["sides"]
    assert list(sides) == [techniques.SHIPPED, *techniques.names()]
    firsts = [side["first"] for side in sides.values()]
    np.testing.assert_allclose(firsts, firsts[0], rtol=SAME_LOSS)
    assert all(side["time_of_shipped"] > 0 for side in list(sides.values())[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", techniques._TAKEN_OUT)
def test_a_technique_that_is_taken_out_is_replaced_by_what_has_the_same_gradient(name):
    ours, its = (
        run_alone(loss_of_the_tenth_step, {"without": without}) for without in (None, name)
    )
    assert its == pytest.approx(ours, rel=SAME_LOSS)


def loss_of_the_tenth_step(settings):
    """A table without its gradient changes it by 1e-3."""
    workload = techniques.build(
        settings
        | {
            "model": TINY_CONFIG.to_dict(),
            "batch_size": 2,
            "sequence_length": 32,
            "accumulation_steps": 1,
            "execution": {"attention": "xla"},
            "exact_matmuls": False,
        }
    )
    return workload.run(workload.prepare(0, 10))[-1]


def test_products_are_all_that_a_step_has():
    """Their FLOPs, and attention's, are those of `train_flops_per_token`; key and value are alike,
    and so are up and gate."""
    T = 64
    found = products.products(TINY_CONFIG, T)
    twice = ("key", "up")
    flops = sum(
        2 * M * K * N
        * (1 + name.startswith(twice))
        * (1 if name.startswith("head") else TINY_CONFIG.num_layers)
        for name, (_, M, K, N) in found.items()
    )  # fmt: skip
    assert flops == T * train_flops_per_token(TINY_CONFIG, T).matmul


@pytest.mark.slow
def test_products_are_timed_against_those_of_torch(tmp_path):
    result = run_tiny(tmp_path, "products", "--sequence_length", 32, "--samples", 1)
    assert list(result["sides"]) == list(products.products(TINY_CONFIG, 64))
    assert all(side["speed_of_torch"] > 0 for side in result["sides"].values())


@pytest.mark.slow
def test_decoding_gives_the_tokens_of_transformers_and_its_share_of_bandwidth(tmp_path):
    arguments = ("--prompt_length", 8, "--num_tokens", 32, "--samples", 2)
    ours = run_tiny(tmp_path, "decode", *arguments)["sides"]["jax"]
    assert ours["same_tokens"] == 1.0
    assert 0 < ours["of_read_bandwidth"] < 10


@pytest.mark.slow
def test_a_warm_start_compiles_faster_than_a_cold_one(tmp_path):
    sides = run_tiny(tmp_path, "compile", "--sequence_length", 32, "--samples", 1)["sides"]
    assert sides["warm"]["parts"]["compilation"] < 0.5 * sides["cold"]["parts"]["compilation"]
    assert sides["import mobilellm_jax"]["seconds"]["median"] < 2


@pytest.mark.slow
def test_saving_and_restoring_are_timed(tmp_path):
    arguments = ("--sequence_length", 32, "--samples", 2, "--folder", tmp_path)
    result = run_tiny(tmp_path, "checkpoint", *arguments)
    sides = result["sides"]
    assert sides["save: blocks"]["seconds"]["median"] < sides["save: whole"]["seconds"]["median"]
    assert result["figures"]["state_bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_loading_is_timed_against_a_fixed_batch(tmp_path):
    from prepared import run_prepare, write_lines

    run_prepare([write_lines(tmp_path / "text.jsonl")], tmp_path / "data", vocab_size=300)
    model = [value.replace("vocab_size=256", "vocab_size=300") for value in TINY]
    arguments = (*model, "--dataset", tmp_path / "data", "--steps", 5, "--samples", 2)
    sides = run_tiny(tmp_path, "load", *arguments)["sides"]
    assert set(sides) == {"loaded batches", "fixed batch", "loader alone"}
    assert all(side["tokens_per_second"] > 0 for side in sides.values())
