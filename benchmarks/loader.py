"""Does the loader hold the training step up? Steps on loaded batches against one fixed batch.

    python benchmarks/loader.py --dataset data/quickstart --config configs/quickstart.py

The two take turns of `--steps` steps each; the ratio is that of the medians of the turns (1.0: the
loader costs nothing). Also says how many tokens per second the loader gives when nothing waits.
"""

import argparse
import itertools
import statistics
import time

import jax
import jax.numpy as jnp

from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.records import DatasetHeader
from mobilellm_jax.model.transformer import Execution, init_params
from mobilellm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.training.run_config import load_config, model_config
from mobilellm_jax.training.step import TrainState, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    config = load_config(args.config)
    model, batch_size = model_config(config), config.train.global_batch_size
    sequence_length = DatasetHeader.load(args.dataset).sequence_length

    def batches():
        return train_batches(
            [(args.dataset, 1.0)],
            seed=0,
            global_batch_size=batch_size,
            sequence_length=sequence_length,
        )

    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    step = jax.jit(make_train_step(model, Execution(), optimizer, schedule), donate_argnums=0)
    params = init_params(model, jax.random.key(0))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    loaded, fixed = batches(), itertools.repeat(next(batches()))
    state, _ = step(state, next(loaded))
    seconds = {"loaded": [], "fixed": []}
    for _ in range(args.turns):
        for name, source in (("loaded", loaded), ("fixed", fixed)):
            start = time.perf_counter()
            for batch in itertools.islice(source, args.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds[name].append((time.perf_counter() - start) / args.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"step on loaded batches {1e3 * medians['loaded']:.1f} ms, on a fixed one "
          f"{1e3 * medians['fixed']:.1f} ms: speed ratio "
          f"{medians['fixed'] / medians['loaded']:.3f}")  # fmt: skip

    source = batches()
    next(source)
    start = time.perf_counter()
    for _ in itertools.islice(source, 200):
        pass
    rate = 200 * batch_size * sequence_length / (time.perf_counter() - start)
    print(f"the loader alone: {rate / 1e6:.1f} M tokens per second")


if __name__ == "__main__":
    main()
