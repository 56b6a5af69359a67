"""`decode` and `prefill`: our `generate_tokens` against transformers' `generate`, both greedy.

Tokens per second of `decode` are those after the first of a generation (what a generation of one
token takes is measured too and left out); of `prefill`, those of the prompt up to its first token.
Both sides have loaded their weights before, ours laid out for decoding as by one who generates
again and again; what that takes is "layout_seconds" in the JSON.

A decoder of one row is bound by reading its weights. "of copy bandwidth" is bytes of weights read
per second over the bytes that changing a large array in place, in the same process, reads and
writes per second; "of read bandwidth", over those that the product of a large matrix and a vector
reads. What a machine that others use has of it changes by the minute: both are measured before each
sample, and the median taken. Peak memory is that of a generation before the first of these. A
shared block's weights count at each visit; keys and values, few at these lengths, do not.

Weights are spread wider than those that training begins with, which choose one token forever: equal
tokens would mean little.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.speed import jax_side, torch_peers
from benchmarks.speed.cases import random_tokens, random_weights
from benchmarks.speed.measure import Side, Workload, compare, named_if_missing
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.costs import matmul_params_per_token
from mobilellm_jax.model.execution import Execution

PEERS = ("torch", "torch.compile")
_BANDWIDTH_BYTES = {"cpu": 256 << 20}
_LARGE_BYTES = 2 << 30
_INIT_STD = 0.05

EPILOG = """\
examples:
  python -m benchmarks.speed decode --preset 125m --prompt_length 32 --num_tokens 64
  python -m benchmarks.speed prefill --preset 350m --prompt_length 1024
