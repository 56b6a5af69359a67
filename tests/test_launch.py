"""launch/: the scripts behave, the manifests and the Dockerfile say what the code understands.

Schedulers are stand-ins on PATH that note how they were called, but for one slow test, which runs a
real Slurm where Debian's slurmctld and slurmd are installed. docs/launch.md says what else was run.
"""

import argparse
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from prepared import make_documents, run_prepare, write_lines

from mobilellm_jax.training import command
from mobilellm_jax.training.run_config import load_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
SECONDS = 120.0  # for anything here to happen

CONFIG = """
from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=16, ffn_dim=32,
        head_dim=8, vocab_size=300, max_seq_len=32)
    config.train.update(num_steps=1000, global_batch_size=2)
    config.optimizer.update(peak_lr=1e-3, warmup_steps=2)
    config.log.every_steps = 1
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 1000
    return config
"""


def tool(name):
    """A checker from its pip package, beside this Python, or from the system."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
    return found


@pytest.fixture
def stand_ins(tmp_path):
    """A function that puts a script on PATH; all of them append their arguments to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, body="exit 0"):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)

    add.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    add.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return add


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return value


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "Dockerfile"], ids=lambda path: path.name)
def test_scripts_and_dockerfile_pass_their_linters(path):
    linter = tool("hadolint" if path.name == "Dockerfile" else "shellcheck")
    subprocess.run([linter, path], check=True)


def test_the_page_names_every_file_of_the_room():
    page = (ROOT / "docs" / "launch.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name not in page] == []


# launch/train.py


def load_train():
    spec = importlib.util.spec_from_file_location("launch_train", LAUNCH / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_heavy_is_imported_before_signals_are_answered():
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, LAUNCH / "train.py"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("status", "steps", "expected"),
    [(0, [], 75), (0, [900], 75), (0, [900, 1000], 0), (0, [2000], 0), (2, [900], 2), (75, [], 75)],
)
def test_only_a_saved_last_step_is_a_success(tmp_path, monkeypatch, status, steps, expected):
    (tmp_path / "config.py").write_text(CONFIG)
    for step in steps:
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    train = load_train()
    monkeypatch.setattr(train.cli, "main", lambda arguments: status)
    config = ["--config", str(tmp_path / "config.py"), "--config.seed=3"]
    assert train.main([*config, "--workdir", str(tmp_path / "run")]) == expected


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "config.py").write_text(CONFIG)
    lines = write_lines(folder / "text.jsonl", make_documents(200))
    run_prepare([lines], folder / "data", vocab_size=300, valid_fraction=0.1)
    return folder


@pytest.mark.slow
def test_a_stopped_run_fails_and_the_finished_one_succeeds(home):
    command = [
        sys.executable, LAUNCH / "train.py", "--config", home / "config.py", "--workdir",
        home / "stopped", f"--config.data.path={home / 'data'}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("step ") for line in process.stdout)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 75
    (stopped,) = (home / "stopped" / "checkpoints").iterdir()
    command.append(f"--config.train.num_steps={int(stopped.name) + 1}")
    assert subprocess.run(command, env=environment, timeout=SECONDS).returncode == 0


# launch/local.sh


def test_local_passes_arguments_status_and_signals_and_appends_to_its_log(tmp_path, stand_ins):
    body = "echo begun; trap 'echo saved; exit 3' TERM; for _ in {1..600}; do sleep 0.1; done"
    stand_ins("mobilellm", body)
    settings = {"CONFIG": "configs/125m.py:h100-8", "DATA": "my data", "WORKDIR": str(tmp_path)}
    log = tmp_path / "logs" / "local.log"
    for run in (1, 2):
        with subprocess.Popen(
            [LAUNCH / "local.sh", "--config.seed=1"],
            env=stand_ins.environment | settings,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            wait_for(lambda n=run: log.exists() and log.read_text().count("begun") == n)
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "begun\nsaved\n"
        assert process.returncode == 3
        assert log.read_text().count("saved") == run
    arguments = f"train --config configs/125m.py:h100-8 --workdir {tmp_path} "
    arguments += "--config.data.path=my data --num_processes 1 --config.seed=1"
    assert stand_ins.calls() == [f"mobilellm {arguments}"] * 2


# launch/slurm.sbatch


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (134, 49, True), (1, 50, False)],
)
def test_slurm_starts_again_what_a_restart_can_mend(
    tmp_path, stand_ins, status, restarts, requeued
):
    stand_ins("srun", f"exit {status}")
    stand_ins("scontrol")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3"}
    job |= {"SLURM_RESTART_COUNT": str(restarts), "WORKDIR": str(tmp_path / "run")}
    script = ["bash", LAUNCH / "slurm.sbatch", "--config.seed=1"]
    assert subprocess.run(script, env=stand_ins.environment | job).returncode == status
    srun, *rest = stand_ins.calls()
    assert "--cpus-per-task=3" in srun and srun.endswith("--config.seed=1")
    assert f"--output={tmp_path}/run/logs/slurm-%j-%t.log" in srun
    assert rest == (["scontrol requeue 7"] if requeued else [])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node with two GPUs that are none; its environment."""
    commands = ("slurmctld", "slurmd", "sbatch")
    if None in [shutil.which(name, path="/usr/bin:/usr/sbin") for name in commands]:
        pytest.skip("apt-get install slurmctld slurmd slurm-client")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    node = socket.gethostname().partition(".")[0]
    (tmp_path / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
    (tmp_path / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
""")
    (tmp_path / "state").mkdir()
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    environment["PATH"] += ":/usr/sbin"
    with open(tmp_path / "daemons.log", "w") as log:
        daemons = [
            subprocess.Popen([name, "-D"], env=environment, stdout=log, stderr=log)
            for name in ("slurmctld", "slurmd")
        ]
        try:
            yield environment
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment, timeout=30)
            time.sleep(2)  # for slurmd to end what runs
            for daemon in daemons:
                daemon.terminate()
                daemon.wait(timeout=30)


