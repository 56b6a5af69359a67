"""How many batches per second the loader gives, and how many tokens.

python benchmarks/loader.py --dataset data/stories --batch_size 64
"""

import argparse
import itertools
import time

from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.records import DatasetHeader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_batches", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sequence_length = DatasetHeader.load(args.dataset).sequence_length
    for repeat in range(args.repeats):
        batches = train_batches(
            [(args.dataset, 1.0)],
            seed=repeat,
            global_batch_size=args.batch_size,
            sequence_length=sequence_length,
        )
        next(batches)
        start = time.perf_counter()
        for _ in itertools.islice(batches, args.num_batches):
            pass
        rate = args.num_batches / (time.perf_counter() - start)
        tokens = rate * args.batch_size * sequence_length
        print(
            f"batches of {args.batch_size} x {sequence_length}: {rate:.1f} per second, "
            f"{tokens / 1e6:.1f} M tokens per second"
        )
        batches.close()


if __name__ == "__main__":
    main()
