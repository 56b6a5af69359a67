"""`mobilellm convert`: every format, verified by its own runtime, written whole or not at all."""

import dataclasses
import json
import subprocess
import types

import jax
import numpy as np
import pytest
from hf_folders import edit_config, make_params, train_small_tokenizer
from model_cases import save_params
from test_tokenizer_json import train

from mobilellm_jax.checkpoints.files import load_checkpoint
from mobilellm_jax.checkpoints.loading import load_model
from mobilellm_jax.cli import main
from mobilellm_jax.export import command
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.huggingface.folder import save_hf
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model_bundle import read_record

CONFIG = ModelConfig(
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    embed_dim=64,
    ffn_dim=96,
    head_dim=32,
    vocab_size=608,
    max_seq_len=40,
    sharing="immediate",
    num_repeats=2,
)
SLOW = {"pte", "litertlm"}


def save(workdir, tokenizer_model=None, bos=True, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    # Weights as small as trained ones: runtimes round activations too.
    params = jax.tree.map(lambda x: x * np.float32(0.5), make_params(config))
    if config.ffn == "relu":
        del params["blocks"]["ffn"]["gate"]
    save_params(workdir, config, params, tokenizer_model, {"bos": bos})
    return workdir


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer_model):
    return save(tmp_path_factory.mktemp("runs") / "run", tokenizer_model)


def convert(capsys, *arguments):
    status = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def needs_runtime(name):
    for module in FORMATS[name].runtime_modules:
        pytest.importorskip(module, reason=f"install mobilellm_jax[{FORMATS[name].extra}]")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, target in FORMATS.items()
        for dtype in target.tolerances
    ],
)
def test_every_format_is_written_and_agrees_with_jax(name, dtype, workdir, tmp_path, capsys):
    needs_runtime(name)
    output = tmp_path / "out"
    status, text = convert(
        capsys, "--to", name, "--dtype", dtype, "--checkpoint", workdir, "--output", output
    )
    assert status == 0, text
    assert "Verified against the JAX model" in text
    if FORMATS[name].file:
        assert (output / FORMATS[name].file).stat().st_size > 1000
    report = json.loads((output / "report.json").read_text())
    assert report["verified"] and report["verification"]["problems"] == []
    assert (report["format"], report["dtype"]) == (name, dtype)
    assert report["training"] == {"bos": True, "step": 0}
    assert report["verification"]["prompt_lengths"] == list(range(1, CONFIG.max_seq_len))
    assert report["verification"]["lines_equal"] == report["verification"]["lines"] > 100
    if dtype == "float32":
        assert report["verification"]["greedy_equal"] == report["verification"]["greedy_tokens"]
    assert "largest logit difference" in (output / "report.md").read_text()
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=output, capture_output=True)
    assert sums.returncode == 0
    assert list(tmp_path.iterdir()) == [output]


def puts_bos_in_front(name, folder):
    """What the written file has an app do with a prompt."""
    if name.startswith("hf"):
        import transformers

        options = {"trust_remote_code": True} if name == "hf_compact" else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        return tokenizer("def main():")["input_ids"][0] == 1
    runtime = FORMATS[name].open(folder, CONFIG.max_seq_len)
    if name == "pte":
        described = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
        assert (described is not None) == ("get_bos_id" in runtime.metadata)
        return "get_bos_id" in runtime.metadata
    if name == "gguf":
        import llama_cpp

        return bool(llama_cpp.llama_vocab_get_add_bos(runtime._vocab))
    return runtime._engine.bos_token_id == 1


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMATS],
)
def test_bos_stands_in_front_of_prompts_as_it_did_in_training(
    name, bos, tokenizer_model, tmp_path, capsys
):
    needs_runtime(name)
    run, output = save(tmp_path / "run", tokenizer_model, bos), tmp_path / "out"
    arguments = ("--to", name, "--checkpoint", run, "--output", output, "--no-verify")
    assert convert(capsys, *arguments)[0] == 0
    assert puts_bos_in_front(name, output) == bos


