"""The only file of the package that imports from `jax._src`: each name, and why no public one does.

tests/test_jax_private.py checks that these names exist and behave as it is assumed here.
"""

from jax._src import clusters, distributed

# The key of its store by which JAX's preemption service hears of a notice. Its own handler of
# SIGTERM sets it at most a second later, for SIGTERM only, and lets nobody else handle that signal;
# nothing public sets it.
PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def store():
    """The client of JAX's coordination service: a key-value store and barriers with a time limit.

    `jax.experimental.multihost_utils` is built of collectives: it needs devices that match, all
    processes at the same line, and the main thread, and waits for ever for one that is dead. Orbax
    takes the client from the same place.
    """
    return distributed.global_state.client


def detected_processes(
    coordinator: str | None, method: str | None, timeout_seconds: int
) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """Finds out (coordinator, number of processes, number of this one, its devices) by JAX's means.

    Each is None if it is not found. `jax.distributed.initialize` finds out the same, but tells
    nobody, and then waits in C++ until it aborts the process: the roll has to be called before.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, None, None, None, method, timeout_seconds
    )
