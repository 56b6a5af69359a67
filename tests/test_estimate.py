"""What a model takes on a phone is counted right: against real files, and the paper's budget."""

import dataclasses
import json

import pytest
from hf_folders import make_params, train_small_tokenizer
from model_cases import save_params

from mobilellm_jax.cli import main
from mobilellm_jax.export.estimate import DRAM_BUDGET, estimate, expansion
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import PRESETS

# Wide enough that weights, not metadata, are what a file holds.
CONFIG = ModelConfig(
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=256,
    vocab_size=1024,
    max_seq_len=16,
    sharing="immediate",
    num_repeats=2,
)
FILE_TOLERANCE = 0.02
GRAPH_BYTES = 120_000  # LiteRT's description of a visit, with the scales of int8; not counted
SLOW = {"pte", "litertlm"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in ("pte", "gguf", "litertlm")
        for dtype in FORMATS[name].tolerances
    ],
)
def test_files_are_as_large_as_counted(name, dtype, tmp_path, capsys):
    for module in FORMATS[name].runtime_modules:
        pytest.importorskip(module, reason=f"install mobilellm_jax[{FORMATS[name].extra}]")
    tokenizer_model = train_small_tokenizer(tmp_path / "tokenizer.model")
    save_params(tmp_path / "run", CONFIG, make_params(CONFIG), tokenizer_model)
    arguments = ["--to", name, "--dtype", dtype, "--checkpoint", str(tmp_path / "run")]
    output = tmp_path / "out"
    assert main(["convert", *arguments, "--output", str(output), "--no-verify"]) == 0
    size = json.loads((output / "report.json").read_text())["file_bytes"][FORMATS[name].file]
    counted = estimate(CONFIG, name, dtype, CONFIG.max_seq_len).file
    uncounted = len(tokenizer_model) + (
        GRAPH_BYTES * CONFIG.depth if name == "litertlm" else 60_000
    )
    assert counted * (1 - FILE_TOLERANCE) < size < counted * (1 + FILE_TOLERANCE) + uncounted


# Weights of CONFIG: its stored blocks with the final norm, and one table of its vocabulary.
BLOCKS = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768 + 2 * 256) + 256
TABLE = 1024 * 256


@pytest.mark.parametrize(
    ("name", "dtype", "tied", "file", "weights"),
    [
        ("pte", "float32", True, 4 * (BLOCKS + 2 * TABLE), 4 * (BLOCKS + TABLE)),
        ("pte", "float32", False, 4 * (BLOCKS + 2 * TABLE), 4 * (BLOCKS + TABLE)),
        ("gguf", "float16", False, *[2 * (2 * BLOCKS + 2 * TABLE)] * 2),
        ("gguf", "q4_0", True, *[(18 * 2 * BLOCKS + 34 * TABLE) / 32] * 2),
        ("gguf", "q4_0", False, *[(18 * 2 * BLOCKS + (18 + 34) * TABLE) / 32] * 2),
        ("litertlm", "int8", True, *[BLOCKS + TABLE] * 2),
        ("litertlm", "float32", False, *[4 * (BLOCKS + 2 * TABLE)] * 2),
    ],
)
def test_file_and_memory_are_those_counted_by_hand(name, dtype, tied, file, weights):
    cost = estimate(dataclasses.replace(CONFIG, tie_embeddings=tied), name, dtype, 16)
    cache = 16 * (3 * 2 * 2 * 2 * 64) * (2 if name == "gguf" else 4)
    assert (cost.file, cost.memory) == (file, weights + cache)


def test_the_paper_s_budget_decides_what_fits():
    assert DRAM_BUDGET == 600e6
    fits = {
        (name, dtype): estimate(PRESETS[name], "gguf", dtype, 2048).fits
        for name in ("125m", "350m", "1.5b")
        for dtype in ("float16", "q4_0")
    }
    assert fits == {
        ("125m", "float16"): True,
        ("125m", "q4_0"): True,
        ("350m", "float16"): False,
        ("350m", "q4_0"): True,
        ("1.5b", "float16"): False,
        ("1.5b", "q4_0"): False,
    }


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_value"),
    [("gguf", "q8_0", 2), ("pte", "float32", 4), ("litertlm", "int8", 4)],
)
def test_memory_grows_with_the_context_by_the_cache(name, dtype, bytes_per_value):
    short, long = (estimate(PRESETS["125m_ls"], name, dtype, n) for n in (1, 1001))
    values = 30 * 2 * 2 * 3 * 64  # blocks, visits, keys and values, heads, width
    assert long.memory - short.memory == 1000 * values * bytes_per_value
    assert long.file == short.file


def test_a_shared_block_costs_once_or_per_visit():
    once = dataclasses.replace(CONFIG, sharing="none", num_repeats=1)
    assert estimate(CONFIG, "pte", "float32", 16).file == estimate(once, "pte", "float32", 16).file
    shared, single = (estimate(c, "gguf", "float16", 16).file for c in (CONFIG, once))
    assert shared - single == 2 * BLOCKS
    total = 4 * (BLOCKS + TABLE)
    assert f"{(total + 4 * BLOCKS) / 1e6:,.1f} MB of {total / 1e6:,.1f} MB" in expansion(CONFIG)


def test_the_table_has_every_preset(capsys):
    assert main(["convert", "--estimate", "--context_length", "1024"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} " in text for name in PRESETS)
    assert "1024 tokens" in text and "600.0 MB" in text


def test_a_config_file_and_a_checkpoint_are_counted(tmp_path, capsys):
    def printed(*arguments):
        status = main(["convert", "--estimate", *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    file = tmp_path / "mine.py"
    file.write_text(
        "from mobilellm_jax.training.run_config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.update({CONFIG.to_dict()!r})\n"
        "    return config\n"
    )
    save_params(tmp_path / "run", CONFIG, make_params(CONFIG))
    cost = estimate(CONFIG, "gguf", "float16", 16)
    cells = f"{cost.file / 1e6:,.0f} / {cost.memory / 1e6:,.0f}"
    for name, flag, path in (("mine", "--config", file), ("run", "--checkpoint", tmp_path / "run")):
        status, text = printed(flag, path)
        assert status == 0 and f"| {name} " in text and cells in text and "16 tokens" in text
    longer = estimate(dataclasses.replace(CONFIG, num_layers=300), "gguf", "float16", 16)
    assert (
        f"{longer.file / 1e6:,.0f} / "
        in printed("--config", file, "--config.model.num_layers=300")[1]
    )
    assert "| -  " in printed("--config", file, "--config.model.ffn=relu")[1]
    assert printed("--config", file, "--context_length", 17)[0] == 2
    for arguments, message in (
        (("--config", file, "--checkpoint", "x"), "--config or --checkpoint, not both"),
        (("--config.model.num_layers=3",), "changes a config file: name it, --config FILE"),
        (("--config", tmp_path / "no.py"), "no such file"),
    ):
        status, text = printed(*arguments)
        assert status == 2 and message in text


@pytest.mark.parametrize("length", [0, -5])
def test_a_context_without_tokens_is_refused(length, capsys):
    assert main(["convert", "--estimate", "--context_length", str(length)]) == 2
    assert f"--context_length {length}: use 1 or more" in capsys.readouterr().err