def test_the_context_that_was_asked_for_is_that_of_the_file(workdir, tmp_path, capsys):
    needs_runtime("gguf")
    import gguf

    for name in ("hf", "gguf"):
        arguments = ("--to", name, "--checkpoint", workdir, "--output", tmp_path / name)
        assert convert(capsys, *arguments, "--context_length", "20", "--no-verify")[0] == 0
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["max_position_embeddings"] == 20
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 20


def test_what_is_known_of_the_training_goes_along(workdir):
    known = {"step": 3, "bos": False, "mask_documents": True, "chat_template": "{{ x }}"}
    known |= {"loss_version": 2, "sequence_length": 512}
    prompt, provenance = read_record(known | {"run": {}})
    model = dataclasses.replace(load_checkpoint(workdir), prompt=prompt, provenance=provenance)
    assert model.to_record() == known


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMATS],
)
def test_every_stop_id_of_an_imported_folder_stops_every_format(
    name, tokenizer_model, tmp_path, capsys
):
    needs_runtime(name)
    save_hf(tmp_path / "hf", CONFIG, make_params(CONFIG), tokenizer_model=tokenizer_model)
    edit_config(tmp_path / "hf", mobilellm=None, eos_token_id=2, num_hidden_layers=4)
    generation = tmp_path / "hf" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [13, 500]}))
    status, text = convert(
        capsys, "--from", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "run"
    )
    assert status == 0 and "ends with one of the ids 2, 13, 500" in text
    assert load_checkpoint(tmp_path / "run").stop_ids == (2, 13, 500)
    output = tmp_path / "out"
    status, text = convert(
        capsys, "--to", name, "--checkpoint", tmp_path / "run", "--output", output
    )
    assert status == 0 and "Stops at: 2, 13, 500" in text, text
    runtime = FORMATS[name].open(output, CONFIG.max_seq_len)
    assert [i for i in (2, 13, 50, 500) if runtime.stops_at(i)] == [2, 13, 500]
    if name.startswith("hf"):
        for file in ("config.json", "generation_config.json"):
            assert json.loads((output / file).read_text())["eos_token_id"] == [2, 13, 500]
        assert load_model(output).stop_ids == (2, 13, 500)


UNIGRAM = {"model_type": "unigram", "vocab_size": 500}
NORMALISING = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf", UNIGRAM),
        ("hf", NORMALISING),
        ("hf_compact", UNIGRAM),
        pytest.param("pte", NORMALISING, marks=pytest.mark.slow),
    ],
)
def test_a_tokenizer_that_has_no_form_as_json_goes_along_as_it_is(name, options, tmp_path, capsys):
    needs_runtime(name)
    tokenizer_model, output = train(**{"vocab_size": 600} | options), tmp_path / "out"
    run = save(tmp_path / "run", tokenizer_model)
    status, text = convert(capsys, "--to", name, "--checkpoint", run, "--output", output)
    assert status == 0, text
    assert (output / "tokenizer.model").read_bytes() == tokenizer_model
    assert not (output / "tokenizer.json").exists()
    verification = json.loads((output / "report.json").read_text())["verification"]
    if name == "pte":  # ExecuTorch reads tokenizer.model as well
        assert verification["lines_equal"] == verification["lines"] > 100
    else:
        assert verification["lines"] == 0 and "so no ids were compared" in text


def test_a_tokenizer_that_executorch_reads_otherwise_is_refused_before_the_work(
    tmp_path, capsys, monkeypatch
):
    needs_runtime("pte")
    from mobilellm_jax.export.executorch import export

    monkeypatch.setattr(export, "module_from_params", None)
    run = save(tmp_path / "run", train(**UNIGRAM))
    status, text = convert(capsys, "--to", "pte", "--checkpoint", run, "--output", tmp_path / "o")
    assert status == 2 and "its algorithm is unigram" in text


