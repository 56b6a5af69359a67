"""The planner on hardware that is here: eight CPU devices stand for eight chips."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from model_cases import tiny

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning import command, report, topologies
from mobilellm_jax.planning import plan as plan_module
from mobilellm_jax.planning import search as searching
from mobilellm_jax.planning.plan import make_plan
from mobilellm_jax.planning.report import Budget, plan_dict, plan_text, read_plan
from mobilellm_jax.planning.topologies import PLATFORMS, Chip, Topology, topology
from mobilellm_jax.training.run_config import default_config, load_config

CHIP = Chip("cuda", 1 << 30, 1e11, 1e10, 1e9)
MODEL = tiny(vocab_size=56)
T = 12


def run_config(**mesh):
    config = default_config()
    config.model.update(MODEL.to_dict())
    config.mesh.update(mesh)
    config.train.update(num_steps=10, global_batch_size=16)
    config.optimizer.warmup_steps = 1
    return config


@pytest.fixture(scope="module", autouse=True)
def published_peak():
    """Of a chip that has one, which CPUs have not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "peak_flops", lambda *_: 1e11)
        yield


@pytest.fixture
def hardware(devices):
    return Topology("eight:8", CHIP, tuple(devices))


@pytest.fixture(scope="module")
def plan(devices, published_peak):
    return make_plan(run_config(data=2, fsdp=4), Topology("eight:8", CHIP, tuple(devices)), T)


def test_a_plan_says_what_a_chip_holds(plan):
    per_block = 24 * 32 * 2 + 2 * 24 * 16 + 3 * 24 * 40
    norms = 4 * (2 * 24 * 3 + 24)
    weights = 4 * (3 * per_block + 56 * 24) / 4 + norms  # a quarter, and norms whole
    assert plan.memory.weights == weights
    assert plan.memory.optimizer == 2 * weights + 2 * 4  # two moments, two counters
    assert plan.memory.temporaries > 0
    assert plan.donated >= 3 * weights
    assert plan.fits and plan.attention == "xla"
    assert plan.tokens_per_step == 16 * T


def test_time_is_the_published_rates_and_the_named_shares(plan):
    step = plan.step
    parts = [step.matmul, step.attention, step.elementwise, step.vocabulary, step.optimizer]
    assert min(parts) > 0 and step.compute == pytest.approx(sum(parts))
    assert step.slowest == pytest.approx(step.compute + sum(step.network.values()))
    assert step.fastest <= step.slowest
    assert 0 < plan.mfu(step.slowest) <= plan.mfu(step.fastest)
    rate = plan.tokens_per_second(step.slowest)
    assert rate == pytest.approx(16 * T / step.slowest)


def test_each_part_of_the_time_is_that_of_a_count_by_hand(plan):
    """For 24 tokens on a chip of 1e11 FLOP/s and 1e11 bytes/s, in fp32 with remat "dots"."""
    blocks, vocabulary = 3 * (24 * 32 * 2 + 2 * 24 * 16 + 3 * 24 * 40), 56 * 24
    again = 1 + 0.1 / 3  # a tenth of the forward pass, itself a third of the whole
    assert plan.step.matmul == pytest.approx(24 * 6 * blocks * again / (0.75 * 1e11))
    scores = 6 * 3 * 32 * T  # half of those of all pairs
    assert plan.step.attention == pytest.approx(24 * scores * again / (0.1 * 1e11))
    moved = 3 * again * 3 * 4 * (8 * 24 + 4 * 40)
    stacked = 4 * 3 * 4 * (5 * 24 + 2 * 40)
    assert plan.step.elementwise == pytest.approx(24 * (moved + stacked) / 1e11)
    logits = 24 * (6 * vocabulary / (0.75 * 1e11) + 16 * 56 / 1e11)
    assert plan.step.vocabulary == pytest.approx(logits)
    weights = blocks + vocabulary + 3 * 2 * 24 + 24
    assert plan.step.optimizer == pytest.approx(28 * weights / 4 / 1e11)


def test_a_chip_with_too_little_memory_does_not_fit(plan):
    small = dataclasses.replace(plan.memory, capacity=plan.memory.total - 1)
    starved = dataclasses.replace(plan, memory=small)
    assert plan.fits and not starved.fits
    assert "DOES NOT FIT" in plan_text(starved, Budget(1e9, None))
    refused = dataclasses.replace(plan, refused="Ran out of memory: used 20G of 16G")
    assert not refused.fits
    assert "Ran out of memory" in plan_text(refused, Budget(1e9, None))


