"""Load, init and execute times of 125m, 125m_ls and 60 unshared layers in ExecuTorch.

    python benchmarks/phone_latency.py --workdir /tmp/latency
    python benchmarks/phone_latency.py --workdir /tmp/latency --threads 1

The paper's claim (arXiv 2402.14905, section 3): run on a phone, layer sharing costs 2% to load and
init and 3% to execute, twice the layers cost 143% and 86%. It measured fp16 models on the GPU of an
iPhone 13; here they are fp32 programs with random weights, executed by this machine's CPU, so only
ratios to 125m can be compared:

  load      reading the file into memory, and the program's header
  init      loading the method, where XNNPACK packs the weights for its kernels
  execute   one decoding step after a prompt of 64 tokens; and reading that prompt at once
  memory    most that the process held, less what it held before

Each is measured without XNNPACK's weight cache, the default of the Python package, and with it, the
default of the Android and Apple libraries: without it a shared block is packed once per visit. A
process per model and setting, in turns, several rounds; medians. Writing the programs takes a
quarter of an hour and 6 GB of memory the first time; with --workdir they are found again. Nothing
else may run on the machine. Needs Linux and the extra `executorch`.
"""

import argparse
import ctypes
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

from mobilellm_jax.model.costs import matmul_params_per_token
from mobilellm_jax.model.presets import PRESETS

MODELS = {
    "125m": PRESETS["125m"],
    "125m_ls": PRESETS["125m_ls"],
    "60 layers": dataclasses.replace(PRESETS["125m"], num_layers=60),
}
PAPER_MS = {  # load, init, execute
    "125m": (39.2, 1361.7, 15.6),
    "125m_ls": (43.6, 1388.2, 16.0),
    "60 layers": (68.6, 3347.7, 29.0),
}
BASE = "125m"
MEASURES = ("load", "init", "execute", "prompt", "memory")
PROMPT_TOKENS = 64


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="where the programs stay for the next time")
    parser.add_argument("--rounds", type=int, default=5, help="processes per model and setting")
    parser.add_argument("--steps", type=int, default=50, help="decoding steps per process")
    parser.add_argument("--threads", type=int, help="of XNNPACK (default: what it takes itself)")
    parser.add_argument("--context_length", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or Path(temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        paths = {name: program(workdir, name, args.context_length) for name in MODELS}
        print_results(take_turns(paths, args))


def program(workdir: Path, name: str, context_length: int) -> Path:
    """The program of a model, written in a process of its own if it is not there yet."""
    version = metadata.version("executorch")
    path = workdir / f"{name.replace(' ', '_')}-{context_length}-executorch-{version}.pte"
    if not path.exists():
        print(f"writing {path} ...", flush=True)
        start = time.perf_counter()
        in_process(write_program, path, name, context_length)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return path


def write_program(path: Path, name: str, context_length: int) -> None:
    import jax

    from mobilellm_jax.export.executorch.export import write_pte
    from mobilellm_jax.model.transformer import init_params
    from mobilellm_jax.model_bundle import ModelBundle

    config = MODELS[name]
    params = init_params(config, jax.random.key(0))
    partial = path.with_suffix(".partial")
    write_pte(partial, ModelBundle(config=config, params=params), context_length=context_length)
    os.replace(partial, path)


def in_process(function, *arguments):
    """The result of a function that runs in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def take_turns(paths: dict[str, Path], args) -> dict[tuple[str, bool], dict[str, float]]:
    """Medians by (model, whether with the weight cache); seconds and bytes."""
    samples = {(name, cached): [] for cached in (False, True) for name in paths}
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", flush=True)
        for name, cached in samples:
            samples[name, cached].append(
                in_process(measure, paths[name], cached, args.steps, args.threads)
            )
    return {
        side: {what: statistics.median(sample[what] for sample in found) for what in MEASURES}
        for side, found in samples.items()
    }


def measure(path: Path, cached: bool, num_steps: int, num_threads: int | None) -> dict[str, float]:
    """One process' times and memory."""
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers operators)
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    runtime = Runtime.get()
    set_weight_cache(cached)
    if num_threads:
        _unsafe_reset_threadpool(num_threads)
    held_before = memory_bytes("VmRSS")
    times = [time.perf_counter()]
    path.read_bytes()
    loaded = runtime.load_program(path)  # maps the file, as the phone libraries do
    times.append(time.perf_counter())
    execute = loaded.load_method("forward").execute
    times.append(time.perf_counter())

    prompt = torch.randint(0, 32_000, (1, PROMPT_TOKENS))
    prompts, steps = [], []
    for _ in range(6):
        start = time.perf_counter()
        execute([prompt, torch.tensor([0])])
        prompts.append(time.perf_counter() - start)
    for number in range(num_steps + 3):
        start = time.perf_counter()
        execute([prompt[:, :1], torch.tensor([PROMPT_TOKENS + number])])
        steps.append(time.perf_counter() - start)
    return {
        "load": times[1] - times[0],
        "init": times[2] - times[1],
        "execute": statistics.mean(steps[3:]),  # the first ones warm up
        "prompt": statistics.mean(prompts[1:]),
        "memory": memory_bytes("VmHWM") - held_before,
    }


def memory_bytes(field: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most that it ever held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


class BackendOption(ctypes.Structure):
    """executorch::runtime::BackendOption with a bool (runtime/backend/options.h in the package)."""

    _fields_ = [
        ("key", ctypes.c_char * 64),
        ("value", ctypes.c_bool),
        ("room", ctypes.c_char * 255),
        ("kind", ctypes.c_uint8),  # of the std::variant: 0 is bool
        ("padding", ctypes.c_char * 3),
    ]


class Span(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(BackendOption)), ("size", ctypes.c_size_t)]


def set_weight_cache(enabled: bool) -> None:
    """Sets XNNPACK's weight cache, by the package's C++ interface: Python has none for options."""
    import executorch

    library = ctypes.CDLL(str(Path(executorch.__path__[0]) / "lib" / "libexecutorch.so"))
    set_option = library["_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"]
    set_option.argtypes = [ctypes.c_char_p, Span]
    option = BackendOption(key=b"weight_cache_enabled", value=enabled)
    error = set_option(b"XnnpackBackend", Span(ctypes.pointer(option), 1))
    assert error == 0, error


def print_results(results) -> None:
    print("\nmedians; GB/s: the weights that a decoding step multiplies with, over its time")
    print_row("", "load ms", "init ms", "execute ms", "prompt ms", "memory MB", "GB/s")
    for (name, cached), found in results.items():
        weights = 4 * matmul_params_per_token(MODELS[name])
        print_row(
            title(name, cached),
            *(f"{1e3 * found[what]:.1f}" for what in MEASURES[:-1]),
            f"{found['memory'] / 1e6:.0f}",
            f"{weights / found['execute'] / 1e9:.1f}",
        )
    print(f"\nratios to {BASE} with the same setting")
    print_row("", *MEASURES)
    for (name, cached), found in results.items():
        base = results[BASE, cached]
        print_row(title(name, cached), *(f"{found[what] / base[what]:.2f}" for what in MEASURES))
    for name, values in PAPER_MS.items():
        ratios = (value / base for value, base in zip(values, PAPER_MS[BASE], strict=True))
        print_row(f"{name}, paper", *(f"{ratio:.2f}" for ratio in ratios))


def title(name: str, cached: bool) -> str:
    return f"{name}, weight cache {'on' if cached else 'off'}"


def print_row(name: str, *cells: str) -> None:
    print(f"{name:28s}" + "".join(f"{cell:>12s}" for cell in cells))


if __name__ == "__main__":
    main()