def test_a_folder_with_a_chat_template_and_an_unknown_tokenizer_is_written_again(tmp_path, capsys):
    needs_runtime("hf")
    source, output = tmp_path / "source", tmp_path / "out"
    save_hf(source, CONFIG, make_params(CONFIG))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    status, text = convert(capsys, "--to", "hf", "--checkpoint", source, "--output", output)
    assert status == 0, text
    assert (output / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


class Wrong:
    """A runtime whose logits are off by a little."""

    def __init__(self, runtime):
        self._runtime, self.name = runtime, runtime.name
        self.context_length = runtime.context_length

    def logits(self, tokens):
        return self._runtime.logits(tokens) * np.float32(1.1)

    def __getattr__(self, name):
        return getattr(self._runtime, name)


def test_a_file_that_does_not_agree_is_not_kept(workdir, tmp_path, capsys, monkeypatch):
    needs_runtime("gguf")
    target = FORMATS["gguf"]
    wrong = dataclasses.replace(target, open=lambda *args: Wrong(target.open(*args)))
    monkeypatch.setitem(FORMATS, "gguf", wrong)
    status, text = convert(
        capsys, "--to", "gguf", "--checkpoint", workdir, "--output", tmp_path / "out"
    )
    assert status == 2
    assert "is not the JAX model: token by token: mean KL" in text
    assert list(tmp_path.iterdir()) == []


def test_no_verify_writes_the_same_file_and_says_so(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "hf", dataclasses.replace(FORMATS["hf"], open=None))
    output = tmp_path / "out"
    status, text = convert(
        capsys, "--to", "hf", "--checkpoint", workdir, "--output", output, "--no-verify"
    )
    assert status == 0 and "Not verified" in text
    assert json.loads((output / "report.json").read_text())["verified"] is False
    assert "**Not verified**" in (output / "report.md").read_text()


def test_a_missing_extra_is_named_before_any_work(workdir, tmp_path, capsys, monkeypatch):
    absent = dataclasses.replace(FORMATS["gguf"], runtime_modules=("no_such_module",))
    monkeypatch.setitem(FORMATS, "gguf", absent)
    status, text = convert(
        capsys, "--to", "gguf", "--checkpoint", workdir, "--output", tmp_path / "out"
    )
    assert status == 2
    assert "no_such_module is not installed: pip install 'mobilellm_jax[gguf]'" in text
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_other_files_never(workdir, tmp_path, capsys):
    arguments = ("--to", "hf", "--checkpoint", workdir, "--output", tmp_path / "out", "--no-verify")
    assert convert(capsys, *arguments)[0] == 0
    assert convert(capsys, *arguments)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, text = convert(capsys, *arguments)
    assert status == 2 and "already holds something that is not an earlier export" in text
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["hf", "gguf", "litertlm"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shared_kv": "first_visit"}, "first_visit"), ({"ffn": "relu"}, "model.ffn = 'relu'")],
)
def test_what_a_format_cannot_express_is_refused(
    name, changes, message, tokenizer_model, tmp_path, capsys
):
    needs_runtime(name)
    run = save(tmp_path / "run", tokenizer_model, **changes)
    status, text = convert(capsys, "--to", name, "--checkpoint", run, "--output", tmp_path / "out")
    assert status == 2 and message in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--dtype", "int8"], "--dtype int8: gguf has float32, float16, q8_0"),
        (["--to", "hf", "--context_length", "41"], "--context_length 41: use 2 to 40"),
        (["--to", "hf", "--context_length", "1"], "--context_length 1: use 2 to 40"),
        (["--to", "hf", "--text", "no/such/file"], "no/such/file: cannot be read as text"),
        (["--to", "hf", "--input", "x"], "--input has no meaning with --to"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message, workdir, tmp_path, capsys):
    output = tmp_path / "out"
    status, text = convert(
        capsys, *arguments, "--checkpoint", workdir, "--output", output, "--no-verify"
    )
    assert status == 2 and message in text, text
    assert not output.exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer_model, tmp_path, capsys):
    run = save(tmp_path / "run", tokenizer_model, vocab_size=300)
    status, text = convert(capsys, "--to", "gguf", "--checkpoint", run, "--output", tmp_path / "o")
    assert status == 2 and "but the model's vocab_size is 300" in text


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_counted_in_the_unit_of_the_system(platform, unit, monkeypatch):
    monkeypatch.setattr(command.sys, "platform", platform)
    usage = types.SimpleNamespace(ru_maxrss=5000)
    monkeypatch.setattr(command.resource, "getrusage", lambda who: usage)
    assert command._peak_memory() == 5000 * unit
