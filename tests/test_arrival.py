"""The roll call: all arrive, or everybody learns who did not."""

import contextlib
import socket
import threading
import time

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.machine.arrival import arrival_message, call_roll, named_processes


def free_address(host="localhost"):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"{host}:{free.getsockname()[1]}"


def call(address, *members, seconds=20.0, bind=None):
    """Lets members (num_processes, process) call; returns what each hears, None or an error."""
    heard = [None] * len(members)

    def run(index, num_processes, process):
        try:
            call_roll(address, bind or address, num_processes, process, seconds)
        except UserError as error:
            heard[index] = str(error)

    threads = [
        threading.Thread(target=run, args=(index, *member)) for index, member in enumerate(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.mark.parametrize(
    ("count", "some", "words"),
    [
        (1, [1], "process 1"),
        (2, [1, 3], "processes 1 and 3"),
        (3, [1, 3, 7], "processes 1, 3 and 7"),
        (39, [24, 37], "39 processes (24 and 37 among them)"),
    ],
)
def test_processes_are_named(count, some, words):
    assert named_processes(count, some) == words


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ([1], "process 1 of 40 did not arrive at node0:29500 within 7 s"),
        ([1, 3], "processes 1 and 3 of 40 did not arrive"),
        (list(range(1, 40)), "39 processes (1, 2, 3, 4, 5, 6, 7 and 8 among them) of 40 did not"),
        ([0], "process 0, the coordinator, did not arrive at node0:29500 within 7 s"),
    ],
)
def test_the_missing_are_named_with_what_to_do(missing, words):
    message = arrival_message(missing, 40, "node0:29500", 7)
    assert message.startswith(words) and "start all of them with the same" in message


@pytest.mark.parametrize("bind", [None, "[::]"])
def test_all_go_on_as_soon_as_the_last_is_there_and_leave_the_port(bind):
    address = free_address()
    bind = bind and f"{bind}:{address.rpartition(':')[2]}"
    start = time.monotonic()
    assert call(address, *((5, process) for process in range(5)), bind=bind) == [None] * 5
    assert time.monotonic() - start < 10
    assert call(address, (2, 0), (2, 1), bind=bind) == [None] * 2


def test_one_process_waits_for_nobody():
    call_roll("nowhere:1", "nowhere:1", 1, 0, 1)


def test_all_that_came_learn_who_did_not():
    first, *others = call(free_address(), (5, 0), (5, 2), (5, 4), seconds=2)
    assert first.startswith("processes 1 and 3 of 5 did not arrive at localhost:")
    assert "within 2 s" in first and others == [first] * 2


def test_a_missing_coordinator_is_named():
    (heard,) = call(free_address(), (2, 1), seconds=1)
    assert heard.startswith("process 0, the coordinator, did not arrive at localhost:")


def test_a_coordinator_that_cannot_listen_says_so():
    with socket.create_server(("localhost", 0)) as taken:
        (heard,) = call(f"localhost:{taken.getsockname()[1]}", (2, 0))
    assert "cannot listen at localhost:" in heard and "choose a free port" in heard


@contextlib.contextmanager
def waiting(address, *members):
    """Lets the members wait for others inside; yields a list for what they hear in the end."""
    heard = []
    thread = threading.Thread(target=lambda: heard.extend(call(address, *members)))
    thread.start()
    while len(heard) < 1:
        with contextlib.suppress(ConnectionRefusedError), connected(address):
            break
        time.sleep(0.01)
    yield heard
    thread.join()


def connected(address):
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)))


def test_another_number_of_processes_is_refused():
    address = free_address()
    with waiting(address, (2, 0)) as heard:
        (stranger,) = call(address, (3, 2))
        assert call(address, (2, 1)) == [None]
    assert "this is process 2 of 3, but the coordinator" in stranger and "is one of 2" in stranger
    assert heard == [None]


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"GET / HTTP/1.1\n", b"mobilellm 2\n", b"mobilellm a b\n"]
)
def test_strangers_that_call_are_left_out(line):
    address = free_address()
    with waiting(address, (2, 0)) as heard, connected(address) as stranger:
        stranger.sendall(line)
        assert call(address, (2, 1)) == [None]
    assert heard == [None]


def test_a_stranger_that_answers_is_not_the_coordinator():
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            while True:
                caller, _ = server.accept()
                with caller:
                    caller.sendall(b"\0\0\x12\4\0\0\0\0\0\n")  # as gRPC begins

        threading.Thread(target=answer, daemon=True).start()
        (heard,) = call(f"localhost:{server.getsockname()[1]}", (2, 1), seconds=1)
    assert heard.startswith("process 0, the coordinator, did not arrive")


def test_a_process_that_reaches_itself_has_not_reached_the_coordinator(monkeypatch):
    address = free_address("127.0.0.1")
    source = ("127.0.0.1", int(address.partition(":")[2]))
    create, reached = socket.create_connection, []

    def to_itself(where, timeout):
        connection = create(where, timeout, source_address=source)
        reached.append(connection.getpeername())
        return connection

    monkeypatch.setattr(socket, "create_connection", to_itself)
    (heard,) = call(address, (2, 1), seconds=1)
    assert reached[0] == source and heard.startswith("process 0, the coordinator, did not arrive")


def test_a_process_that_was_started_again_counts_once():
    address = free_address()
    with waiting(address, (3, 0), (3, 1)) as heard:
        with connected(address) as gone:
            gone.sendall(b"mobilellm 3 1\n")
        time.sleep(0.5)
        assert not heard
        assert call(address, (3, 2)) == [None]
    assert heard == [None, None]
