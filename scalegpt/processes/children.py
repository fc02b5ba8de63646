"""A command that starts runs has them as child processes, one at a time."""

import signal
import subprocess
import sys
from typing import Any

from scalegpt.processes.exits import Exit, stop_signals

# Has Linux send SIGTERM to a child whose parent is gone, however it went: the run saves, and does
# not go on alone. The setting outlives execv.
_WITH_ITS_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Children:
    """Runs are child processes, one at a time, which get each request to stop exactly once."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen | None = None
        self._early_signal: int | None = None  # one that came while the process was being started
        self._handlers = {number: signal.signal(number, self._pass_on) for number in stop_signals()}

    def _pass_on(self, number: int, frame: Any) -> None:
        self.stopped = True
        if self._process:
            self._process.send_signal(number)
        else:
            self._early_signal = number

    def run(self, command: list[str], output: Any) -> int:
        """Run a command and return its exit code; after a signal, begin nothing: Exit.STOPPED.

        command: of sys.executable. output: a file for what it prints, or None.
        """
        if self.stopped:
            return Exit.STOPPED
        if sys.platform == "linux":
            command = [sys.executable, "-c", _WITH_ITS_PARENT, *command]
        # A group of its own: else it would have Ctrl-C from the terminal and from here, and of two
        # signals the second ends a run without saving.
        self._process = subprocess.Popen(command, stdout=output, process_group=0)
        if self._early_signal:
            self._process.send_signal(self._early_signal)
        code = self._process.wait()
        self._process = None
        return code

    def close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
