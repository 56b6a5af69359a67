"""`checkpoint`: what saving in the background holds up, how long it takes, and restoring.

"save: blocks" is until training may go on, "save: whole" until the sealed step is on disk with
nothing else running, "step while saving" a training step meanwhile, "restore" from files to arrays
on the device, SHA-256 sums checked.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.speed import jax_side
from benchmarks.speed.measure import named_if_missing, run_alone, summary
from benchmarks.speed.results import Benchmark
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.execution import Execution
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.training.step import TrainState

EPILOG = """\
example (1.5 GB are written to --folder, twice at a time):
  python -m benchmarks.speed checkpoint --preset 125m --folder /fast/disk
"""


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.epilog = EPILOG
    jax_side.add_execution_arguments(parser)
    parser.add_argument(
        "--folder", default="runs", metavar="DIR", help="on the disk to be measured (runs)"
    )


def measure(bench: Benchmark) -> None:
    """Saves and restores the state of the model."""
    args, config = bench.args, bench.config
    length = args.sequence_length
    bench.settings = {
        "model": config.to_dict(),
        "batch_size": args.batch_size,
        "sequence_length": length,
        "execution": jax_side.execution_settings(args, config, bench.device, length),
    }
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.folder) as folder:
        settings = bench.settings | {"folder": folder, "rounds": args.samples}
        found = run_alone(_measure, settings)
    bench.figures["state_bytes"] = found.pop("state_bytes")
    bench.sides = {name: {"seconds": summary(values)} for name, values in found.items()}


def _measure(settings: dict) -> dict:
    with named_if_missing("checkpoint"):
        from mobilellm_jax.checkpoints.store import Checkpoints

    config = ModelConfig.from_dict(settings["model"])
    step, first_state = jax_side.train_program(config, Execution(**settings["execution"]), 1)
    state = first_state(init_params(config, jax.random.key(0)))
    shape = (settings["batch_size"], settings["sequence_length"])
    batch = jax.device_put(jax_side.train_batch(config.vocab_size, *shape, 0))
    seconds = {
        name: [] for name in ("step", "save: blocks", "step while saving", "save: whole", "restore")
    }

    def timed_step(name):
        nonlocal state
        with _timing(seconds[name]):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

    def save(checkpoints, number):
        checkpoints.save(
            number,
            params=state.params,
            opt_state=state.opt_state,
            metadata={"model": config.to_dict()},
            tokenizer=None,
        )

    like = jax.eval_shape(lambda: state)
    timed_step("step")
    seconds["step"].clear()  # with the compilation
    with Checkpoints(settings["folder"], keep_last=1) as checkpoints:
        for number in tqdm(range(1, 2 * settings["rounds"], 2), desc="checkpoint", unit="round"):
            for _ in range(5):
                timed_step("step")
            with _timing(seconds["save: blocks"]):
                save(checkpoints, number)
            while checkpoints.latest_step() != number:
                timed_step("step while saving")
            with _timing(seconds["save: whole"]):
                save(checkpoints, number + 1)
                checkpoints.wait()
            with _timing(seconds["restore"]):
                restored = checkpoints.restore(
                    config=config, params_like=like.params, opt_state_like=like.opt_state
                )
                jax.block_until_ready((restored.params, restored.opt_state))
            state = TrainState(jnp.int32(number), restored.params, restored.opt_state)
    return seconds | {"state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}


class _timing:
    """Appends the seconds of its block."""

    def __init__(self, seconds: list[float]):
        self._seconds = seconds

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *exception):
        self._seconds.append(time.perf_counter() - self._start)
