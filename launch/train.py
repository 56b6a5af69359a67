"""`mobilellm train` for schedulers: a run that was stopped before its last step exits with 75.

    python launch/train.py --config configs/1.5b.py:v5e-256 --workdir runs/1.5b ...

The arguments are those of `mobilellm train`, which exits with 0 when a signal stops it: to a person
who asked for that, nothing has failed. But Kubernetes, systemd and a Slurm script restart only what
fails, and take a run that saved itself before a node went away for complete.

Exit status: 0 the last step is saved, 2 a mistake that a restart does not mend, any other: start
again.
"""

import argparse
import sys
from pathlib import Path

from mobilellm_jax import cli, interrupts

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; `mobilellm train` uses it for a lost peer


def main(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    status = cli.main(["train", *arguments])
    return TRY_AGAIN if status == 0 and not finished(arguments) else status


def finished(arguments: list[str]) -> bool:
    """Whether the workdir holds the last step of the config, or a later one."""
    from mobilellm_jax.checkpoints.files import CHECKPOINTS_NAME, list_steps
    from mobilellm_jax.training.run_config import load_config

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir", type=Path)
    args, rest = parser.parse_known_args(arguments)
    config = load_config(args.config, [a for a in rest if a.startswith("--config.")])
    directory, last = args.workdir / CHECKPOINTS_NAME, config.train.num_steps
    # By its name first: NFS may list a folder as it was half a minute ago.
    return (directory / str(last)).is_dir() or max(list_steps(directory), default=0) > last


if __name__ == "__main__":
    interrupts.take_over()
    sys.exit(main(sys.argv[1:]))
