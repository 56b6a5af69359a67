"""A roll call over TCP, before JAX connects the processes of a run: who has not arrived?

JAX waits for all of them, too, but ends a process that has waited in vain by abort(), with a stack,
and only the processes themselves can say how long to wait. So process 0 first listens on the port
where its JAX service is going to be; each of the others sends one line there,

    mobilellm NUM_PROCESSES PROCESS

and gets one line back as soon as all are there, or the time is over:

    mobilellm NUM_PROCESSES MISSING MISSING ...
"""

import contextlib
import socket
import time

from mobilellm_jax.errors import UserError

_WORD = b"mobilellm"
_HELLO_SECONDS = 1.0  # for the line of a caller; a stranger may send none
_CALL_SECONDS = 5.0  # for one try to reach process 0, whose host may be starting
_ANSWER_SECONDS = 15.0  # how much longer than process 0 for the others they wait for its answer
# Between two tries, and before JAX connects: if its service is not there yet, gRPC waits a second.
_PAUSE_SECONDS = 0.2
_IDLE_SECONDS = 60  # then TCP shows routers and firewalls that a connection is still in use
_MOST_BYTES = 1 << 20  # of a line

_FIX = "start all of them with the same --coordinator and --num_processes"


def call_roll(
    address: str, bind_address: str, num_processes: int, process: int, seconds: float
) -> None:
    """Returns as soon as all processes are there; each calls it.

    Args:
      address: HOST:PORT of process 0, for the others.
      bind_address: the same, for process 0 itself.
      num_processes: of the run.
      process: the number of this one.
      seconds: how long to wait.

    Raises:
      UserError: processes that did not come, or that count another number of them.
    """
    if num_processes == 1:
        return
    if process == 0:
        missing = _wait_for_others(bind_address, num_processes, seconds)
    else:
        missing = _report(address, num_processes, process, seconds)
    if missing:
        raise UserError(arrival_message(missing, num_processes, address, seconds))


def arrival_message(missing: list[int], num_processes: int, address: str, seconds: float) -> str:
    """Says who did not arrive and what to do about it."""
    late = f"did not arrive at {address} within {seconds:g} s"
    if 0 in missing:
        return (
            f"process 0, the coordinator, {late}; see its output, whether its host and port can be "
            f"reached from here, and {_FIX}"
        )
    who = named_processes(len(missing), missing[:8])
    return f"{who} of {num_processes} {late}; see the output there, and {_FIX}"


def named_processes(count: int, some: list[int]) -> str:
    """`count` processes in words, of which the numbers of `some` are known."""
    listed = " and ".join(", ".join(map(str, some)).rsplit(", ", 1))
    if count == len(some):
        return f"process {listed}" if count == 1 else f"processes {listed}"
    return f"{count} processes ({listed} among them)"


def _wait_for_others(address: str, num_processes: int, seconds: float) -> list[int]:
    """Process 0's side: waits, tells all that came who is missing, and returns that."""
    end = time.monotonic() + seconds
    missing = set(range(1, num_processes))
    callers = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listening(address))
        while missing and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError, ConnectionError):
                caller = stack.enter_context(listener.accept()[0])
                if process := _process_of(caller, num_processes):
                    callers.append(caller)
                    missing.discard(process)  # not remove: it may have been started again
        for caller in callers:
            with contextlib.suppress(OSError):  # it has gone
                _send(caller, num_processes, *sorted(missing))
    return sorted(missing)


def _process_of(caller: socket.socket, num_processes: int) -> int | None:
    """Reads who calls; hangs up if it is none of this run, whereupon a late one calls again."""
    caller.settimeout(_HELLO_SECONDS)
    with contextlib.suppress(OSError, ValueError):
        theirs, process = _received(caller)
        if theirs == num_processes and 0 < process < num_processes:
            return process
        _send(caller, num_processes)
    caller.close()
    return None


def _report(address: str, num_processes: int, process: int, seconds: float) -> list[int]:
    """The others' side: tells process 0 that this one is there, and returns who is missing."""
    end = time.monotonic() + seconds
    where = _host_and_port(address)
    answer = None
    while answer is None and time.monotonic() < end:
        # OSError: nobody listens there, or no longer. ValueError: somebody else does.
        with (
            contextlib.suppress(OSError, ValueError),
            socket.create_connection(where, timeout=min(seconds, _CALL_SECONDS)) as coordinator,
        ):
            if coordinator.getsockname() == coordinator.getpeername():
                raise ConnectionError("to itself, as happens on one host while nobody listens")
            _keep_alive(coordinator)
            coordinator.settimeout(seconds + _ANSWER_SECONDS)
            _send(coordinator, num_processes, process)
            answer = _received(coordinator)
        time.sleep(_PAUSE_SECONDS)
    theirs, *missing = answer or [num_processes, 0]
    if theirs != num_processes:
        raise UserError(
            f"this is process {process} of {num_processes}, but the coordinator at {address} is "
            f"one of {theirs}; {_FIX}"
        )
    return missing


def _listening(address: str) -> socket.socket:
    """A socket that accepts connections there, as JAX's service is going to do."""
    host, port = _host_and_port(address)
    host = "" if host == "::" else host  # all of this machine's, of IPv4 too
    dual = host == "" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({error}); choose a free port of its host"
        ) from error


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _send(connection: socket.socket, *numbers: int) -> None:
    connection.sendall(b" ".join([_WORD, *(b"%d" % number for number in numbers)]) + b"\n")


def _received(connection: socket.socket) -> list[int]:
    """The numbers of the next line; a ValueError if it is none of ours."""
    line = connection.makefile("rb").readline(_MOST_BYTES)
    words = line.split()
    if len(words) < 2 or words[0] != _WORD or not line.endswith(b"\n"):
        raise ValueError(line[:80])
    return [int(word) for word in words[1:]]
