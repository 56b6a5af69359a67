"""`mobilellm train`."""

import argparse

from mobilellm_jax.machine import process_flags
from mobilellm_jax.storage.paths import path_flag

_EPILOG = """\
Any key of the config can be set on top of the file's values as --config.KEY=VALUE. All keys, with
their defaults and meaning, are in mobilellm_jax/training/run_config.py; a wrong one names the near
ones, of one given twice the last counts, and the whole config is printed and saved before the first
step. Running the same command again goes on from the newest checkpoint. SIGTERM and Ctrl-C, to any
one of several processes too, save the current step and exit with status 0. A second one ends the
process at once.

exit status: 0 finished, or stopped by a signal and saved; 2 a mistake to fix; 130 or 143 ended by
Ctrl-C or SIGTERM before the first step, or by a second one; 75 (or 134, where JAX is first) another
process of the run failed, vanished or hangs: run the same command again

example:
  mobilellm train --config configs/125m.py --workdir runs/125m \\
      --config.data.path=data/corpus --config.optimizer.peak_lr=1e-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`; overrides of the config are taken by the command line as they are."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--config", required=True, metavar="FILE", type=path_flag, help="a file as in configs/"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        type=path_flag,
        help="for checkpoints, metrics and the plot",
    )
    parser.add_argument(
        "--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config"
    )
    process_flags.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs the verb; `args.overrides` are the `--config.KEY=VALUE` arguments."""
    from mobilellm_jax.machine.processes import joined
    from mobilellm_jax.training.run_config import load_config
    from mobilellm_jax.training.trainer import train

    with joined(args) as peers:
        train(load_config(args.config, args.overrides), args.workdir, peers)
