"""`mobilellm train`."""

import argparse

_EPILOG = """\
Any key of the config can be set on top of the file's values as --config.KEY=VALUE. All keys, with
their defaults and meaning, are in mobilellm_jax/training/run_config.py; a wrong one names the near
ones, and the whole config is printed and saved before the first step. Running the same command
again goes on from the newest checkpoint. SIGTERM and Ctrl-C save the current step and exit with
status 0.

example:
  mobilellm train --config configs/125m.py --workdir runs/125m \\
      --config.data.path=data/corpus --config.optimizer.peak_lr=1e-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`; overrides of the config are taken by the command line as they are."""
    parser.epilog = _EPILOG
    parser.add_argument("--config", required=True, metavar="FILE", help="a file as in configs/")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="for checkpoints, metrics and the plot"
    )
    parser.add_argument(
        "--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config"
    )


def main(args: argparse.Namespace) -> None:
    """Runs the verb; `args.overrides` are the `--config.KEY=VALUE` arguments."""
    from mobilellm_jax.training.run_config import load_config

    config = load_config(args.config, args.overrides)
    from mobilellm_jax.training.trainer import train

    train(config, args.workdir)
