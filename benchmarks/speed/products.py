"""`products`: every matrix product of a training step by itself, against torch's.

A layer has three: forward (x W), the gradient of its input (dy W^T) and that of its weight
(x^T dy); operands lie in memory as they do in the step, the head's table as [V, D]. What products
reach here and a step does not is lost between them.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.speed import torch_peers
from benchmarks.speed.measure import run_alone, summary
from benchmarks.speed.results import Benchmark
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import compute_dtype

_SECONDS_PER_PRODUCT = 0.5
_ROUNDS = 3  # that the two sides take turns

EPILOG = """\
example:
  python -m benchmarks.speed products --preset 125m --batch_size 2 --sequence_length 512
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16")


def products(config: ModelConfig, num_tokens: int) -> dict[str, tuple[str, int, int, int]]:
    """Name -> (which operands are transposed, M, K, N): `[M, K] x [K, N]`."""
    D, T = config.embed_dim, num_tokens
    heads = config.num_heads * config.head_dim
    layers = {
        "query": (D, heads),
        "key": (D, config.num_kv_heads * config.head_dim),
        "output": (heads, D),
        "up": (D, config.ffn_dim),
        "down": (config.ffn_dim, D),
    }
    found = {}
    for name, (wide_in, wide_out) in layers.items():
        found[f"{name}, forward"] = ("", T, wide_in, wide_out)
        found[f"{name}, input"] = ("right", T, wide_out, wide_in)
        found[f"{name}, weight"] = ("left", wide_in, T, wide_out)
    found["head, forward"] = ("right", T, D, config.vocab_size)
    found["head, input"] = ("", T, config.vocab_size, D)
    found["head, weight"] = ("left", D, T, config.vocab_size)
    return found


def measure(bench: Benchmark) -> None:
    """FLOP/s of each product and the ratio to torch's."""
    args = bench.args
    dtype, platform = compute_dtype(args.dtype, bench.device["platform"]), bench.device["platform"]
    bench.settings = {
        "model": bench.config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "execution": {"dtype": dtype},
        "platform": platform,
    }
    sides = {"jax": jax_products}
    if torch_peers.installed("torch", platform):
        sides["torch"] = torch_products
    seconds: dict[str, dict[str, list]] = {name: {} for name in sides}
    for _ in range(_ROUNDS):
        for name, function in sides.items():
            settings = bench.settings | {"samples": args.samples}
            for product, times in run_alone(function, settings).items():
                seconds[name].setdefault(product, []).extend(times)
    num_tokens = args.batch_size * args.sequence_length
    for product, (_, M, K, N) in products(bench.config, num_tokens).items():
        side = {"seconds": summary(seconds["jax"][product])}
        side["flops_per_second"] = 2 * M * K * N / side["seconds"]["median"]
        if "torch" in seconds:
            theirs = summary(seconds["torch"][product])["median"]
            side["torch_seconds"] = theirs
            side["speed_of_torch"] = theirs / side["seconds"]["median"]
        bench.sides[product] = side


def timed_products(settings: dict, prepare: Callable) -> dict[str, list[float]]:
    """Samples of the seconds of each product.

    Args:
      prepare: from two arrays and which of them is transposed to a function that does that many
        products and waits for them.
    """
    config = ModelConfig.from_dict(settings["model"])
    num_tokens = settings["batch_size"] * settings["sequence_length"]
    rng, found = np.random.default_rng(0), {}
    for name, (transposed, M, K, N) in products(config, num_tokens).items():
        left = rng.standard_normal((K, M) if transposed == "left" else (M, K), np.float32)
        right = rng.standard_normal((N, K) if transposed == "right" else (K, N), np.float32)
        run = prepare(left, right, transposed)
        run(2)
        start = time.perf_counter()
        run(1)
        one = time.perf_counter() - start
        samples = settings["samples"]
        count = max(1, round(_SECONDS_PER_PRODUCT / samples / one))
        found[name] = []
        for _ in range(samples):
            start = time.perf_counter()
            run(count)
            found[name].append((time.perf_counter() - start) / count)
    return found


def jax_products(settings: dict) -> dict[str, list[float]]:
    """Our side: one jitted `dot_general` each."""
    import jax
    import jax.numpy as jnp

    dtype = settings["execution"]["dtype"]

    def prepare(left, right, transposed):
        left, right = (jnp.asarray(x, dtype) for x in (left, right))
        axes = ((0,) if transposed == "left" else (1,), (1,) if transposed == "right" else (0,))
        multiply = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (axes, ((), ()))))

        def run(count):
            for _ in range(count):
                out = multiply(left, right)
            out.block_until_ready()

        return run

    return timed_products(settings, prepare)


def torch_products(settings: dict) -> dict[str, list[float]]:
    """Torch's side: `torch.mm` of each."""
    import torch

    device = torch_peers.torch_device(settings["platform"])
    torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, settings["execution"]["dtype"])

    def prepare(left, right, transposed):
        left, right = (torch.from_numpy(x).to(device, dtype) for x in (left, right))
        left = left.T if transposed == "left" else left
        right = right.T if transposed == "right" else right

        def run(count):
            for _ in range(count):
                torch.mm(left, right)
            torch_peers.synchronize(device)

        return run

    return timed_products(settings, prepare)