# What libtpu 0.0.42.1 counts for 125m, 2,048 tokens a row, data parallel on v5e:2x2
# (`compiled.memory_analysis()`), by rows on a chip. At 18 rows it refuses.
RECORDED = {
    16: (1_531_491_840, 1_531_100_672, 1_531_098_624, 15_094_032_384, 21_327_872),
    17: (1_531_688_448, 1_531_100_672, 1_531_098_624, 15_403_394_048, 24_374_784),
}
PARAMS_125M = 124_635_456


def recorded_plan(plan, rows):
    """`plan` with the memory of 125m on a v5e, as the compiler counted it."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = rows in RECORDED and SimpleNamespace(
        **{f"{name}_size_in_bytes": n for name, n in zip(names, RECORDED[rows], strict=True)}
    )
    memory = plan_module._memory(
        4 * PARAMS_125M,
        8 * PARAMS_125M + 8,
        16 * rows * 2048,
        sizes or None,
        topologies.CHIPS["v5e"].memory_bytes,
    )
    return dataclasses.replace(plan, memory=memory, refused=None if sizes else "15.89G of memory")


def test_a_batch_that_exceeds_the_chip_by_padding_and_program_does_not_fit(plan):
    """17 rows are 15.739 GiB of 15.75 without the two, and 15.795 with them."""
    seventeen = recorded_plan(plan, 17)
    arguments, output, alias, temporaries, program = RECORDED[17]
    assert seventeen.memory.total == arguments + output - alias + temporaries + program
    assert seventeen.memory.total / topologies.GIB == pytest.approx(15.795, abs=1e-3)
    assert seventeen.memory.padding == arguments - 12 * PARAMS_125M - 8 - 16 * 17 * 2048
    without = seventeen.memory.total - seventeen.memory.padding - program - (output - alias)
    assert without < seventeen.memory.capacity < seventeen.memory.total
    assert not seventeen.fits and seventeen.verdict == "does not fit"
    assert "together: DOES NOT FIT" in plan_text(seventeen, Budget(1e9, None))
    assert plan_dict(seventeen, Budget(1e9, None))["fits"] is False


def test_a_batch_that_leaves_less_than_three_percent_is_a_warning(plan):
    sixteen = recorded_plan(plan, 16)
    assert sixteen.fits and sixteen.memory.tight and sixteen.share_of_memory == "98.4%"
    text = plan_text(sixteen, Budget(1e9, None))
    assert "WARNING: 1.6% of the memory is left" in text and "together: fits, tight" in text
    values = plan_dict(sixteen, Budget(1e9, None))
    assert values["fits"] and values["tight"]
    roomy = dataclasses.replace(sixteen.memory, capacity=-(-sixteen.memory.total * 100 // 97))
    assert roomy.fits and not roomy.tight
    assert "WARNING" not in plan_text(dataclasses.replace(plan, memory=roomy), Budget(1e9, None))


def test_a_search_ranks_and_shows_the_true_verdicts(plan, monkeypatch, capsys, tmp_path):
    """Table, JSON and picture; a refused plan shows no share of memory that it does not have."""
    slow = dataclasses.replace(plan.step, matmul=1.0)
    plans = [recorded_plan(plan, rows) for rows in (18, 17, 16)]
    plans.append(dataclasses.replace(plan, step=slow))
    monkeypatch.setattr(searching, "search", lambda *_: ((None, each) for each in plans))
    found = command._search(None, None, T)
    assert [each.verdict for _, each in found] == ["fits, tight", "fits", *2 * ["does not fit"]]
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")][2:]
    columns = [[cell.strip() for cell in row.split("|")[2:4]] for row in rows]
    assert columns[0] == ["fits, tight", "98.4%"]
    assert sorted(columns[2:]) == [["does not fit", "100.3%"], ["does not fit", "over 100%"]]
    command._write(tmp_path, found, "", Budget(1e9, None))
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [each["fits"] for each in written] == [True, True, False, False]
    assert [each["tight"] for each in written] == [True, False, False, False]
    (refused,) = (each for each in written if each["refused"])
    assert refused["memory"]["total"] is None and refused["memory"]["temporaries"] is None
    assert [read_plan(each).verdict for each in written] == [each.verdict for _, each in found]


def test_a_bar_of_memory_is_as_long_as_the_total(plan):
    for rows in RECORDED:
        each = recorded_plan(plan, rows)
        assert sum(report._memory_parts(each).values()) == each.memory.total


@pytest.mark.filterwarnings("error")
def test_a_refused_plan_alone_is_drawn(plan, tmp_path):
    report.draw([("18 rows", recorded_plan(plan, 18))], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plans_that_were_written_before_padding_was_counted_are_read():
    for path in Path("docs/plans").glob("*/*.json"):
        values = json.loads(path.read_text())
        parts = ("weights", "optimizer", "batch", "temporaries")
        old = {name: values["memory"][name] for name in (*parts, "capacity")}
        assert read_plan(values | {"memory": old}).memory.total == sum(old[name] for name in parts)


def test_a_gpu_has_the_share_of_its_memory_that_jax_takes(monkeypatch):
    for variable in topologies._GPU_SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(topologies, "_gpu_devices", lambda *_: ())
    assert topology("h100:8").chip.memory_bytes == int(0.75 * 79.1 * topologies.GIB)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert topology("h100:8").chip.memory_bytes == int(0.5 * 79.1 * topologies.GIB)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION=90%: use a share"):
        topology("h100:8")


def test_a_batch_that_would_overflow_a_compiler_is_refused(hardware):
    config = run_config(data=8)
    config.train.global_batch_size = 8 * 10**12
    with pytest.raises(UserError, match="its tokens alone take 178,814 GiB of a chip, which has 1"):
        make_plan(config, hardware, T)


def test_cost_is_days_times_chips_times_price(plan):
    values = plan_dict(plan, Budget(1e12, 2.0))["predicted"]["network not hidden"]
    seconds = 1e12 / values["tokens_per_second"]
    assert values["days"] == pytest.approx(seconds / 86_400)
    assert values["cost"] == pytest.approx(seconds / 3600 * 8 * 2.0)
    assert plan_dict(plan, Budget(1e12, None))["predicted"]["network hidden"]["cost"] is None
    text = json.dumps(plan_dict(plan, Budget(1e12, 2.0)), allow_nan=False)
    assert read_plan(json.loads(text)) == plan


def test_search_goes_from_the_most_promising_on_and_leaves_the_batch_alone(hardware):
    found = searching.candidates(run_config(), hardware, T)
    seconds = [float(f"{c.seconds:.2g}") for c in found]
    assert seconds == sorted(seconds)
    shapes = {tuple(c.changes["mesh"].values()) for c in found}
    assert len(shapes) == len(found) > 4
    config, plan = next(searching.search(run_config(), hardware, T, num_fitting=1))
    assert plan.fits and config.train.global_batch_size == 16
    assert plan.mesh == {axis: config.mesh[axis] for axis in plan.mesh}


def test_search_leaves_out_what_cannot_fit(hardware):
    """By the rough count; of what may fit, rematerialisation and accumulation need the least."""
    tight = dataclasses.replace(hardware, chip=dataclasses.replace(CHIP, memory_bytes=70_000))
    found = searching.candidates(run_config(), tight, T)
    everything = searching.candidates(run_config(), hardware, T)
    assert 0 < len(found) <= len(everything)
    assert {c.changes["execution"]["remat"] for c in found} != {"dots"}
    none = dataclasses.replace(hardware, chip=dataclasses.replace(CHIP, memory_bytes=10))
    assert list(searching.search(run_config(), none, T)) == []


@pytest.mark.parametrize(
    ("data", "fsdp", "gather", "whole"), [(8, 1, "step", 17_064), (1, 8, "layer", 56 * 24)]
)
def test_search_counts_memory_as_worked_out_by_hand(hardware, data, fsdp, gather, whole):
    """At its least: 12 tokens at a time, of which only the input of each block is kept in bf16."""
    kept = 12 * 3 * 2 * 24
    needed = 0.8 * (16 * 17_064 / fsdp + 4 * whole + kept)

    def is_tried(memory):
        chip = dataclasses.replace(CHIP, memory_bytes=memory)
        tried = searching.candidates(run_config(), dataclasses.replace(hardware, chip=chip), T)
        mesh = {"data": data, "fsdp": fsdp, "tensor": 1, "gather": gather}
        return mesh in [candidate.changes["mesh"] for candidate in tried]

    assert is_tried(int(needed) + 1) and not is_tried(int(needed))


def test_the_command_prints_and_writes_the_plan(tmp_path, monkeypatch, capsys, hardware):
    monkeypatch.setattr(topologies, "topology", lambda name: hardware)
    (tmp_path / "config.py").write_text("from test_plan import run_config as get_config\n")
    arguments = ["plan", "--config", str(tmp_path / "config.py"), "--topology", "eight:8"]
    arguments += ["--sequence_length", str(T), "--price", "2", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--config.mesh.fsdp=8"]) == 0
    printed = capsys.readouterr().out
    assert "8 chips of eight:8, mesh: data 1, fsdp 8, tensor 1" in printed
    assert "together: fits" in printed and "cost at 2 per chip and hour" in printed
    (values,) = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert values["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and values["fits"]
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "plan.md").read_text().startswith("# config.py")


@pytest.mark.parametrize("tried", [True, False])
def test_a_search_in_vain_ends_with_3(tmp_path, monkeypatch, capsys, hardware, plan, tried):
    """And is written, if anything was compiled."""
    if not tried:
        chip = dataclasses.replace(CHIP, memory_bytes=10)
        hardware = dataclasses.replace(hardware, chip=chip)
    starved = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, capacity=1))
    monkeypatch.setattr(topologies, "topology", lambda name: hardware)
    monkeypatch.setattr(searching, "make_plan", lambda *_: starved)
    (tmp_path / "config.py").write_text("from test_plan import run_config as get_config\n")
    arguments = ["plan", "--config", str(tmp_path / "config.py"), "--topology", "eight:8"]
    arguments += ["--sequence_length", str(T), "--search", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 3
    assert "nothing that was tried fits eight:8; take more chips" in capsys.readouterr().err
    assert (tmp_path / "out" / "plan.json").exists() == tried


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:32x32", "a slice of v5e has at most 256 chips, not 1,024"),
        ("v5e:1000x1000", "at most 256 chips, not 1,000,000"),
        ("v5e:2x2x2", "v5e has 2 sizes, as in v5e:2x2"),
        ("v5p:4x4", "v5p has 3 sizes, as in v5p:2x2x1"),
        ("v5p:32x32x32", "at most 6,144 chips, not 32,768"),
        ("h100:16", "a host has at most 8 GPUs, as in h100:2x8 for 16"),
        ("h100:1000x8", "a plan at most 4,096"),
        ("h100:2x2x2", "GPUs are KIND:GPUS or KIND:HOSTSxGPUS"),
    ],
)
def test_hardware_that_nobody_has_is_refused_at_once(name, message):
    """With or without its compiler, which takes such names and hangs with some."""
    with pytest.raises(UserError, match=message):
        topology(name)


def plan_arguments(folder, *arguments):
    (folder / "config.py").write_text("from test_plan import run_config as get_config\n")
    return ["plan", "--config", str(folder / "config.py"), "--topology", "eight:8", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "nan"], "--tokens nan: use a number of more than 0"),
        (["--price", "inf"], "--price inf: use a number of more than 0"),
        (["--sequence_length", "65"], "--sequence_length 65: config.model.max_seq_len is 64; set"),
        (["--output", ""], "argument --output: the path is empty"),
        (["--output", "config.py"], "--output 'config.py': cannot be made a folder"),
        (
            ["--search", "--config.train.global_batch_size=7"],
            "config.train.global_batch_size = 7 does not split over the 8 chips of eight:8: use a "
            "multiple of 4 or 8",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_compiled(
    tmp_path, monkeypatch, capsys, hardware, arguments, message
):
    monkeypatch.setattr(topologies, "topology", lambda name: hardware)
    monkeypatch.setattr(plan_module, "make_plan", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(searching, "make_plan", lambda *_: pytest.fail("compiled"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(cli.main(plan_arguments(tmp_path, *arguments)))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "h900:8",
        "v5e:",
        "h100:0",
        "v5e:4xx4",
        "tpu:4x4",
        "v5e:\u0662x\u0662",
        "h100:" + "9" * 5000,
    ],
)
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(UserError, match=r"write KIND:SIZES.*the kinds are v4, v5e, .*h200"):
        topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_a_missing_compiler_says_what_to_install(name, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"pip install '\.\[{extra}\]'"):
        topology(name)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_ships_settings_for_every_platform(preset):
    plain = load_config(f"configs/{preset}.py")
    for platform, name in PLATFORMS.items():
        config = load_config(f"configs/{preset}.py:{platform}")
        num_chips = np.prod([int(n) for n in name.partition(":")[2].split("x")])
        assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == num_chips
        assert config.train.global_batch_size == plain.train.global_batch_size
    with pytest.raises(UserError, match="no platform 'v9': the file has v5e-256"):
        load_config(f"configs/{preset}.py:v9")
