"""The command line: help that teaches, errors that name the mend, the verbs one after another."""

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from model_cases import random_params, tiny
from prepared import DOCUMENTS, make_documents

import mobilellm_jax
from mobilellm_jax.checkpoints import loading
from mobilellm_jax.cli import VERBS, main
from mobilellm_jax.data import command
from mobilellm_jax.data.dataset import Dataset
from mobilellm_jax.evaluation import perplexity
from mobilellm_jax.inference import generate as generation
from mobilellm_jax.inference.sampling import Sampling
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *arguments):
    """Exit status and output of `mobilellm ...`, argparse's own exits included."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_that_parses(verb, capsys):
    status, text = run(capsys, verb, "--help")
    assert status == 0
    example = text[text.index("example") :].replace("\\\n", " ")
    lines = [line.strip() for line in example.splitlines() if line.strip().startswith("mobilellm ")]
    assert lines
    known = set(re.findall(r"--[\w.]+", text[: text.index("example")])) | {"--help"}
    for line in lines:
        words = shlex.split(line)
        assert words[1] == verb
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert {flag for flag in flags if not flag.startswith("--config.")} <= known


def test_help_of_the_whole_shows_the_way_from_text_to_model(capsys):
    status, text = run(capsys, "--help")
    assert status == 0
    assert [verb for verb in VERBS if f"mobilellm {verb}" in text] == list(VERBS)


NOWHERE = ("--checkpoint", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere: no such folder"),
        (["generate", "--checkpoint", "nowhere"], "no prompt"),
        (["generate", "--checkpoint", ".", "--prompt", "a", "--max_token", "3"], "--max_token"),
        (["generate", *NOWHERE, "--prompt", "a", "--seed", "4294967296"], "use 0 to 4294967295"),
        (["generate", *NOWHERE, "--prompt", "a", "--max_tokens", "0"], "use 1 or more"),
        (["generate", *NOWHERE, "--prompt", "a\udcff"], r"--prompt 'a\udcff' is not UTF-8"),
        (["evaluate", "--checkpoint", "nowhere", "--data", "x"], "nowhere: no such folder"),
        (["evaluate", *NOWHERE, "--data", "x", "--batch_size", "0"], "--batch_size 0: use 1"),
        (["evaluate", *NOWHERE, "--data", "x", "--protocol", "official"], "--protocol has no"),
        (["evaluate", *NOWHERE, "--text", "x", "--split", "train"], "--split has no meaning"),
        (["evaluate", "--checkpoint", "nowhere"], "--data"),
        (["train", "--config", "nowhere.py", "--workdir", "w"], "nowhere.py: no such file"),
        (["train", "--config", "a.py", "--workdir", "w", "--conifg.a=1"], "--conifg.a=1"),
        (["convert", "--to", "hf", "--output", "x"], "needs --checkpoint"),
        (["prepare", "--input", "a.txt", "--vocab_size", "9", "--output", "x"], "--vocab_size 9"),
    ],
)
def test_mistakes_exit_2_and_name_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run(capsys, *arguments)
    assert status == 2 and message in text, text
    assert "Traceback" not in text


def test_a_flag_of_several_files_that_is_given_twice_takes_all(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(command, "prepare", lambda inputs, *_, **rest: taken.append((inputs, rest)))
    with pytest.raises(AttributeError):  # there is no dataset to speak of
        flags = "--input a b --valid_input c --input d --valid_input e f --output o"
        main(["prepare", *flags.split()])
    ((inputs, rest),) = taken
    assert (inputs, rest["valid_inputs"]) == (["a", "b", "d"], ["c", "e", "f"])


def test_python_m_is_the_same_command():
    out = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", "--version"], capture_output=True, text=True
    )
    assert out.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", out.stdout)


def test_a_reader_that_has_enough_ends_the_program_quietly():
    """As in `mobilellm ... | head`, where head is already gone."""
    read, write = os.pipe()
    os.close(read)
    arguments = ["-m", "mobilellm_jax", "convert", "--estimate"]
    done = subprocess.run([sys.executable, *arguments], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_not_hidden(monkeypatch):
    from mobilellm_jax.export import command

    def broken(args):
        raise BrokenPipeError

    monkeypatch.setattr(command, "main", broken)
    with pytest.raises(BrokenPipeError):
        main(["convert", "--estimate"])


CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32, sharing="reverse", num_repeats=2)
    config.train.update(num_steps=3, global_batch_size=8)
    config.optimizer.update(peak_lr=1e-2, warmup_steps=1)
    return config
"""


