"""Joins the processes of a run on JAX's own multi-controller runtime (`jax.distributed`).

Every run is initialised, one process included. Who takes part comes from the flags, or else from
where JAX looks: Slurm, Open MPI, mpi4py, TPU metadata (GCE, GKE), Kubernetes jobs and JobSets. What
the processes owe each other once they are together is in `mobilellm_jax.machine.coordination`.

Exit status of a process among several: 0 finished, or stopped by a signal and saved; 2 a mistake
that the user can fix, of this process or of another; 75 another process failed, vanished or hangs,
so that the same command is to be run again; 134 the same, noticed by JAX itself.
"""

import argparse
import atexit
import importlib.util
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from mobilellm_jax import interrupts
from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.arrival import call_roll
from mobilellm_jax.machine.compilation_cache import use_compilation_cache
from mobilellm_jax.machine.coordination import RunCoordination
from mobilellm_jax.machine.jax_private import detected_processes
from mobilellm_jax.machine.process_flags import check_flags

HEARTBEAT_SECONDS = 20  # without one a process counts as dead, and JAX ends the others
_CONNECT_SECONDS = 60  # all are there


class _Members(NamedTuple):
    """The processes of a run, as `jax.distributed.initialize` wants to know them."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[RunCoordination]:
    """Runs its body as one of the run's processes; enter it before anything touches a device.

    An error in a run of several processes is printed and ends this process here, and the others
    within seconds: a process that goes on alone would wait for ever in its next collective.

    Args:
      args: with the flags of `process_flags.add_arguments`.

    Raises:
      UserError: flags that do not go together, a cluster that JAX finds but cannot read, processes
        that do not come.
    """
    check_flags(args)
    # Whoever calls this from a program that has used JAX before stays as it is.
    if jax.distributed.is_initialized() or _has_devices():
        process, num_processes = jax.process_index(), jax.process_count()
    else:
        previous = signal.getsignal(signal.SIGTERM)
        process, num_processes = _initialize(args)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)  # JAX's own only takes note of it
    use_compilation_cache()
    with RunCoordination(args.stall_seconds, num_processes=num_processes, process=process) as peers:
        yield peers


def _has_devices() -> bool:
    """Whether JAX has started a backend: a RuntimeError says so before it looks at the numbers."""
    try:
        jax.distributed.initialize("nowhere:0", num_processes=0, process_id=0, local_device_ids=[])
    except RuntimeError:
        return True
    except ValueError:
        return False
    raise AssertionError("JAX has taken 0 processes")


def _initialize(args: argparse.Namespace) -> tuple[int, int]:
    """Initialises JAX; returns the number of this process and how many there are."""
    if args.coordinator is not None:
        members = _Members(args.coordinator, args.num_processes, args.process_id)
    elif args.num_processes == 1 or (members := _found_cluster(args.arrival_seconds)) is None:
        _connect_alone()
        return 0, 1
    _connect(members, args.arrival_seconds)
    return members.process_id, members.num_processes


def _found_cluster(arrival_seconds: int) -> _Members | None:
    """The processes that JAX finds by itself; None if there is nothing."""
    with_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    method = None
    # JAX knows Open MPI up to version 4 by itself, and takes mpi4py only if told to.
    if with_mpi and not {"OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST"} & os.environ.keys():
        if importlib.util.find_spec("mpi4py") is None:
            raise UserError(
                "started by MPI, whose processes JAX finds by mpi4py: pip install mpi4py, or give "
                "--coordinator, --num_processes and --process_id"
            )
        method = "mpi4py"
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        members = _Members(*detected_processes(coordinator, method, arrival_seconds))
    except (RuntimeError, LookupError, OSError, ValueError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error
    if members.coordinator_address is None:
        if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
            raise UserError(
                "an indexed job of Kubernetes, whose processes JAX finds by the package "
                "kubernetes: pip install 'jax[k8s]', or give --coordinator, --num_processes and "
                "--process_id (--num_processes 1 for a job of one)"
            )
        return None
    if None in (members.num_processes, members.process_id):
        raise _unreadable(f"nothing but their coordinator, {members.coordinator_address}")
    return members


def _unreadable(what: str) -> UserError:
    return UserError(
        f"the processes of this run cannot be found ({what}); give --coordinator, --num_processes "
        "and --process_id, or --num_processes 1 to run alone"
    )


def _connect_alone() -> None:
    """One process: a socket that only this user sees, no network and no port."""
    folder = tempfile.TemporaryDirectory(prefix="mobilellm-")
    socket = f"unix:{folder.name}/socket"
    jax.config.update("jax_cpu_collectives_implementation", None)  # 6 times faster than Gloo
    jax.config.update("jax_check_proxy_envs", False)  # a warning without cause here
    jax.config.update("jax_enable_preemption_service", False)  # for a moment it takes SIGTERM away
    jax.distributed.initialize(
        socket,
        1,
        0,
        cluster_detection_method="deactivate",
        coordinator_bind_address=socket,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    atexit.register(folder.cleanup)
    interrupts.clean_ups.append(folder.cleanup)


def _connect(members: _Members, arrival_seconds: int) -> None:
    """Waits for the others, then connects to them."""
    address = members.coordinator_address
    bind_address = os.environ.get(
        "JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{address.rpartition(':')[2]}"
    )
    if re.match(r"(localhost|127\.|\[::1\])", address):
        bind_address = address
    call_roll(address, bind_address, members.num_processes, members.process_id, arrival_seconds)
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        members = members._replace(local_device_ids=None)  # JAX reads that variable
    jax.distributed.initialize(
        **members._asdict(),
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind_address,
        initialization_timeout=_CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
