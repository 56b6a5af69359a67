"""`mobilellm doctor`: would this run start, and would it fit, before anything is spent on it."""

import argparse
import sys
from typing import TYPE_CHECKING

from mobilellm_jax.machine import process_flags
from mobilellm_jax.storage.paths import path_flag

if TYPE_CHECKING:
    from mobilellm_jax.training.checks import Finding

_EPILOG = """\
Takes the flags of `mobilellm train` and, with several processes, is started like it. Nothing is
trained, and nothing stays behind. Each line is ok, warn (it runs, but look) or FAIL (with the fix).
Exit status: 0 no FAIL, 2 otherwise.

example:
  mobilellm doctor --config configs/125m.py --workdir runs/125m --config.data.path=data/corpus
"""

_COLORS = {"ok": "32", "warn": "33", "FAIL": "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`: those of `train`."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--config", required=True, metavar="FILE", type=path_flag, help="a file as in configs/"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", type=path_flag, help="of the run to come"
    )
    parser.add_argument(
        "--config.KEY=VALUE", dest="_", action="store_true", help="change one value of the config"
    )
    process_flags.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs the verb; `args.overrides` are the `--config.KEY=VALUE` arguments."""
    import jax

    from mobilellm_jax.machine.processes import joined
    from mobilellm_jax.training.checks import CHECKS, RunChecks
    from mobilellm_jax.training.run_config import load_config

    with joined(args) as peers:
        checks = RunChecks(load_config(args.config, args.overrides), args.workdir, peers)
        failed = False
        for name, finding in checks.findings(CHECKS):
            failed |= finding.level == "FAIL"
            if jax.process_index() == 0 or finding.level == "FAIL":
                _show(name, finding)
        if failed:
            raise SystemExit(2)


def _show(name: str, finding: "Finding") -> None:
    level = f"{finding.level:4}"
    if sys.stdout.isatty():
        level = f"\033[{_COLORS[finding.level]}m{level}\033[0m"
    print(f"{level}  {name:9}  {finding.text}", flush=True)