"""


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    parser.add_argument(
        "--prompt_length", type=int, default=32 if what == "decode" else 512, metavar="T",
        help="default %(default)s",
    )  # fmt: skip
    if what == "decode":
        parser.add_argument("--num_tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument(
        "--sides", nargs="+", choices=("jax", *PEERS), default=None, metavar="SIDE",
        help="jax, torch, torch.compile (static cache); default: jax and torch, on a GPU all",
    )  # fmt: skip


def measure_decode(bench: Benchmark) -> None:
    """Tokens per second after the first; the share of equal tokens; the share of bandwidth."""
    args = bench.args
    if args.num_tokens < 2:
        raise UserError(f"--num_tokens {args.num_tokens}: use 2 or more")
    _measure(bench, args.num_tokens)
    theirs = bench.sides.get("torch", {}).get("first")
    for name, side in bench.sides.items():
        if "error" in side:
            continue
        seconds = side["seconds"]["median"] - side["first_token_seconds"]
        if seconds <= 0:
            raise UserError(f"--num_tokens {args.num_tokens}: too few to be told from the first")
        steps_per_second = (args.num_tokens - 1) / seconds
        side["tokens_per_second"] = args.batch_size * steps_per_second
        if theirs and name != "torch":
            pairs = [
                a == b
                for row, other in zip(side["first"], theirs, strict=True)
                for a, b in zip(row, other, strict=True)
            ]
            side["same_tokens"] = sum(pairs) / len(pairs)
        if name == "jax":
            read = side["weight_bytes_per_token"] * steps_per_second
            side["of_copy_bandwidth"] = read / side["copy_bytes_per_second"]
            side["of_read_bandwidth"] = read / side["read_bytes_per_second"]


def measure_prefill(bench: Benchmark) -> None:
    """Tokens of the prompt per second."""
    _measure(bench, num_tokens=1)
    for side in bench.sides.values():
        if "error" not in side:
            tokens = bench.args.batch_size * bench.args.prompt_length
            side["tokens_per_second"] = tokens / side["seconds"]["median"]


def _measure(bench: Benchmark, num_tokens: int) -> None:
    args, config = bench.args, bench.config
    if args.prompt_length < 1 or args.prompt_length + num_tokens > config.max_seq_len:
        raise UserError(
            f"--prompt_length {args.prompt_length}: prompt and {num_tokens} new tokens have to fit "
            f"the context of {config.max_seq_len}"
        )
    platform = bench.device["platform"]
    bench.settings = {
        "model": dataclasses.replace(config, init_std=_INIT_STD).to_dict(),
        "batch_size": args.batch_size,
        "prompt_length": args.prompt_length,
        "num_tokens": num_tokens,
        "platform": platform,
        "execution": jax_side.execution_settings(args, config, bench.device, args.prompt_length),
    }
    expressible = config.ffn == "swiglu" and config.shared_kv == "own"
    peers = [p for p in PEERS if expressible and torch_peers.installed(p, platform)]
    peers = peers if platform == "gpu" else peers[:1]
    sides = []
    for name in args.sides or ["jax", *peers]:
        if name == "jax":
            sides.append(Side(name, build, bench.settings))
        elif torch_peers.installed(name, platform):
            settings = bench.settings | {"peer": name}
            sides.append(Side(name, torch_peers.build_generate, settings))
        else:
            raise UserError(f"--sides {name}: not installed; leave it out")
    bench.sides = compare(sides, num_samples=args.samples, take_turns=bench.take_turns)


def build(settings: dict) -> Workload:
    """Greedy generation of `num_tokens` tokens from random prompts."""
    with named_if_missing("decode and prefill"):
        from mobilellm_jax.inference.generate import generate_tokens
        from mobilellm_jax.inference.sampling import Sampling
        from mobilellm_jax.model.decoding import decode_weights
    config = ModelConfig.from_dict(settings["model"])
    execution = Execution(**settings["execution"])
    # In the dtype that they are read in, as one who decodes would load them.
    params = jax.tree.map(lambda w: jnp.asarray(w, execution.dtype), random_weights(config))
    shape, num_tokens = (settings["batch_size"], settings["prompt_length"]), settings["num_tokens"]

    def lay_out():
        return jax.block_until_ready(decode_weights(params, execution.dtype, num_rows=shape[0]))

    weights = lay_out() if num_tokens > 1 else None

    def continued(prompts, num_tokens):
        stream = generate_tokens(
            config, params, prompts, max_tokens=num_tokens, sampling=Sampling(temperature=0),
            execution=execution, weights=weights,
        )  # fmt: skip
        rows = [tokens.tolist() for tokens in stream]
        return [list(row) for row in zip(*rows, strict=True)]

    peaks, bandwidths = [], []

    def prompts_of(first, count):
        return [
            random_tokens(config.vocab_size, shape, i).tolist() for i in range(first, first + count)
        ]

    def prepare(first, count):
        if first and num_tokens > 1:
            peaks.append(jax_side.peak_bytes())
            bandwidths.append(memory_bandwidth())
        return prompts_of(first, count)

    def run(prompts):
        return [continued(p, num_tokens) for p in prompts]

    def facts():
        if num_tokens == 1:
            return {"peak_bytes": jax_side.peak_bytes()}
        start = time.perf_counter()
        lay_out()
        found = {"peak_bytes": peaks[0], "layout_seconds": time.perf_counter() - start}
        found |= torch_peers.first_token_seconds(lambda p: continued(p, 1), prompts_of)
        bytes_per_weight = jnp.dtype(execution.dtype).itemsize
        found["weight_bytes_per_token"] = matmul_params_per_token(config) * bytes_per_weight
        for name in bandwidths[0]:
            found[name] = statistics.median(one[name] for one in bandwidths)
        return found

    return Workload(prepare, run, facts)


def memory_bandwidth() -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of a matrix-vector product (read)."""
    platform = jax.local_devices()[0].platform
    width = 8192
    rows = _BANDWIDTH_BYTES.get(platform, _LARGE_BYTES) // (4 * width)
    matrix = jax.jit(lambda: jnp.ones((rows, width)))()
    vector = jnp.ones(width)
    product = jax.jit(jnp.matmul)
    # In place: fresh memory costs a CPU more than the copy.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    num_bytes, reading, copying = matrix.nbytes, [], []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        reading.append(time.perf_counter() - start)
    for _ in range(5):
        start = time.perf_counter()
        matrix = copy(matrix).block_until_ready()
        copying.append(time.perf_counter() - start)
    return {
        "copy_bytes_per_second": 2 * num_bytes / min(copying),
        "read_bytes_per_second": num_bytes / min(reading),
    }