@pytest.mark.slow
def test_from_text_to_folder_and_back(capsys, tmp_path, monkeypatch):
    """prepare, train, evaluate, generate and convert, each fed with what the last one wrote."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "text").mkdir()
    for number, document in enumerate(make_documents(40)):
        (tmp_path / "text" / f"{number}.txt").write_text(document)

    def mobilellm(line):
        status, text = run(capsys, *shlex.split(line))
        assert status == 0, text
        return text

    mobilellm(
        "prepare --input text --vocab_size 300 --sequence_length 32 --valid_fraction 0.2 "
        "--workers 1 --output data"
    )
    mobilellm("train --config config.py --workdir run --config.data.path=data --config.mesh.data=8")
    measured = mobilellm("evaluate --checkpoint run --data data --output figures.json")
    assert re.search(r"perplexity +\d", measured) and (tmp_path / "figures.json").exists()
    written = mobilellm('generate --checkpoint run --prompt "the cat" --max_tokens 8 --seed 1')
    assert written.startswith("the cat")
    both = mobilellm('generate --checkpoint run --prompt "the" --prompt "a dog" --max_tokens 4')
    assert "--- 1\nthe" in both and "--- 2\na dog" in both
    mobilellm("convert --to hf --checkpoint run --output folder")
    mobilellm("convert --from hf --input folder --output imported")

    figures = [
        re.findall(r"loss +([\d.]+)", mobilellm(f"evaluate --checkpoint {path} --data data"))
        for path in ("run", "run/checkpoints/3", "folder", "imported")
    ]
    assert figures[0] and all(found == figures[0] for found in figures)
    greedy = [
        mobilellm(f'generate --checkpoint {path} --prompt "the" --max_tokens 8 --temperature 0')
        for path in ("run", "folder", "imported")
    ]
    assert len(set(greedy)) == 1


def test_the_flags_of_evaluate_and_generate_arrive(capsys, monkeypatch):
    model = types.SimpleNamespace(config=tiny())
    header = types.SimpleNamespace(sequence_length=8)
    dataset = types.SimpleNamespace(header=header)
    monkeypatch.setattr(loading, "load_text_model", lambda *_: model)
    monkeypatch.setattr(Dataset, "open", {"d": dataset}.get)
    asked = []

    def measure(*arguments, execution, **settings):
        asked.append((*arguments, settings))
        return perplexity.Perplexity(1.0, 3, 1.0, 2, 3.0)

    def write(*arguments, on_text, **settings):
        asked.append((*arguments, settings))
        return ["b"]

    monkeypatch.setattr(perplexity, "dataset_perplexity", measure)
    monkeypatch.setattr(generation, "encode_prompts", lambda *_: None)
    monkeypatch.setattr(generation, "generate", write)
    flags = "--checkpoint run --data d --split train --batch_size 3 --max_records 5"
    assert run(capsys, "evaluate", *flags.split())[0] == 0
    monkeypatch.setattr(perplexity, "official_perplexity", measure)
    monkeypatch.setattr(perplexity, "official_text", str.upper)
    for flags, said in (
        ("", "on t, official protocol:"),
        ("--chunk 2048", "on t, official protocol:"),
        ("--chunk 9 --max_chunks 5", "on t, first 5 chunks of 9 tokens: not the official protocol"),
    ):
        status, text = run(capsys, "evaluate", *f"--checkpoint run --text t {flags}".split())
        assert status == 0 and said in text
    flags = "--checkpoint run --prompt a --max_tokens 4 --temperature 2 --top_k 6 --top_p 0.5"
    assert run(capsys, "generate", *flags.split(), "--seed", "7")[0] == 0
    sampling = Sampling(temperature=2.0, top_k=6, top_p=0.5)
    assert asked == [
        (model, dataset, "train", {"batch_size": 3, "max_records": 5}),
        (model, "T", {"chunk": 2048, "max_chunks": None, "progress": True}),
        (model, "T", {"chunk": 2048, "max_chunks": None, "progress": True}),
        (model, "T", {"chunk": 9, "max_chunks": 5, "progress": True}),
        (model, ["a"], {"max_tokens": 4, "sampling": sampling, "seed": 7}),
    ]


@pytest.mark.parametrize(
    ("output", "message"), [("no/f.json", "No such file"), (".", "is a folder")]
)
def test_evaluate_refuses_an_output_before_it_reads_a_model(
    capsys, tmp_path, monkeypatch, output, message
):
    monkeypatch.chdir(tmp_path)
    flags = ("--checkpoint", "absent", "--data", "absent", "--output", output)
    status, text = run(capsys, "evaluate", *flags)
    assert status == 2 and message in text and "checkpoint" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(DOCUMENTS, 300, folder / "t.model")
    config = tiny(vocab_size=300, max_seq_len=16)
    mobilellm_jax.save_hf(
        folder / "m", config, random_params(config), tokenizer_model=tokenizer.model_bytes
    )
    return folder / "m"


def test_a_prompt_longer_than_the_context_is_refused_before_it_is_printed(capsys, small_model):
    prompt = "cat dog " * 40
    status, text = run(capsys, "generate", "--checkpoint", small_model, "--prompt", prompt)
    assert status == 2 and prompt not in text
    assert re.search(r"prompt 1 has \d+ tokens, the context .* holds 16", text)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"cat", "cat"),
        (b"cat\n", "cat"),
        (b"cat\r\n", "cat"),
        (b"\ncat \n\n", "\ncat \n"),
        (b"\xef\xbb\xbfcat", "cat"),
    ],
)
def test_a_prompt_file_loses_one_line_end_and_its_mark(
    tmp_path, monkeypatch, small_model, content, prompt
):
    asked = []
    monkeypatch.setattr(generation, "generate", lambda _, prompts, **__: asked.extend(prompts))
    (tmp_path / "p").write_bytes(content)
    main(["generate", "--checkpoint", str(small_model), "--prompt_file", str(tmp_path / "p")])
    assert asked == [prompt]


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of macOS refuse the name")
@pytest.mark.parametrize(
    ("output", "status", "message"),
    [(b"out", 0, b"out: 1 inputs"), (b"caf\xe9", 2, rb"'caf\udce9', which is not UTF-8")],
)
def test_names_that_are_not_utf8_are_read_or_refused(tmp_path, output, status, message):
    """As where a file was named in Latin-1; ArrayRecord cannot write to such a folder."""
    (tmp_path / "caf\udce9.txt").write_text("\n".join(DOCUMENTS))
    flags = [b"--input", b"caf\xe9.txt", b"--vocab_size", b"300", b"--sequence_length", b"32"]
    done = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", "prepare", *flags, "--output", output],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
    )
    assert done.returncode == status and message in done.stdout + done.stderr, done.stderr
    assert b"Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"] * (status == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=1"])
def test_training_asks_for_large_pages_unless_told_otherwise(own, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("import os\nprint(os.getpid(), os.environ.get('GLIBC_TUNABLES'))\n")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    with subprocess.Popen(
        [sys.executable, "-m", "mobilellm_jax", "train", "--config", config, "--workdir", tmp_path],
        env=environment | ({"GLIBC_TUNABLES": own} if own else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate()
    assert out == f"{process.pid} {own or 'glibc.malloc.hugetlb=1'}\n"  # once, the same process
    assert process.returncode == 2 and "get_config" in err
