"""Exit codes, and how a process ends from any thread while its other threads are stuck."""

import faulthandler
import os
import signal
import sys
import threading
from enum import IntEnum
from typing import NoReturn

from scalegpt.processes.streams import offer


class Exit(IntEnum):
    """The exit codes of every command; README and scripts rely on them."""

    DONE = 0
    MISTAKE = 2  # the user's
    STOPPED = 3  # on request; what there was to save is saved
    NOT_FINITE = 4  # the loss or the gradient; nothing bad is saved
    FAILED = 5  # a deadline passed, a process died, or nothing could be saved
    INTERRUPTED = 130  # by Ctrl-C, as a shell says it
    BROKEN_PIPE = 141  # `| head` has seen enough


NOTHING_TO_SAVE = "stopped; there was nothing new to save"


def say(text: str) -> None:
    """Write a line to standard error, past Python's buffers: a stuck thread may hold their lock.

    On a terminal it takes the place of a live line, which comes back below with its next update.
    """
    clear = "\r\x1b[K" if os.isatty(2) else ""
    offer(2, f"{clear}{text}\n".encode())


def dump_stacks() -> None:
    """Write to standard error what each thread of this process is doing."""
    faulthandler.dump_traceback(2)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to stop, without SIGHUP where nohup has it ignored.

    A connection that drops sends SIGHUP, Slurm SIGUSR1 (`--signal=USR1@60`) and then SIGTERM.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has two
    return [n for n in known if n in known[:2] or signal.getsignal(n) is not signal.SIG_IGN]


def leave_on_signals() -> None:
    """From here on a request to stop ends this process at once, as a run that was stopped.

    This is for the time before `StopRequest` exists, when there is nothing to save.
    """

    def leave(number: int, frame: object) -> NoReturn:
        say(f"{signal.Signals(number).name}: {NOTHING_TO_SAVE}")
        os._exit(Exit.STOPPED)

    for number in stop_signals():
        signal.signal(number, leave)


def leave_on_interrupt() -> None:
    """Let Ctrl-C end this process without a word until `run_command`: while modules are imported
    an exception may be swallowed, or end in a page of traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(code: int) -> NoReturn:
    """End this process without clean-up, which would wait for what is gone or stuck."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    # In a thread, for whoever reads the output may have stopped reading.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)
