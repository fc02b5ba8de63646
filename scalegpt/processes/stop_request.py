"""The request to stop, which may come at any moment: Ctrl-C, SIGTERM, or word from the cloud."""

import os
import signal
import socket
import threading
import time
import urllib.request

from scalegpt.processes import group
from scalegpt.processes.exits import Exit, say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_METADATA = "http://{}/computeMetadata/v1/instance/{}"
_NOTICES = {
    "preempted": ("TRUE", "this spot machine is being preempted"),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", "maintenance will end this machine"),
}
_POLL = 5.0  # seconds; a spot machine has 30 from the notice to its end


class Interrupted(Exception):
    """Asked to stop in the midst of something that can be done later."""


class StopRequest:
    """Asked to stop, the run saves at the end of a step and leaves; asked twice, it leaves at once.

    With `saves` false, at the start, there is nothing to save, and it leaves at once, too: also
    while the main thread compiles and sees no signals, hence the thread. Several processes agree
    on where to stop. From the main thread only; `close` gives the signals back.
    """

    def __init__(self) -> None:
        self.saves = False
        self._signals, self._calls, self._last = 0, 0, None
        self._counting = threading.Lock()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = (ours, theirs)
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # Python writes the number of a signal there from within C, whatever the main thread does.
        self._before = {n: signal.signal(n, lambda number, frame: None) for n in _SIGNALS}
        group.introduce(stopping=self)
        threading.Thread(target=self._listen, daemon=True, name="stop").start()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._sockets[1].close()

    def _listen(self) -> None:
        while numbers := self._sockets[0].recv(1):
            if numbers[0] in _SIGNALS:
                self._signals += 1
                if self._signals > 1:
                    group.leave(128 + numbers[0], "left at once on a second signal")
                self.ask(signal.Signals(numbers[0]).name)
        self._sockets[0].close()

    def ask(self, why: str) -> None:
        """Ask the run to stop, from any thread."""
        if not self.saves:
            group.leave(Exit.STOPPED, f"{why}: stopped before there was anything to save")
        say(f"\n{why}: saving after this step; once more to leave at once")
        if group.line:
            group.line.ask_to_stop(why)
        else:
            self._last = 0

    def reached(self, step: int | None = None) -> bool:
        """Whether to stop here: the same answer in every process, for the same call of this.

        It waits for nobody, but once and for an instant while the processes agree.
        """
        with self._counting:
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def check(self) -> None:
        """Raises Interrupted when `reached`."""
        if self.reached():
            raise Interrupted

    # Of the line: between these two `reached` does not return, so that no call is overtaken.

    def halt(self, why: str) -> int:
        """Calls of `reached` so far, in this process."""
        if group.line.index == 0 and not self._signals:
            say(f"\n{why} in another process: saving after this step")
        self._counting.acquire()
        return self._calls

    def agreed(self, call: int) -> None:
        """`reached` says yes from this call on."""
        self._last = call
        self._counting.release()

    # --- word from the cloud ---

    def heed_notices(self, on_cloud: bool) -> None:
        """Take the end that Google's metadata server announces for this machine as a request.

        on_cloud: it runs on a TPU; otherwise only where GCE_METADATA_HOST names a server.
        """
        host = os.environ.get("GCE_METADATA_HOST") or (on_cloud and "metadata.google.internal")
        for name in _NOTICES if host else ():
            url = _METADATA.format(host, name)
            watching = threading.Thread(target=self._heed, args=(url, *_NOTICES[name]), daemon=True)
            watching.start()

    def _heed(self, url: str, bad: str, meaning: str) -> None:
        before = None
        while True:
            now = _fetch(url)
            # One that was there before would stop each new start of a run until the event is over.
            if before is not None and now == bad != before:
                return self.ask(f"{meaning} ({url.rpartition('/')[2]}: {now})")
            before = now or before
            time.sleep(_POLL)


def _fetch(url: str) -> str | None:
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read(200).decode().strip()
    except (OSError, ValueError):  # no word is no reason to end a run
        return None
