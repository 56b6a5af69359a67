"""Ctrl-C and SIGTERM end a verb at any moment: one line, status 130 or 143, nothing half-written.

Python runs a signal's handler between two bytecodes of the main thread, and an exception that it
raises is lost in modules that survive every error of their imports, in destructors and in
callbacks of C++. So the handler raises one only while a verb works, for its `with` blocks; at any
other time, and inside an import, it ends the process itself. A thread that the signal wakes
(`signal.set_wakeup_fd`) ends the process if the main thread does not, because it computes in C++ or
has lost the exception, and at a second signal.

This module imports next to nothing: it is the first to run.
"""

import _thread
import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# A signal that comes again within this time is the same one: `timeout` sends it twice, to the
# process and to its group.
SAME_SECONDS = 0.2
_REACT_SECONDS = 1.0  # for the main thread to come out of C++
_UNWIND_SECONDS = 10.0  # for its `with` blocks; processes of a run take 7 to part

_LINES = {signal.SIGINT: b"interrupted\n", signal.SIGTERM: b"terminated\n"}

# What removes the half-written when the process ends without unwinding. Whoever appends a function
# removes it when the work is whole or undone.
clean_ups: list[Callable[[], object]] = []

_working = False  # a verb's `with` blocks are there to be left by an exception
_request: int | None = None  # the signal that is being answered
_raised = False
_overdue = False  # the exception was raised and is lost
_ender: int | None = None  # the thread that ends the process
_said = False


def take_over() -> None:
    """Answers SIGINT and SIGTERM from here on, for a process that is the command line.

    A signal that is ignored, as SIGINT is under nohup and in the background of a script, stays so.
    One that came while `exec` replaced the process (`machine.large_pages`) is answered now.
    """
    if any(signal.getsignal(number) is _handle for number in _LINES):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _LINES)  # the thread inherits that and gets none
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _unless_lost(sys.unraisablehook)
    for number in _LINES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    atexit.register(_ignore)  # the first to be registered runs last
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LINES)


@contextlib.contextmanager
def blocked(*numbers: int) -> Iterator[None]:
    """Inside, signals wait in this thread and in processes that it starts or becomes by `exec`.

    There they wait until that process takes over, if it does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def working(unwound: bool = True) -> Iterator[None]:
    """Inside, signals raise KeyboardInterrupt or SystemExit(143), so that work is undone.

    Where `unwound` is False, they end the process instead: threads work that leaving `with` blocks
    would not stop.
    """
    global _working
    before, _working = _working, unwound
    try:
        yield
    finally:
        _working = before


def answered() -> int | None:
    """The exit status if a signal ended the work, whatever became of its exception; says so."""
    if _request is not None:
        _say(_request)
        return 128 + _request
    return None


def leave() -> None:
    """Ends the process if a signal ended its work, and is called when its `with` blocks are left.

    Not by returning: libraries that were interrupted crash at the interpreter's end, XLA for one.
    """
    if _request is not None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        _end(_request)


def _handle(number: int, frame: FrameType | None) -> None:
    global _request, _raised
    _request = _request or number
    if _ender is not None:
        while _ender != threading.get_ident():  # what is being removed must not be written again
            time.sleep(1)
    elif not _working or _overdue or _is_importing(frame):
        _end(_request)
    elif not _raised:
        _raised = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _end(number: int) -> NoReturn:
    global _request, _ender
    _request, _ender = _request or number, threading.get_ident()
    _say(_request)
    for clean_up in reversed(clean_ups):
        with contextlib.suppress(Exception):
            clean_up()
    _exit(_request)


def _exit(number: int) -> NoReturn:
    _say(number)
    os._exit(128 + number)


def _say(number: int) -> None:
    global _said
    if not _said:
        _said = True
        # Not behind an open progress bar; and nothing behind it that other threads may say.
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        with contextlib.suppress(OSError):
            os.write(2, b"\n" * bool(bars) + _LINES[number])
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _watch(reader: int) -> None:
    """The thread: sees every signal as it comes, even while the main thread is in C++."""
    taken = None  # when another handler got one, as training's (`machine.signals`)
    while True:
        if (number := os.read(reader, 1)[0]) not in _LINES:
            continue
        now = time.monotonic()
        taken = taken or now
        if signal.getsignal(number) is _handle or now > taken + SAME_SECONDS:
            break
    first, asked_again, ending = time.monotonic(), None, False
    while True:
        ready, _, _ = select.select([reader], [], [], 0.05)
        waited = time.monotonic() - first
        again = ready and os.read(reader, 1)[0] in _LINES
        if again and waited > SAME_SECONDS and asked_again is None:
            _exit(number)
        if ending or _ender is not None:
            continue
        if asked_again is None and waited > _UNWIND_SECONDS:
            asked_again = waited
            _ask_again(number)
        since = 0.0 if _request is None else asked_again
        if since is not None and waited > since + _REACT_SECONDS:
            ending = True
            threading.Thread(target=_end, args=(number,), daemon=True).start()


def _ask_again(number: int) -> None:
    global _overdue
    _overdue = True
    _thread.interrupt_main(number)


def _unless_lost(hook: Callable) -> Callable:
    """`sys.unraisablehook` for the exception of a signal that came in a destructor or callback."""

    def show(unraisable):
        if _raised and unraisable.exc_type in (KeyboardInterrupt, SystemExit):
            _end(_request)
        hook(unraisable)

    return show


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
