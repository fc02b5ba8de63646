"""The request to stop a run, which may come at any moment: by a signal, or by Google's notice."""

import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

from scalegpt.processes.exits import NOTHING_TO_SAVE, Exit, say, stop_signals
from scalegpt.processes.group import Alone, Group, Guest

_METADATA = "http://{}/computeMetadata/v1/instance/{}"
_NOTICES = {
    "preempted": ("TRUE", "this spot machine is being preempted"),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", "maintenance will end this machine"),
}
_POLL = 5.0  # seconds; a spot machine has 30 from the notice to its end


class Interrupted(Exception):
    """A request to stop has come during work that the next process can do, as an evaluation."""


class StopRequest:
    """Takes requests to stop: the run saves after the current update and leaves.

    On a second SIGINT or SIGTERM it leaves at once; so it does on the first signal of any kind
    while `saves` is false and there is nothing to save. A thread of its own acts on signals, for
    the main thread may be compiling and not see them. `close` gives the signals back. Created in
    another thread than the main one, as in a server, it hears no signals: Python has no way to.
    """

    def __init__(self, group: Group | Alone) -> None:
        self.saves = False
        self._group = group
        self._insisting, self._asked_here = 0, False
        self._calls, self._last_call = 0, None  # of `reached`
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._hear_signals()

    def _hear_signals(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = (ours, theirs)
        # C writes the number of a signal there, whatever Python's main thread does.
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._handle(lambda number, frame: None)
        threading.Thread(target=self._listen, daemon=True, name="stop").start()

    def _handle(self, handler: Callable[[int, Any], None], but: Any = None) -> None:
        """Take the signals that ask to stop, but those that C, or `but`, handles."""
        self._handler = handler
        heard = [number for number in stop_signals() if signal.getsignal(number) not in (None, but)]
        self._before = {number: signal.signal(number, handler) for number in heard}

    def close(self) -> None:
        self._closed.set()
        if self._before:
            self._give_back()
            self._sockets[1].close()

    def _give_back(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handler:  # or else somebody has set another
                signal.signal(number, before)
        signal.set_wakeup_fd(self._wakeup)
        self._before = {}

    def _listen(self) -> None:
        while numbers := self._sockets[0].recv(1):
            if numbers[0] in self._before:
                # The end of a terminal sends SIGHUP twice, and SIGTERM may follow by itself.
                self._insisting += numbers[0] in (signal.SIGINT, signal.SIGTERM)
                if self._insisting > 1:
                    self._group.leave(128 + numbers[0], "left at once on a second signal")
                self.ask(signal.Signals(numbers[0]).name)
        self._sockets[0].close()

    def ask(self, why: str) -> None:
        """Ask the run to stop, from any thread."""
        if not self.saves:
            self._group.leave(Exit.STOPPED, f"{why}: {NOTHING_TO_SAVE}")
        say(f"{why}: saving after this step; a second SIGINT or SIGTERM leaves at once")
        self._asked_here = True
        if self._group.count == 1:
            self._last_call = 0
        else:
            self._group.ask_to_stop(why)

    def reached(self) -> bool:
        """Return whether to stop here: the same at the same call, counted by each process.

        It waits for nobody, but once, for an instant, while the processes agree.
        """
        with self._counting:
            self._calls += 1
            return self._last_call is not None and self._calls >= self._last_call

    def check(self) -> None:
        """Raise Interrupted when `reached`."""
        if self.reached():
            raise Interrupted

    def agree(self, why: str) -> None:
        """Agree with the other processes at which call of `reached` all of them stop.

        The link's thread calls it in every process and must go on reading, so that this runs in
        another thread. From the moment in which a process counts its calls until it knows the
        largest count of all, it keeps the lock that `reached` needs. So no process is beyond the
        call after the largest count, which is where all stop.
        """
        if self._group.index == 0 and not self._asked_here:
            say(f"{why} in another process: saving after this step")

        def settle() -> None:
            from scalegpt.processes import agreement  # imports JAX, as little else of this room

            with self._counting:
                unlimited = agreement.Deadline(agreement.UNLIMITED)
                self._last_call = max(agreement.gather("stop", self._calls, unlimited)) + 1

        threading.Thread(target=settle, daemon=True, name="agree to stop").start()

    # --- notices of Google's metadata server

    def heed_notices(self, on_cloud: bool) -> None:
        """Take the end that Google's metadata server announces for this machine as a request.

        on_cloud: this is a machine with a TPU; others ask only where GCE_METADATA_HOST names a
        server.
        """
        host = os.environ.get("GCE_METADATA_HOST") or (on_cloud and "metadata.google.internal")
        for name in _NOTICES if host else ():
            url = _METADATA.format(host, name)
            watching = threading.Thread(target=self._heed, args=(url, *_NOTICES[name]), daemon=True)
            watching.start()

    def _heed(self, url: str, bad: str, meaning: str) -> None:
        before = None
        while not self._closed.is_set():
            now = _fetch(url)
            # A notice that is there already at the start is not heeded: until the event is over, it
            # would stop each new start of the run.
            if before is not None and now == bad != before:
                return self.ask(f"{meaning} ({url.rpartition('/')[2]}: {now})")
            before = now or before
            self._closed.wait(_POLL)


class GuestStopRequest(StopRequest):
    """Takes requests to stop for a run within somebody else's program, as Ctrl-C in a notebook.

    The run saves and ends; then `close` hands the signal to the program's own handler, which raises
    KeyboardInterrupt, say, or ends the program. The second signal reaches that handler at once; so
    does the first while there is nothing to save. Python runs handlers in the main thread, between
    two calls of C: while it compiles, a signal waits.
    """

    _group: Guest
    _asked_by: int | None = None

    def _hear_signals(self) -> None:
        # An event loop hears of signals there; it shall hear of one only when that is handed on.
        self._wakeup = signal.set_wakeup_fd(-1)
        self._handle(self._heard, but=signal.SIG_IGN)

    def _heard(self, number: int, frame: Any) -> None:
        if self._asked_by or not self.saves:
            self._give_back()
            signal.raise_signal(number)
        else:
            self._asked_by = number
            self.ask(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        self._group.say(f"{why}: saving after this step; a second signal does not wait for that")
        self._last_call = 0

    def close(self) -> None:
        self._closed.set()
        if self._before:
            self._give_back()
            if self._asked_by:
                signal.raise_signal(self._asked_by)


def _fetch(url: str) -> str | None:
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read(200).decode().strip()
    except (OSError, ValueError):  # a server without an answer is no reason to end a run
        return None
