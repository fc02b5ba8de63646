"""Ending this process from any thread, whatever the others are stuck in."""

import faulthandler
import os
import sys
import threading
from typing import NoReturn

from scalegpt.phases import PHASES


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


def end(code: int) -> NoReturn:
    """Leave without clean-up, which would wait for processes or threads that are gone."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)
