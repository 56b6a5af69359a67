"""`attention`: forward and backward pass of each kernel that runs here, and how exact each is."""

import argparse
import types

import jax
import jax.numpy as jnp

from benchmarks.speed import jax_side, torch_peers
from benchmarks.speed.measure import Side, Workload, compare
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.attention import KeyValue, causal_attention
from mobilellm_jax.model.attention_kernels import ATTENTION_KINDS, choose_attention
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import compute_dtype

EPILOG = """\
The error is ||kernel - reference|| / ||reference|| of the output and of the gradients of queries,
keys and values, of one row; the reference is the plain kernel in fp32, matrix products exact. With
"packed": tokens attend within documents of a quarter of the row.

example:
  python -m benchmarks.speed attention --preset 350m --batch_size 16 --sequence_length 2048
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16")


def measure(bench: Benchmark) -> None:
    """Times the kernels and torch's SDPA on the heads of the model."""
    args, config = bench.args, bench.config
    dtype = compute_dtype(args.dtype, bench.device["platform"])
    bench.settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "platform": bench.device["platform"],
        "execution": {"dtype": dtype},
    }
    sides = [
        Side(kind, build, bench.settings | {"kind": kind})
        for kind in runnable_kernels(bench.device, dtype, config, args.sequence_length)
    ]
    if torch_peers.installed("torch", bench.device["platform"]):
        sides.append(Side("torch", torch_peers.build_attention, bench.settings))
    bench.sides = compare(sides, num_samples=args.samples, take_turns=bench.take_turns)


def runnable_kernels(device: dict, dtype: str, config: ModelConfig, num_tokens: int) -> list[str]:
    """The names of the kernels that run on the device."""
    found = []
    for kind in ATTENTION_KINDS:
        try:
            choose_attention(
                kind,
                types.SimpleNamespace(**device),
                config,
                dtype=dtype,
                num_tokens=num_tokens,
            )
        except UserError:
            continue
        found.append(kind)
    return found


def build(settings: dict) -> Workload:
    """Forward and backward pass of the kernel `settings["kind"]`."""
    config, kind = ModelConfig.from_dict(settings["model"]), settings["kind"]
    dtype = settings["execution"]["dtype"]
    rows, length = settings["batch_size"], settings["sequence_length"]

    @jax.jit
    def inputs(number):
        return _random_inputs(config, rows, length, dtype, number)

    def prepare(first, count):
        return jax.block_until_ready([inputs(i) for i in range(first, first + count)])

    both_passes = jax.jit(lambda qkv, d_out: _both_passes(qkv, d_out, None, kind))

    def run(calls):
        for call in calls:
            done = both_passes(*call)
        jax.block_until_ready(done)
        return [None] * len(calls)

    def facts():
        used = jax_side.peak_bytes()
        return {"peak_bytes": used, "errors": errors_of_kernel(config, length, dtype, kind)}

    return Workload(prepare, run, facts)


def _random_inputs(config, rows, length, dtype, number):
    keys = jax.random.split(jax.random.key(number), 4)
    query, key_value = (
        (rows, length, config.num_heads, config.head_dim),
        (rows, config.num_kv_heads, length, config.head_dim),
    )
    shapes = (query, key_value, key_value, query)
    q, k, v, d_out = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return (q, k, v), d_out


def _both_passes(qkv, d_out, segment_ids, kind):
    def attend(q, k, v):
        return causal_attention(q, KeyValue(k, v), segment_ids_BT=segment_ids, kind=kind)

    out, pull_back = jax.vjp(attend, *qkv)
    return out, *pull_back(d_out)


def errors_of_kernel(config: ModelConfig, length: int, dtype: str, kind: str) -> dict[str, float]:
    """Relative errors of output and gradients, without and with packed documents."""
    qkv, d_out = _random_inputs(config, 1, length, dtype, 0)
    documents = 1 + jnp.arange(length, dtype=jnp.int32)[None] * 4 // length
    errors = {}
    for prefix, segment_ids in (("", None), ("packed ", documents)):
        ours = jax.jit(_both_passes, static_argnums=3)(qkv, d_out, segment_ids, kind)
        with jax.default_matmul_precision("highest"):
            exact = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
            reference = jax.jit(_both_passes, static_argnums=3)(*exact, segment_ids, "xla")
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, reference, strict=True):
            distance = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel())
            errors[prefix + name] = float(distance / jnp.linalg.norm(b.ravel()))
    return errors
