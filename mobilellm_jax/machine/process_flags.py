"""The flags of the verbs that run as several processes; without JAX, as `--help` has no use for it.

See `mobilellm_jax.machine.processes`.
"""

import argparse

from mobilellm_jax.errors import UserError

ARRIVAL_SECONDS = 300
STALL_SECONDS = 20
_DAY = 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all verbs that run as several processes."""
    group = parser.add_argument_group(
        "several processes",
        "Under Slurm, Open MPI, Kubernetes (Job, JobSet; needs jax[k8s]) and on TPU VMs they find "
        "each other; anywhere else give all three to each process. Without any: one process.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0's host")
    group.add_argument("--num_processes", type=int, metavar="N", help="1: alone, whatever is found")
    group.add_argument("--process_id", type=int, metavar="I", help="from 0 to N - 1")
    group.add_argument(
        "--arrival_seconds",
        type=int,
        default=ARRIVAL_SECONDS,
        metavar="S",
        help="how long to wait for the others at the start (default: %(default)s)",
    )
    group.add_argument(
        "--stall_seconds",
        type=float,
        default=STALL_SECONDS,
        metavar="S",
        help="end a run of several processes whose step takes longer than this and 5 times the "
        "slowest so far (default: %(default)s)",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags of `add_arguments` that cannot be meant."""
    coordinator, num_processes, process_id = args.coordinator, args.num_processes, args.process_id
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    alone = {"coordinator": None, "num_processes": 1, "process_id": None}
    if 0 < len(missing) < 3 and given != alone:
        raise UserError(
            f"{' and '.join(missing)} missing: give --coordinator HOST:PORT, --num_processes N and "
            "--process_id I to every process, or none of them"
        )
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes {num_processes}: use 1 or more")
    if process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id {process_id}: with --num_processes {num_processes} use 0 to "
            f"{num_processes - 1}"
        )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UserError(
                f"--coordinator {coordinator}: use HOST:PORT, such as node0:29500, with a free "
                "port of the host of process 0"
            )
    for name in ("arrival_seconds", "stall_seconds"):
        if not 1 <= getattr(args, name) <= _DAY:
            raise UserError(f"--{name} {getattr(args, name):g}: use 1 to {_DAY} seconds")
