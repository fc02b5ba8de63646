"""All processes of a run as one object: a `Group` of several, or one process `Alone`.

`startup.find` makes it, and it is handed to whoever may end the run or asks for the others. A
command works inside `with group:` and returns `group.farewell(code)`, so that an exception in one
process ends all of them with its exit code, and none that is done is taken for dead.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn, Self

from scalegpt.processes.command import code_of, message_of, show
from scalegpt.processes.exits import Exit, dump_stacks, end, say
from scalegpt.processes.link import Link
from scalegpt.processes.phases import Phases

if TYPE_CHECKING:
    from scalegpt.processes.stop_request import StopRequest


class Alone:
    """A run of one process: nobody else must know how it ends."""

    count, index = 1, 0
    say = staticmethod(say)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        """Leave the exception to `command.exit_code`."""

    def leave(self, code: int, text: str, with_stacks: bool = False) -> NoReturn:
        """Say why and end this process now, from any thread."""
        say(text)
        if with_stacks:
            dump_stacks()
        end(code)

    def farewell(self, code: int) -> int:
        return code

    def others(self) -> str:
        return ""


class Left(BaseException):
    """A `Guest` cannot go on; it is raised in its thread. No `except Exception` is meant for it."""


class Guest(Alone):
    """A run of one process within somebody else's program, as a notebook, which it must not end.

    Create it in the thread of the run. why: what was said when it had to leave.
    """

    def __init__(self) -> None:
        self.why = ""
        self._thread = threading.get_ident()

    def say(self, text: str) -> None:
        """Write a line where the program's own messages go, which a notebook shows in the cell."""
        print(text, file=sys.stderr, flush=True)

    def leave(self, code: int, text: str, with_stacks: bool = False) -> None:
        """Say why, from any thread, and raise Left in the run's own, as soon as it runs Python."""
        self.why = text
        self.say(text)
        if with_stacks:
            dump_stacks()
        thread, error = ctypes.c_ulong(self._thread), ctypes.py_object(Left)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)


class Group:
    """A run of several processes, each with a link to process 0, which listens at host:port.

    secret: bytes that only the processes of this run know. local_devices: numbers of the devices
    of this machine that this process may use, or None for all.
    """

    say = staticmethod(say)

    def __init__(
        self,
        host: str,
        port: int,
        count: int,
        index: int,
        secret: bytes = b"",
        local_devices: list[int] | None = None,
    ) -> None:
        self.host, self.count, self.index = host, count, index
        self.local_devices = local_devices
        self.link = Link((host, port), count, index, secret)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.fail(error)

    def connect(
        self, seconds: float, phases: Phases | None = None, stop: "StopRequest | None" = None
    ) -> int:
        """Connect with all other processes; return a port of process 0 for JAX's own service.

        phases: what this process does, for the others' reports. stop: hears of the others' requests
        to stop. When not all have come after so many seconds, this process ends and names them.
        """
        self._leave_on_aborts()
        return self.link.open(seconds, phases, stop)

    def fail(self, error: BaseException) -> NoReturn:
        """Show an exception and end all processes with its exit code.

        Call it before a clean-up that waits for other processes: they may be waiting for this one.
        """
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
            # JAX may only have noticed that another process died. Within that time the link's
            # thread notices, too, and ends this process with the name of the other.
            time.sleep(2)
        show(error)
        self.link.leave(code_of(error), message_of(error), shown=True)

    def leave(self, code: int, text: str, with_stacks: bool = False) -> NoReturn:
        """Say why and end all processes now, from any thread; each says which one has left."""
        self.link.leave(code, text, with_stacks)

    def farewell(self, code: int) -> int:
        """Wait until all processes have come to the end of the command; return its exit code."""
        self.link.farewell(code)
        # What there was to save is saved. JAX waits at exit for all processes, for minutes if one
        # of them ends otherwise.
        late = threading.Timer(10, end, (code,))
        late.daemon = True
        late.start()
        return code

    def others(self) -> str:
        """Return which other processes are in another phase than this one, or do not answer."""
        return self.link.others()

    def ask_to_stop(self, why: str) -> None:
        """Have StopRequest.agree called in all processes."""
        self.link.ask_to_stop(why)

    def _leave_on_aborts(self) -> None:
        """Make SIGABRT end this process with an exit code of ours, and the others with a reason.

        JAX's client aborts the process when process 0 is gone. Its `missed_heartbeat_callback` is
        no way out: jaxlib 0.10.2 dies of a std::bad_cast when it calls one written in Python. Nor
        is a handler set by Python's `signal`, which runs in the main thread, and the abort does not
        return there. So C calls this Python function within the handler, which is not safe in
        general, as a thread that holds a lock may be the one that aborts. Here the alternative is
        an exit code of 134 and a page of C++; abort() ends the process when the handler fails.
        """

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def aborted(number: int) -> None:
            if self.link.exit_code is not None:
                os._exit(self.link.exit_code)  # after the farewell nothing can be lost
            time.sleep(2)  # the link's thread may name a process that has died, and end this one
            self.leave(Exit.FAILED, f"aborted from within JAX, see above; {self.others()}")

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(aborted))  # C keeps it for good
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
