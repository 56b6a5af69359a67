"""`load`: does the loader hold training up? Steps on loaded batches against one fixed batch.

The two take turns of `--steps` steps each in one process, as a run has them. The ratio of the
medians is 1.0 where the loader costs nothing. "loader alone" is what it gives when nothing waits
for it.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.speed import jax_side
from benchmarks.speed.cases import random_weights
from benchmarks.speed.measure import named_if_missing, run_alone, summary
from benchmarks.speed.results import Benchmark
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution

_ALONE = 200  # batches

EPILOG = """\
examples:
  python -m benchmarks.speed load --dataset data/quickstart --config configs/quickstart.py
  python -m benchmarks.speed load --dataset data/corpus --preset 125m --batch_size 32
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="DIR", help="made by `mobilellm prepare`")
    add("--config", metavar="FILE", help="takes model and batch size of this config instead")
    add("--steps", type=int, default=20, metavar="N", help="of a turn (default %(default)s)")


def measure(bench: Benchmark) -> None:
    """Steps per second of both, and tokens per second of the loader alone."""
    with named_if_missing("load"):
        from mobilellm_jax.data.dataset import Dataset
    args, config, batch_size = bench.args, bench.config, bench.args.batch_size
    if args.config:
        from mobilellm_jax.training import run_config

        loaded = run_config.load_config(args.config)
        config, batch_size = run_config.model_config(loaded), loaded.train.global_batch_size
        args.preset, args.model = args.config, []
    header = Dataset.open(args.dataset).header
    if header.vocab_size > config.vocab_size:
        raise UserError(
            f"{args.dataset} has {header.vocab_size} tokens, the model {config.vocab_size}: add "
            f"--model vocab_size={header.vocab_size}"
        )
    length = header.sequence_length
    bench.settings = {
        "model": config.to_dict(),
        "dataset": args.dataset,
        "batch_size": batch_size,
        "sequence_length": length,
        "steps": args.steps,
        "execution": jax_side.execution_settings(args, config, bench.device, length),
    }
    bench.sides = run_alone(_measure, bench.settings | {"turns": args.samples})


def _measure(settings: dict) -> dict[str, dict]:
    with named_if_missing("load"):
        from mobilellm_jax.data.dataset import Dataset
        from mobilellm_jax.data.loader import train_batches

    config = ModelConfig.from_dict(settings["model"])
    batch_size, length = settings["batch_size"], settings["sequence_length"]

    def batches():
        return train_batches(
            [(Dataset.open(settings["dataset"]), 1.0)],
            seed=0,
            global_batch_size=batch_size,
            sequence_length=length,
        )

    execution = Execution(**settings["execution"])
    step, first_state = jax_side.train_program(config, execution, accumulation_steps=1)
    state = first_state(jax.tree.map(jnp.array, random_weights(config)))
    sources = {"loaded batches": batches(), "fixed batch": itertools.repeat(next(batches()))}
    state, _ = step(state, next(sources["loaded batches"]))
    seconds = {name: [] for name in sources}
    for _ in tqdm(range(settings["turns"]), desc="load", unit="turn"):
        for name, source in sources.items():
            start = time.perf_counter()
            for batch in itertools.islice(source, settings["steps"]):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds[name].append((time.perf_counter() - start) / settings["steps"])
    source = batches()
    next(source)
    start = time.perf_counter()
    for _ in itertools.islice(source, _ALONE):
        pass
    seconds["loader alone"] = [(time.perf_counter() - start) / _ALONE]
    sides = {name: {"seconds": summary(values)} for name, values in seconds.items()}
    for side in sides.values():
        side["tokens_per_second"] = batch_size * length / side["seconds"]["median"]
    return sides
