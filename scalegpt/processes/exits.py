"""Ending this process from any thread, whatever the others are stuck in."""

import faulthandler
import os
import signal
import sys
import threading
from enum import IntEnum
from typing import NoReturn

from scalegpt.processes.phases import PHASES


class Exit(IntEnum):
    """The exit codes of every command; README and scripts rely on them."""

    DONE = 0
    MISTAKE = 2  # the user's
    STOPPED = 3  # on request; what there was to save is saved
    NOT_FINITE = 4  # the loss or the gradient; nothing bad is saved
    FAILED = 5  # a deadline passed, a process died, or nothing could be saved
    INTERRUPTED = 130  # by Ctrl-C, as a shell says it
    BROKEN_PIPE = 141  # `| head` has seen enough


_SILENT = 12.0  # seconds; a process that runs says where it is at least every 5


def say(text: str) -> None:
    """A line to standard error, past Python's buffers: who holds their locks may be stuck."""
    os.write(2, f"{text}\n".encode())


def dump_stacks(name: str, step: int, seconds: float) -> None:
    """Where this process is, and what each of its threads does."""
    say(f"this process is in {name}, step {step}, since {seconds:.0f} s; its threads:")
    faulthandler.dump_traceback(2)


def key_of(phase: str) -> str:
    """The key that limits a phase."""
    return f"run.deadline_{PHASES[phase][1]}"


def elsewhere(others: list[tuple], name: str, step: int) -> str:
    """Which of the others do not wait in the phase `name` of `step`, or do not speak at all.

    others: (process, host, its phase, its step, seconds in it, seconds since it spoke).
    """
    found = []
    for index, host, its, its_step, seconds, silent in others:
        process, where = f"process {index} ({host})", f"in {its}, step {its_step}"
        if silent > _SILENT:
            found.append(
                f"{process} has said nothing for {silent:.0f} s, it is stopped, or its "
                f"machine hangs; it was {where}"
            )
        elif (its, its_step) != (name, step):
            found.append(f"{process} is {where}, since {seconds:.0f} s")
    return "\n".join(found) or "all other processes are in the same phase"


def leave_on_signals() -> None:
    """SIGINT and SIGTERM end this process at once, from here on, with the exit code of a run that
    was stopped: it has not begun."""

    def leave(number: int, frame: object) -> NoReturn:
        say(f"{signal.Signals(number).name}: stopped before there was anything to save")
        os._exit(Exit.STOPPED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def end(code: int) -> NoReturn:
    """Leave without clean-up, which would wait for processes or threads that are gone."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)
