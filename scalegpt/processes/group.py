"""The other processes of this run, for whoever starts, fails or ends; alone, next to nothing."""

import ctypes
import os
import signal
import threading
import time
from typing import Any, NoReturn

from scalegpt.processes.exits import Exit, end, say
from scalegpt.processes.link import Line

line: Line | None = None  # with one process there is none
_stopping: Any = None
_phases: Any = None


def introduce(stopping: Any = None, phases: Any = None) -> None:
    """This process's StopRequest and Phases, before `join`."""
    global _stopping, _phases
    _stopping, _phases = stopping or _stopping, phases or _phases
    if line:
        line.stopping, line.phases = _stopping, _phases


def join(host: str, port: int, count: int, index: int, seconds: float, secret: bytes = b"") -> int:
    """Meet the other processes, at process 0; gives the port for JAX's own service there.

    secret: what only the processes of this run know.
    Ends the process after `seconds`, with the names of those that have not come.
    """
    global line
    line = Line(host, port, count, index, secret)
    introduce()
    _catch_aborts(line)
    return line.open(seconds)


def leave(code: int, text: str, dump: bool = False, said: bool = False) -> NoReturn:
    """End this process now, from any thread, and with it all others of the run.

    said: the user of this process knows already. dump: with the stacks of all threads.
    """
    if line:
        line.leave(code, text, dump, said)
    if not said:
        say(text)
    end(code)


def wait_for_cause(error: BaseException) -> None:
    """An error of JAX may be the echo of a death elsewhere: let the line leave with that."""
    if line and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        time.sleep(2)


def farewell(code: int) -> None:
    """The end of a command that went well: wait for the others, and for JAX to take its leave."""
    if line is None:
        return
    line.farewell(code)
    # All is saved. JAX's barrier at exit may wait minutes for a process that ends otherwise.
    late = threading.Timer(10, end, (code,))
    late.daemon = True
    late.start()


def _catch_aborts(line: Line) -> None:
    """JAX's client aborts when process 0 is gone: leave with a name and an exit code instead.

    Python's own handlers run in the main thread, which an abort does not return to.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        if line.finished is not None:
            os._exit(line.finished)
        time.sleep(2)  # the line has seen it, too, and names who died
        line.leave(Exit.FAILED, f"aborted from within JAX, see above; {line.others()}")

    _catch_aborts.kept = aborted  # C must not outlive it
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
