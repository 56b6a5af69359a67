"""Ctrl-C and SIGTERM at any moment: one line, status 130 or 143, nothing half-written."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_cases import random_params, tiny
from prepared import make_documents, run_prepare, write_lines

import mobilellm_jax
from mobilellm_jax.tokenizers.sentencepiece import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = {signal.SIGINT: (130, "interrupted\n"), signal.SIGTERM: (143, "terminated\n")}
both = pytest.mark.parametrize("number", SIGNALS)
pytestmark = pytest.mark.usefixtures("as_in_a_terminal")

START = """
import sys
from mobilellm_jax import interrupts
interrupts.take_over()
from mobilellm_jax import cli
cli.VERBS["work"] = ("work", "what a test makes it do")
sys.exit(cli.main())
"""
WORK = """
import hashlib, sys, time
from pathlib import Path
from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import atomic_folder

def ready():
    print("ready", flush=True)

def wait():
    ready()
    for _ in range(3000):
        time.sleep(0.01)

def crash_at_exit():
    import atexit, ctypes
    atexit.register(ctypes.string_at, 0)
    wait()

def compute():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # a minute of C without the GIL

def swallow():
    try:
        wait()
    except BaseException:
        time.sleep(60)

def swallow_for_long():
    interrupts._UNWIND_SECONDS = 60
    swallow()

def train():
    from mobilellm_jax.machine.signals import StopRequest
    StopRequest().listen()
    compute()

def blame():
    try:
        wait()
    except BaseException as error:
        raise UserError("a reader in C++ failed") from error

class Destroyed:
    def __del__(self):
        wait()

def destroy():
    Destroyed()
    time.sleep(60)

def swallow_in_an_import():
    import swallowing

def read_by_an_import():
    from mobilellm_jax.data.encoding import encode_in_order
    from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer
    def documents():
        yield swallow_in_an_import()
    tokenizer = SentencePieceTokenizer.load("tokenizer.model")
    list(encode_in_order(documents(), tokenizer, bos=True, eos=True, num_workers=2))

def add_arguments(parser):
    parser.add_argument("what")

def main(args):
    interrupts._UNWIND_SECONDS = 0.5
    with atomic_folder(Path("out"), writer="test") as folder:
        (folder / "half").write_text("half")
        globals()[args.what]()
"""


def start(folder, *arguments, **settings):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.fixture
def works(tmp_path):
    """Starts the verb of `WORK`; returns its process when it is ready."""
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "swallowing.py").write_text("from work import swallow\nswallow()\n")

    def works(what):
        process = start(tmp_path, "-c", START, "work", what)
        assert process.stdout.readline() == "ready\n", process.communicate()
        return process

    return works


@both
@pytest.mark.parametrize(
    "what",
    ["wait", "compute", "swallow", "blame", "destroy", "swallow_in_an_import", "crash_at_exit"],
)
def test_whatever_a_verb_does_a_signal_ends_it(works, tmp_path, what, number):
    with works(what) as process:
        time.sleep(0.05)
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` does
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == SIGNALS[number]
    assert not list(tmp_path.glob("out*"))


def test_a_second_signal_ends_at_once(works):
    with works("swallow_for_long") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == SIGNALS[signal.SIGINT]


def test_a_second_signal_ends_training_within_a_step_of_minutes(works, tmp_path):
    with works("train") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    # The first one may have come before C: then it is said that a step will be saved.
    assert process.returncode == 143 and errors.endswith("terminated\n")
    assert not list(tmp_path.glob("out*"))


def test_a_signal_while_a_reader_is_imported_leaves_no_worker_behind(works, tmp_path):
    train_tokenizer([" ".join(make_documents(9))], 300, tmp_path / "tokenizer.model")
    with works("read_by_an_import") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == SIGNALS[signal.SIGTERM]


def test_what_is_ignored_stays_ignored(works):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, and the background of a script
    with works("wait") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143


@both
def test_a_signal_while_the_process_is_started_again_is_not_lost(tmp_path, number):
    program = (
        "import os, signal, sys\n"
        "from mobilellm_jax import interrupts\n"
        "interrupts.take_over()\n"
        "if len(sys.argv) == 1:\n"
        "    with interrupts.blocked(signal.SIGINT, signal.SIGTERM):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        os.execv(sys.executable, [*sys.orig_argv, 'again'])\n"
        "print('goes on')\n"
    )
    output, errors = start(tmp_path, "-c", program).communicate(timeout=20)
    assert (output, errors) == ("", SIGNALS[number][1])


CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32)
    config.train.update(num_steps=10_000, global_batch_size=8)
    return config
"""
VERBS = [
    "prepare --input text.jsonl --vocab_size 300 --sequence_length 32 --workers 2 --output out",
    "doctor --config config.py --config.data.path=data --workdir out",
    "train --config config.py --config.data.path=data --workdir out",
    "evaluate --checkpoint model --data data --output out",
    "generate --checkpoint model --prompt the --max_tokens 60",
    "convert --to hf --checkpoint model --output out",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config, text, a dataset of it and a model."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "config.py").write_text(CONFIG)
    documents = make_documents(4000)
    write_lines(folder / "text.jsonl", 12 * documents)  # 10 MB: seconds for several workers
    part = write_lines(folder / "part.jsonl", documents)
    run_prepare([part], folder / "data", vocab_size=300, valid_fraction=0.1)
    config = tiny(vocab_size=300)
    tokenizer = (folder / "data" / "tokenizer.model").read_bytes()
    mobilellm_jax.save_hf(
        folder / "model", config, random_params(config), tokenizer_model=tokenizer
    )
    return folder


def wait_until_handled(process):
    """Until the process has passed our first lines: what Python does before is not ours."""
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("command", VERBS)
def test_a_signal_at_a_random_moment_ends_every_verb(home, tmp_path, command):
    chance = random.Random(command)
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    inputs = set(tmp_path.iterdir())
    for longest, number in itertools.product((0.5, 2.0), SIGNALS):
        status, line = SIGNALS[number]
        process = start(tmp_path, "-m", "mobilellm_jax", *command.split(), start_new_session=True)
        wait_until_handled(process)
        time.sleep(chance.uniform(0, longest))
        os.killpg(process.pid, number)  # a terminal sends it to the workers, too
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status and errors.endswith(line), errors
        assert not re.search("Traceback|ignored|leaked", errors)
        left = set(tmp_path.iterdir()) - inputs
        assert not left or command.startswith("train")  # its workdir may be there
