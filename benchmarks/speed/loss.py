"""`loss`: cross-entropy in slices, as training has it, against all logits at once.

Both from the hidden states on, with the gradients of hidden states and embedding. "whole" is what
one writes down first: all logits in fp32, log-softmax, and JAX's own backward pass.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks.speed import jax_side
from benchmarks.speed.cases import random_tokens
from benchmarks.speed.measure import Side, Workload, compare
from benchmarks.speed.results import Benchmark
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import compute_dtype
from mobilellm_jax.objectives.cross_entropy import cross_entropy_sum, num_slices
from mobilellm_jax.objectives.embedding_gradient import BatchShards, sharded_grad_table

EPILOG = """\
example:
  python -m benchmarks.speed loss --preset 125m --batch_size 32 --sequence_length 2048
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16")


def measure(bench: Benchmark) -> None:
    """Times and memory of the two; the first losses must be the same."""
    args, config = bench.args, bench.config
    dtype = compute_dtype(args.dtype, bench.device["platform"])
    bench.settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "slices": num_slices(args.batch_size, args.sequence_length, config.vocab_size, 1),
        "execution": {"dtype": dtype},
    }
    sides = [Side(name, build, bench.settings | {"side": name}) for name in ("sliced", "whole")]
    bench.sides = compare(sides, num_samples=args.samples, take_turns=bench.take_turns)


def build(settings: dict) -> Workload:
    """Loss and gradients of the form `settings["side"]`."""
    config = ModelConfig.from_dict(settings["model"])
    dtype, slices = settings["execution"]["dtype"], settings["slices"]
    shape = (settings["batch_size"], settings["sequence_length"])

    def sliced(hidden, embedding_VD, targets):
        ones = jnp.ones(shape, jnp.float32)
        table = sharded_grad_table(embedding_VD, dtype, BatchShards())
        return cross_entropy_sum(hidden, table, targets, ones, slices) / targets.size

    def whole(hidden, embedding_VD, targets):
        logits = jnp.einsum(
            "BTD,VD->BTV", hidden, embedding_VD.astype(dtype), preferred_element_type=jnp.float32
        )
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()

    loss = {"sliced": sliced, "whole": whole}[settings["side"]]
    loss_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    embedding_VD = config.init_std * jax.random.normal(
        jax.random.key(0), (config.vocab_size, config.embed_dim)
    )
    hidden_of = jax.jit(
        lambda i: jax.random.normal(jax.random.key(i), (*shape, config.embed_dim), dtype)
    )

    def prepare(first, count):
        numbers = range(first, first + count)
        targets = [random_tokens(config.vocab_size, shape, i) for i in numbers]
        return jax.block_until_ready(
            [(hidden_of(i), jnp.asarray(t)) for i, t in zip(numbers, targets, strict=True)]
        )

    def run(batches):
        values = []
        for hidden, targets in batches:
            value, gradients = loss_and_gradients(hidden, embedding_VD, targets)
            values.append(value)
        jax.block_until_ready(gradients)
        return [float(value) for value in values]

    return Workload(prepare, run, lambda: {"peak_bytes": jax_side.peak_bytes()})
