"""Joins the processes of a run on JAX's own multi-controller runtime (`jax.distributed`).

Every run is initialised, one process included. Who takes part comes from the flags, or else from
where JAX looks: Slurm, Open MPI, mpi4py, TPU metadata (GCE, GKE), Kubernetes jobs and JobSets. What
the processes owe each other once they are together is in `mobilellm_jax.machine.coordination`.

Exit status of a process among several: 0 finished, or stopped by a signal and saved; 2 a mistake
that the user can mend, of this process or of another; 75 another process failed, vanished or hangs,
so that the same command is to be run again; 134 the same, noticed by JAX itself.
"""

import argparse
import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src import distributed, xla_bridge

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.compilation_cache import use_compilation_cache
from mobilellm_jax.machine.coordination import RunCoordination, missing_at_barrier
from mobilellm_jax.machine.process_flags import check_flags

HEARTBEAT_SECONDS = 20  # without one a process counts as dead, and JAX ends the others
# How much longer a process waits for the coordinator's answer than the coordinator for the others.
_ANSWER_SECONDS = 15

_MEND = "start all of them with the same --coordinator and --num_processes"


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[RunCoordination]:
    """Runs its body as one of the run's processes; enter it before anything touches a device.

    An error in a run of several processes is printed and ends this process here, and the others
    within seconds: a process that goes on alone would wait for ever in its next collective.

    Args:
      args: with the flags of `process_flags.add_arguments`.

    Raises:
      UserError: flags that do not go together, a cluster that JAX finds but cannot read.
    """
    check_flags(args)
    # Whoever calls this from a program that has used JAX before stays as it is.
    if not (jax.distributed.is_initialized() or xla_bridge.backends_are_initialized()):
        previous = signal.getsignal(signal.SIGTERM)
        _initialize(args)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)  # JAX's own only takes note of it
    use_compilation_cache()
    with RunCoordination(args.stall_seconds) as peers:
        yield peers


def _initialize(args: argparse.Namespace) -> None:
    if args.coordinator is not None:
        local = re.match(r"(localhost|127\.|\[::1\])", args.coordinator)
        _connect(
            args.arrival_seconds,
            coordinator_address=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=args.coordinator if local else None,
        )
    elif args.num_processes == 1 or not _found_a_cluster(args.arrival_seconds):
        _connect_alone()


def _found_a_cluster(arrival_seconds: int) -> bool:
    """Initialises from what JAX finds out by itself; False if there is nothing."""
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
    try:
        _connect(arrival_seconds, cluster_detection_method=method)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise _unreadable(error) from error
        if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
            raise UserError(
                "an indexed job of Kubernetes, whose processes JAX finds by the package "
                "kubernetes: pip install 'jax[k8s]', or give --coordinator, --num_processes and "
                "--process_id (--num_processes 1 for a job of one)"
            ) from error
        return False
    except (RuntimeError, LookupError, OSError) as error:
        raise _unreadable(error) from error
    return True


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"the processes of this run cannot be found ({type(error).__name__}: {error}); give "
        "--coordinator, --num_processes and --process_id, or --num_processes 1 to run alone"
    )


def _connect_alone() -> None:
    """One process: a socket that only this user sees, no network and no port."""
    folder = tempfile.TemporaryDirectory(prefix="mobilellm-")
    socket = f"unix:{folder.name}/socket"
    jax.config.update("jax_cpu_collectives_implementation", None)  # 6 times faster than Gloo
    jax.config.update("jax_check_proxy_envs", False)  # a warning without cause here
    jax.distributed.initialize(
        socket,
        1,
        0,
        cluster_detection_method="deactivate",
        coordinator_bind_address=socket,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    atexit.register(folder.cleanup)


def _connect(arrival_seconds: int, **where) -> None:
    service = distributed._jax.get_distributed_runtime_service
    patient = functools.partial(service, cluster_register_timeout=arrival_seconds)
    with (
        # JAX sets it to an hour, so that nobody learns who is missing.
        mock.patch.object(distributed._jax, "get_distributed_runtime_service", patient),
        _explained_abort(arrival_seconds),
    ):
        jax.distributed.initialize(
            **where,
            initialization_timeout=arrival_seconds + _ANSWER_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


@contextlib.contextmanager
def _explained_abort(arrival_seconds: int) -> Iterator[None]:
    """Ends with status 2 and one line where JAX ends the process because a peer is missing.

    JAX does that by abort() after a text on standard error, with a stack, that names who is missing
    (jaxlib 0.10: the default `missed_heartbeat_callback`; one of our own is no way out, because
    its argument cannot be converted to Python). So that text is kept in a file meanwhile.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, _redirected(2, kept.fileno()) as stderr:

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def aborted(_):
            kept.seek(0)
            text = arrival_message(kept.read().decode(errors="replace"), arrival_seconds)
            os.write(stderr, f"error: {text}\n".encode())
            os._exit(2)

        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        before = set_handler(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
        try:
            yield
        finally:
            set_handler(signal.SIGABRT, before)
            sys.stderr.flush()
            kept.seek(0)
            os.write(stderr, kept.read())


@contextlib.contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[int]:
    """Lets `descriptor` stand for `target`; yields what it stood for."""
    original = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield original
    finally:
        os.dup2(original, descriptor)
        os.close(original)


def arrival_message(text: str, arrival_seconds: int) -> str:
    """Says who did not arrive, from what JAX printed."""
    state = distributed.global_state
    at = f"at {state.coordinator_address}"
    if missing := missing_at_barrier(text):
        return (
            f"{missing} of {state.num_processes} did not arrive {at} within {arrival_seconds} s; "
            f"see the output there, and {_MEND}"
        )
    if "Deadline Exceeded" in text or "UNAVAILABLE" in text:
        return (
            f"process 0, the coordinator, did not arrive {at} within {arrival_seconds} s; see its "
            f"output, whether its host and port can be reached from here, and {_MEND}"
        )
    return f"the processes did not come together {at}: {text.strip()}"