@pytest.mark.slow
def test_a_real_slurm_starts_a_stopped_job_again_and_it_goes_on(home, slurm):
    def ask(*command):
        return subprocess.run(command, env=slurm, capture_output=True, text=True).stdout.strip()

    wait_for(lambda: ask("sinfo", "--noheader", "--format=%T") == "idle")
    settings = {"CONFIG": home / "config.py", "DATA": home / "data", "WORKDIR": home / "slurm"}
    settings |= {"VENV": sys.prefix, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    submit = [
        "sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1",
        f"--output={home}/slurm.out", LAUNCH / "slurm.sbatch", "--config.train.num_steps=400",
    ]  # fmt: skip
    environment = slurm | {name: str(value) for name, value in settings.items()}
    job = subprocess.check_output(submit, env=environment, cwd=ROOT, text=True).strip()
    logs = [home / "slurm" / "logs" / f"slurm-{job}-{process}.log" for process in (0, 1)]
    wait_for(lambda: logs[0].exists() and "step   3/400" in logs[0].read_text())
    ask("scancel", "--signal=TERM", job)
    wait_for(lambda: ask("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "PENDING")
    wait_for(lambda: "JobState=COMPLETED" in ask("scontrol", "show", "job", job))
    first = logs[0].read_text()
    assert re.search(r"devices  2 x cpu", first)
    saved = int(re.search(r"stopped by a signal, step (\d+) is saved", first)[1])
    assert f"resuming from step {saved}" in first
    assert all("finished: step 400" in log.read_text() for log in logs)


# launch/tpu_vm.sh


GCLOUD = """
state="$HOME/state"; touch "$state"
case "$*" in
*queued-resources\\ describe*) s=$(head -1 "$state"); sed -i 1d "$state"; [[ $s ]] && echo "$s" ;;
*queued-resources\\ create*) printf '%s\\n' PROVISIONING ACTIVE SUSPENDED ACTIVE >>"$state" ;;
*queued-resources\\ delete*) : >"$state" ;;
*SubState*) printf 'ExecMainStatus=0\\nSubState=%s\\n' \
    "$([[ $(grep -c create "$HOME/calls") = 2 ]] && echo exited || echo running)" ;;
esac
"""


def test_tpu_vm_asks_again_after_a_preemption_and_ends_with_the_run(tmp_path, stand_ins):
    stand_ins("gcloud", GCLOUD)
    settings = {"TPU": "t", "ZONE": "z", "NFS": "h:/s", "DATA": "/shared/d", "POLL": "0"}
    settings |= {"CONFIG": "configs/1.5b.py:v5e-256", "WORKDIR": "/shared/r"}
    environment = stand_ins.environment | settings
    script = [LAUNCH / "tpu_vm.sh", "--config.seed=1"]
    subprocess.run(script, env=environment, cwd=ROOT, timeout=SECONDS, check=True)
    verbs = [re.search(r"describe|create|delete|scp|SubState|tar", c)[0] for c in stand_ins.calls()]
    once = ["describe", "create", "describe", "describe", "scp", "tar", "SubState", "describe"]
    assert verbs == [*once, "delete", *once[:-1]]
    (start, _) = (call for call in stand_ins.calls() if "tpu_vm_host.sh" in call)
    host = shlex.split(start.partition("tpu_vm_host.sh ")[2])
    assert host[:2] == ["h:/s", "/shared/r"]
    parse_train(host[2:])


SUDO = """
case $1 in
tee) cat >"$HOME/$(basename "${@: -1}")" ;;
esac
"""


def test_a_tpu_host_gets_a_service_that_restarts_all_but_mistakes(tmp_path, stand_ins):
    for name, body in {
        "sudo": SUDO,
        "systemctl": "exit 1",
        "mountpoint": "",
        "python3": "",
    }.items():
        stand_ins(name, body)
    for path in (".local/bin/uv", "venv/bin/python"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / path).chmod(0o755)
    arguments = ["--workdir", f"{tmp_path}/my run", "--config.data.path=a b"]
    script = [LAUNCH / "tpu_vm_host.sh", "host:/share", f"{tmp_path}/my run", *arguments]
    subprocess.run(script, env=stand_ins.environment | {"USER": "me"}, check=True)
    unit = (tmp_path / "mobilellm.service").read_text().splitlines()
    assert {"Restart=on-failure", "RestartPreventExitStatus=2", "KillMode=mixed"} <= set(unit)
    assert "sudo systemctl restart mobilellm" in stand_ins.calls()
    train = subprocess.check_output(["bash", tmp_path / "train.sh"], text=True).splitlines()
    assert train == [str(LAUNCH / "train.py"), *arguments]


# launch/jobset_*.yaml


def parse_train(arguments):
    """The arguments as `mobilellm train` reads them, and the config that they name."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    command.add_arguments(parser)
    args, overrides = parser.parse_known_args(arguments)
    return args, load_config(str(ROOT / args.config), overrides)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_job_sets_end_together_and_restart_all_but_mistakes(manifest):
    spec = yaml.safe_load(manifest.read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (job,) = (replicated["template"]["spec"] for replicated in spec["replicatedJobs"])
    assert job["backoffLimit"] == 0 and job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    (container,) = pod["containers"]
    assert list(rule["onExitCodes"].values()) == [container["name"], "In", [2]]
    assert "command" not in container  # the image's entry point is launch/train.py
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_job_sets_ask_for_the_devices_of_their_config(manifest):
    job_set = yaml.safe_load(manifest.read_text())
    name, (group,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod, hosts = job["template"]["spec"], job["parallelism"]
    (container,) = pod["containers"]
    ((resource, per_host),) = container["resources"]["limits"].items()
    given = [argument.replace("$(INDEX)", "0") for argument in container["args"]]
    args, config = parse_train(given)
    mesh = config.mesh
    assert hosts * per_host == mesh.data * mesh.fsdp * mesh.tensor
    if resource == "google.com/tpu":  # GKE's variables tell JAX who takes part
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert hosts * per_host == math.prod(map(int, topology.split("x")))
        assert args.num_processes is None
    else:
        assert args.num_processes == hosts
        assert args.coordinator.startswith(f"{name}-{group['name']}-0-0.{name}:")
        assert "--process_id=$(INDEX)" in container["args"]


# launch/Dockerfile


def test_the_image_is_pinned_not_root_and_gets_all_it_copies():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match("[A-Z]", line)]
    assert re.search(r"^ARG PYTHON=python:3\.\d+\.\d+-slim", text, re.M)
    assert steps[-1] == ["ENTRYPOINT", '["python", "launch/train.py"]']  # not through a shell
    assert ["USER", "1000:1000"] in steps
    kept = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()}
    copied = [words.split() for verb, words in steps if verb == "COPY"]
    assert {source for source, _, *rest in copied if not rest} - {"."} <= kept
    assert all((ROOT / path).exists() for path in kept if re.match(r"\w", path))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    used = {f"jax[{extra}]" for extra in re.findall(r"\bJAX=(\w+)", text)}
    assert used == {*extras["cuda"], *extras["tpu"]}
