"""The line between the processes of a run: who is there, where each one is, who has failed or died.

Every process holds one TCP connection to process 0, made before JAX starts. The kernel closes it
when its process ends, whatever ended it, and its probes find a machine that has vanished: so all
know of a death within milliseconds, or half a minute, also while the main thread waits in a
collective. JAX's own service notices later, and ends the survivors by SIGABRT, without a name.

Why JAX's own service does not carry this: it was tried (jax 0.10.2, one CPU host, 2026-11-28), with
keys that threads wait for, `get_live_nodes` and `jax_enable_recoverability`, which is experimental.
Each of 100 deaths of process 0 ended the other process by name with exit code 5, as here; but:
- No key can be set or read before all processes have come. Which ones are missing, that one died in
  the meantime, or that two have the same number, nobody is told: all wait until the deadline.
- The death of any other process is noticed after the heartbeat (30 s, here 0.02 s), and a process
  that is stopped for longer than the heartbeat counts as dead; here it may go on.
- JAX aborts when process 0 dies. A call to the service in that abort's handler waited for ever in
  one of three deaths, and had to be moved to a thread of its own.

Only processes of the run are heard (`meeting`). Messages are lines of JSON, each an object of one
key, `_MESSAGES`. No JAX here.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

from scalegpt.errors import Mistake
from scalegpt.processes import meeting
from scalegpt.processes.exits import Exit, dump_stacks, elsewhere, end, say

DIED = "died; all others stop, and the same command continues the run"
_LONGEST = 1 << 24  # bytes of a message
_MESSAGES = {  # its key -> the type of its value, or those of the values in its list
    "go": [int, str],  # the port for JAX's service, the host of process 0
    "failed": [int, str, int, str, bool],  # process, its host, exit code, why, with all stacks
    "at": [str, int, (int, float)],  # phase, step, seconds in it
    "where": bool,
    "table": list,
    "stop": str,  # why
    "halt": str,
    "calls": int,
    "stop_at": int,
    "done": int,  # exit code
}
_DRAIN = 2.0  # seconds that a process waits for the others to have read why it leaves


@dataclass
class Peer:
    """The other end. where: phase, step, and since when, by the clock of this process."""

    socket: socket.socket
    index: int
    host: str
    unread: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    where: tuple[str, int, float] = ("start", 0, 0.0)
    done: bool = False


class Line:
    """This process's end: process 0 has a Peer for each other process, the others have that one.

    stopping: this process's StopRequest. phases: its Phases; both may be None.
    """

    def __init__(self, host: str, port: int, count: int, index: int, secret: bytes = b"") -> None:
        self.address, self.count, self.index = (host, port), count, index
        self._secret = secret
        self._door: meeting.Door | None = None  # of process 0, until all have come
        self.host = socket.gethostname()
        self.stopping: Any = None
        self.phases: Any = None
        self.finished: int | None = None  # the exit code, once all processes are at their end
        self._jax_port = 0
        self._peers: dict[int, Peer] = {}
        self._ready, self._all_done = threading.Event(), threading.Event()
        self._table: list[Any] | None = None
        self._halted, self._calls = False, dict[int, int]()  # process -> calls of reached()
        self._my_code: int | None = None
        self._said, self._said_at = None, 0.0
        self._lock, self._sending = threading.RLock(), threading.Lock()
        self._leaving = threading.Lock()
        self._selector = selectors.DefaultSelector()

    # --- start ---

    def open(self, seconds: float) -> int:
        """Meet the others; the port for JAX's service, on the host of process 0.

        Ends the process, with the names of those that have not come, when that takes longer.
        """
        if self.index == 0:
            self._door = meeting.Door(self._selector, self.address, self.count, self._secret)
        else:
            hello = meeting.Hello(self.index, self.host, self.count)
            try:
                link = meeting.connect(self.address, hello, self._secret, seconds)
            except Mistake as error:
                self.leave(Exit.MISTAKE, str(error))
            if link is None:
                where = "{}:{}".format(*self.address)
                self.leave(
                    Exit.FAILED,
                    f"process 0 did not answer at {where} in {seconds:g} s "
                    "(run.deadline_start); does it run, and is its port open?",
                )
            self._add(Peer(link, 0, self.address[0]))
        threading.Thread(target=self._serve, daemon=True, name="line").start()
        if not self._ready.wait(seconds):
            self.leave(Exit.FAILED, f"after {seconds:g} s (run.deadline_start) {self.others()}")
        return self._jax_port

    def _add(self, peer: Peer) -> None:
        meeting.keep_alive(peer.socket)
        self._peers[peer.index] = peer
        self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _welcome(self, link: socket.socket, index: int, host: str, count: int) -> None:
        peer = Peer(link, index, host)
        meeting.keep_alive(link)
        wrong = None
        if count != self.count:
            wrong = (
                f"process {index} ({host}) was told of {count} processes, process 0 of "
                f"{self.count}; give all the same --distributed.num_processes"
            )
        elif index in {0, *self._peers}:
            other = self._peers[index].host if index else self.host
            wrong = (
                f"two processes, on {other} and {host}, say that they are process {index}; "
                "give each its own --distributed.process_id"
            )
        if wrong:
            self._send(peer, failed=[0, self.host, Exit.MISTAKE, wrong, False])
            self.leave(Exit.MISTAKE, wrong)
        self._add(peer)
        if len(self._peers) == self.count - 1:
            self._door.close()
            self._jax_port = meeting.free_port(self.address[1] + 1)
            self._to_all(go=[self._jax_port, self.host])
            self._ready.set()

    # --- the thread ---

    def _serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(1.0):
                    if isinstance(key.data, Peer):
                        self._read(key.data)
                    elif isinstance(key.data, meeting.Caller):
                        if hello := self._door.read(key.data):
                            self._welcome(key.data.socket, *hello)
                    else:
                        self._door.accept()
                if self._door:
                    self._door.sweep()
                self._say_where()
        except Exception:
            text = f"the line between the processes broke\n{traceback.format_exc()}"
            self.leave(Exit.FAILED, text)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.socket.recv(65536)
        except OSError:  # the probes had no answer
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            if not peer.done and self.finished is None:
                self._end(peer.index, peer.host, Exit.FAILED, DIED)
            return
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        peer.heard = time.monotonic()
        try:
            messages = [_message(text) for text in filter(None, lines)]
            if len(peer.unread) > _LONGEST:
                raise ValueError(f"more than {_LONGEST} bytes without an end")
        except ValueError as error:
            self.leave(Exit.FAILED, f"process {peer.index} ({peer.host}) sent {error}")
        for kind, value in messages:
            self._handle(peer, kind, value)

    def _handle(self, peer: Peer, kind: str, value: Any) -> None:
        match kind:
            case "go":
                self._jax_port, peer.host = value
                self._ready.set()
            case "failed":
                self._end(*value)
            case "at":
                name, step, seconds = value
                peer.where = (name, step, time.monotonic() - seconds)
            case "where":
                self._send(peer, table=self._rows())
            case "table":
                self._table = value
            case "stop":
                self.ask_to_stop(value)
            case "halt":
                self._send(peer, calls=self.stopping.halt(value))
            case "calls":
                self._agree(peer.index, value)
            case "stop_at":
                self.stopping.agreed(value)
            case "done":
                peer.done = True
                if self.index:
                    self.finished = value
                    self._all_done.set()
                else:
                    self._check_done()

    def _send(self, peer: Peer, **message: Any) -> None:
        # Whoever cannot be written to is dead or stopped, which reading finds out.
        with contextlib.suppress(OSError), self._sending:
            peer.socket.sendall(json.dumps(message).encode() + b"\n")

    def _to_all(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            self._send(peer, **message)

    # --- where the processes are ---

    def _here(self) -> tuple[str, int, float]:
        if self.phases is None:
            return ("its work", 0, 0.0)
        now = self.phases.current
        return (now.name, now.step, time.monotonic() - now.since)

    def _say_where(self) -> None:
        here, now = self._here(), time.monotonic()
        if self.index and (here[:2] != self._said or now - self._said_at > 4):
            self._said, self._said_at = here[:2], now
            self._to_all(at=here)

    def _rows(self) -> list[Any]:
        now = time.monotonic()
        rows = [
            [i, p.host, *p.where[:2], now - p.where[2], now - p.heard]
            for i, p in sorted(self._peers.items())
        ]
        return [[0, self.host, *self._here(), 0.0], *rows]

    def others(self) -> str:
        """Which processes are elsewhere than this one, or say nothing: for the report of a hang."""
        if not self._ready.is_set():
            absent = ", ".join(str(i) for i in range(1, self.count) if i not in self._peers)
            if self.index:
                return "process 0 waits for other processes, see its output"
            refused = f"; {self._door.refused}" if self._door and self._door.refused else ""
            return f"of {self.count} processes these have not come: {absent}{refused}"
        if self.index:
            self._table, until = None, time.monotonic() + 3
            self._to_all(where=True)
            while self._table is None:
                if time.monotonic() > until:
                    return (
                        f"process 0 ({self._peers[0].host}) does not answer, it is stopped, or "
                        "its machine hangs"
                    )
                time.sleep(0.02)
        rows = self._table if self.index else self._rows()
        return elsewhere([row for row in rows if row[0] != self.index], *self._here()[:2])

    # --- a request to stop: all leave at the same call of StopRequest.reached ---

    def ask_to_stop(self, why: str) -> None:
        if self.index:
            return self._to_all(stop=why)
        with self._lock:
            if not self._halted:
                self._halted = True
                self._to_all(halt=why)
                self._agree(0, self.stopping.halt(why))

    def _agree(self, index: int, calls: int) -> None:
        with self._lock:
            self._calls[index] = calls
            if len(self._calls) == self.count:
                call = max(self._calls.values()) + 1
                self._to_all(stop_at=call)
                self.stopping.agreed(call)

    # --- ends ---

    def farewell(self, code: int) -> None:
        """Wait until every process has come to its end, so that none takes another for dead."""
        if self.index:
            self._to_all(done=code)
        else:
            self._my_code = code
            self._check_done()
        self._all_done.wait()

    def _check_done(self) -> None:
        with self._lock:
            if self._my_code is not None and all(p.done for p in self._peers.values()):
                self.finished = self._my_code
                self._to_all(done=self._my_code)
                self._all_done.set()

    def leave(self, code: int, text: str, dump: bool = False, said: bool = False) -> NoReturn:
        """End this process, and all others with `text` and the same code.

        dump: with the stacks of all their threads. said: this process has told its user already.
        """
        self._end(self.index, self.host, code, text, dump, said)

    def _end(
        self, index: int, host: str, code: int, text: str, dump: bool = False, said: bool = False
    ) -> NoReturn:
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to end the process
        if not said:
            say(f"process {index} ({host}){'' if text == DIED else ':'} {text}")
        tell = [p for p in self._peers.values() if self.index in (0, index) and p.index != index]
        for peer in tell:
            self._send(peer, failed=[index, host, code, text, dump])
        if dump:
            dump_stacks(*self._here())
        # Until the others have read it: an unread message would be lost with the connection.
        until = time.monotonic() + _DRAIN
        for peer in tell:
            with contextlib.suppress(OSError):
                while (left := until - time.monotonic()) > 0:
                    peer.socket.settimeout(left)
                    if not peer.socket.recv(65536):
                        break
        end(code)


def _message(text: bytes) -> tuple[str, Any]:
    """A line of a peer -> the key and the value. Raises ValueError for what is no message."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or len(message) != 1:
        raise ValueError(f"what is no message: {text[:100]!r}")
    ((kind, value),) = message.items()
    types = _MESSAGES.get(kind, ())
    if isinstance(types, list):
        fits = isinstance(value, list) and len(value) == len(types)
        fits = fits and all(map(isinstance, value, types))
    else:
        fits = isinstance(value, types)
    if not fits:
        raise ValueError(f"what is no message: {text[:100]!r}")
    return kind, value
