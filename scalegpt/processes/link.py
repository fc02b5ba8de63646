"""The link between the processes of a run: who is there, where each one is, who has failed or died.

Every process but the first holds one TCP connection to process 0, made before JAX starts. The
kernel closes it when its process ends, whatever ended it, and its probes find a machine that has
vanished. So all know of a death within milliseconds, or half a minute, also while the main thread
waits in a collective. JAX's own service notices later, and ends the survivors by SIGABRT, without a
name.

Why JAX's own service does not carry this: it was tried (jax 0.10.2, one CPU host, 2026-11-28), with
keys that threads wait for, `get_live_nodes` and `jax_enable_recoverability`, which is experimental.
Each of 100 deaths of process 0 ended the other process by name with exit code 5, as here; but:
- No key can be set or read before all processes have come. Which ones are missing, that one died in
  the meantime, or that two have the same number, nobody is told: all wait until the deadline.
- The death of any other process is noticed after the heartbeat (30 s, here 0.02 s), and a process
  that is stopped for longer than the heartbeat counts as dead; here it may go on.
- JAX aborts when process 0 dies. A call to the service in that abort's handler waited for ever in
  one of three deaths, and had to be moved to a thread of its own.

Only processes that have passed the `handshake` are heard. A message is a line of JSON, one of those
in `Link._handle`. Nothing here imports JAX.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from scalegpt.errors import Mistake
from scalegpt.processes import handshake
from scalegpt.processes.exits import Exit, dump_stacks, end, say
from scalegpt.processes.phases import Phases

if TYPE_CHECKING:
    from scalegpt.processes.stop_request import StopRequest

DIED = "died; all others stop, and the same command continues the run"
_LONGEST = 1 << 24  # bytes of a message
_WAIT_FOR_READERS = 2.0  # seconds that a process waits for the others to read why it leaves
_SAY_AGAIN = 4.0  # seconds after which a process says again where it is
_SILENT = 12.0  # seconds after which a process that has said nothing is taken for stopped


@dataclass
class Peer:
    """The process at the other end of a connection.

    heard: when it last sent anything; where: its phase, its step and since when. Both times are by
    this process's clock.
    """

    socket: socket.socket
    index: int
    host: str
    unread: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    where: tuple[str, int, float] = ("start", 0, 0.0)
    done: bool = False


class Link:
    """This process's connections: process 0 has one to each other process, the others one to it.

    address: where process 0 listens until all have come. A thread reads what the others send.
    """

    def __init__(
        self, address: tuple[str, int], count: int, index: int, secret: bytes = b""
    ) -> None:
        self.address, self.count, self.index = address, count, index
        self.host = socket.gethostname()
        self.exit_code: int | None = None  # known when all processes are at their end
        self._secret = secret
        self._listener: handshake.Listener | None = None  # in process 0
        self._phases: Phases | None = None
        self._stop: StopRequest | None = None
        self._stop_asked = False
        self._jax_port = 0
        self._peers: dict[int, Peer] = {}
        self._all_have_come, self._all_done = threading.Event(), threading.Event()
        self._received_table: list[Any] | None = None
        self._my_code: int | None = None
        self._last_said: tuple[str, int] | None = None
        self._last_said_at = 0.0
        self._lock, self._sending, self._leaving = (threading.Lock() for _ in range(3))
        self._selector = selectors.DefaultSelector()

    # --- start

    def open(self, seconds: float, phases: Phases | None, stop: "StopRequest | None") -> int:
        """Connect with the other processes; return the port for JAX's service, on process 0's host.

        When that takes longer than `seconds`, this process ends, with the names of those that have
        not come.
        """
        self._phases, self._stop = phases, stop
        if self.index == 0:
            self._listener = handshake.Listener(
                self._selector, self.address, self.count, self._secret
            )
        else:
            self._add(Peer(self._connect(seconds), 0, self.address[0]))
        threading.Thread(target=self._serve, daemon=True, name="link").start()
        if not self._all_have_come.wait(seconds):
            self.leave(Exit.FAILED, f"after {seconds:g} s (run.deadline_start) {self.others()}")
        return self._jax_port

    def _connect(self, seconds: float) -> socket.socket:
        hello = handshake.Hello(self.index, self.host, self.count)
        try:
            connection = handshake.connect(self.address, hello, self._secret, seconds)
        except Mistake as error:
            self.leave(Exit.MISTAKE, str(error))
        if connection is None:
            self.leave(
                Exit.FAILED,
                f"process 0 did not answer at {self.address[0]}:{self.address[1]} in {seconds:g} s "
                "(run.deadline_start); does it run, and is its port open?",
            )
        return connection

    def _add(self, peer: Peer) -> None:
        handshake.keep_alive(peer.socket)
        self._peers[peer.index] = peer
        self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _welcome(self, connection: socket.socket, hello: handshake.Hello) -> None:
        """In process 0, take in a process that has passed the handshake; after the last one, go."""
        index, host, count = hello
        mistake = None
        if count != self.count:
            mistake = (
                f"process {index} ({host}) was told of {count} processes, process 0 of "
                f"{self.count}; give all the same --distributed.num_processes"
            )
        elif index in {0, *self._peers}:
            other = self._peers[index].host if index else self.host
            mistake = (
                f"two processes, on {other} and {host}, say that they are process {index}; "
                "give each its own --distributed.process_id"
            )
        if mistake:
            handshake.keep_alive(connection)
            failed = [0, self.host, Exit.MISTAKE, mistake, False]
            self._send(Peer(connection, index, host), failed=failed)
            self.leave(Exit.MISTAKE, mistake)
        self._add(Peer(connection, index, host))
        if len(self._peers) == self.count - 1:
            self._listener.close()
            self._jax_port = handshake.free_port(self.address[1] + 1)
            self._send_all(go=[self._jax_port, self.host])
            self._all_have_come.set()

    # --- the thread that reads

    def _serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(1.0):
                    if isinstance(key.data, Peer):
                        self._read(key.data)
                    elif isinstance(key.data, handshake.Caller):
                        if hello := self._listener.read(key.data):
                            self._welcome(key.data.socket, hello)
                    else:
                        self._listener.accept()
                if self._listener:
                    self._listener.sweep()
                self._say_where()
        except Exception:
            text = f"the link between the processes broke\n{traceback.format_exc()}"
            self.leave(Exit.FAILED, text)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.socket.recv(65536)
        except OSError:  # nobody has answered the kernel's probes
            data = b""
        if not data:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            if not peer.done and self.exit_code is None:
                self._end(peer.index, peer.host, Exit.FAILED, DIED)
            return
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        peer.heard = time.monotonic()
        if len(peer.unread) > _LONGEST:
            lines.append(b"a line without end")
        for line in filter(None, lines):
            self._handle(peer, line)

    def _handle(self, peer: Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        match message:
            case {"go": [int(port), str(host)]}:  # the port for JAX's service, process 0's host
                self._jax_port, peer.host = port, host
                self._all_have_come.set()
            case {"failed": [int(), str(), int(), str(), bool()]}:  # as of `_end`
                self._end(*message["failed"])
            case {"at": [str(phase), int(step), float(seconds)]}:
                peer.where = (phase, step, time.monotonic() - seconds)
            case {"where": True}:  # the sender asks process 0 for the table
                self._send(peer, table=self._table())
            case {"table": list(table)}:
                self._received_table = table
            case {"stop": str(why)} if self.index == 0:
                self.ask_to_stop(why)
            case {"stop": str(why)}:
                self._stop.agree(why)
            case {"done": int()} if self.index == 0:
                peer.done = True
                self._check_done()
            case {"done": int(code)}:
                self.exit_code = code
                self._all_done.set()
            case _:
                who = f"process {peer.index} ({peer.host})"
                self.leave(Exit.FAILED, f"{who} sent what is no message: {line[:100]!r}")

    def _send(self, peer: Peer, **message: Any) -> None:
        # A process that cannot be written to is dead or stopped, which reading finds out.
        with contextlib.suppress(OSError), self._sending:
            peer.socket.sendall(json.dumps(message).encode() + b"\n")

    def _send_all(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            self._send(peer, **message)

    # --- where the processes are

    def _here(self) -> tuple[str, int, float]:
        """Return this process's phase, its step and the seconds in it."""
        if self._phases is None:
            return ("its work", 0, 0.0)
        phase = self._phases.current
        return (phase.name, phase.step, time.monotonic() - phase.since)

    def _say_where(self) -> None:
        here, now = self._here(), time.monotonic()
        if self.index and (here[:2] != self._last_said or now - self._last_said_at > _SAY_AGAIN):
            self._last_said, self._last_said_at = here[:2], now
            self._send_all(at=here)

    def _table(self) -> list[Any]:
        """In process 0, a row of each process; see `_elsewhere`."""
        now = time.monotonic()
        rows = [
            [i, p.host, *p.where[:2], now - p.where[2], now - p.heard]
            for i, p in sorted(self._peers.items())
        ]
        return [[0, self.host, *self._here(), 0.0], *rows]

    def others(self) -> str:
        """Return which processes are in another phase than this one, or say nothing."""
        if not self._all_have_come.is_set():
            if self.index:
                return "process 0 waits for other processes, see its output"
            absent = ", ".join(str(i) for i in range(1, self.count) if i not in self._peers)
            refused = self._listener.refused if self._listener else ""
            refused = refused and f"; {refused}"
            return f"of {self.count} processes these have not come: {absent}{refused}"
        if self.index:
            self._received_table, until = None, time.monotonic() + 3
            self._send_all(where=True)
            while self._received_table is None:
                if time.monotonic() > until:
                    return (
                        f"process 0 ({self._peers[0].host}) does not answer, it is stopped, or "
                        "its machine hangs"
                    )
                time.sleep(0.02)
        table = self._received_table if self.index else self._table()
        return _elsewhere([row for row in table if row[0] != self.index], *self._here()[:2])

    # --- ends

    def ask_to_stop(self, why: str) -> None:
        """Have StopRequest.agree called in all processes, once, whoever asks and how often."""
        if self.index:
            return self._send_all(stop=why)
        with self._lock:
            asked_before, self._stop_asked = self._stop_asked, True
        if not asked_before:
            self._send_all(stop=why)
            self._stop.agree(why)

    def farewell(self, code: int) -> None:
        """Wait until every process has come to its end, so that none is taken for dead."""
        if self.index:
            self._send_all(done=code)
        else:
            self._my_code = code
            self._check_done()
        self._all_done.wait()

    def _check_done(self) -> None:
        with self._lock:
            if self._my_code is not None and all(p.done for p in self._peers.values()):
                self.exit_code = self._my_code
                self._send_all(done=self._my_code)
                self._all_done.set()

    def leave(
        self, code: int, text: str, with_stacks: bool = False, shown: bool = False
    ) -> NoReturn:
        """End this process, and all others with the same code and text.

        with_stacks: each writes what its threads are doing. shown: this process has told its user
        already.
        """
        self._end(self.index, self.host, code, text, with_stacks, shown)

    def _end(
        self,
        index: int,
        host: str,
        code: int,
        text: str,
        with_stacks: bool = False,
        shown: bool = False,
    ) -> NoReturn:
        """End this process for what happened to process `index`; process 0 tells the others."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to end the process
        if not shown:
            say(f"process {index} ({host}){'' if text == DIED else ':'} {text}")
        told = [p for p in self._peers.values() if self.index in (0, index) and p.index != index]
        for peer in told:
            self._send(peer, failed=[index, host, code, text, with_stacks])
        if with_stacks:
            phase, step, seconds = self._here()
            say(f"this process is in {phase}, step {step}, since {seconds:.0f} s; its threads:")
            dump_stacks()
        # An unread message would be lost with the connection: wait until the others have closed it.
        until = time.monotonic() + _WAIT_FOR_READERS
        for peer in told:
            with contextlib.suppress(OSError):
                while (left := until - time.monotonic()) > 0:
                    peer.socket.settimeout(left)
                    if not peer.socket.recv(65536):
                        break
        end(code)


def _elsewhere(others: list[tuple], phase: str, step: int) -> str:
    """Return which processes are not in `phase` of `step`, or have not been heard for a while.

    others: rows of process, its host, its phase, its step, seconds in it, seconds since it spoke.
    """
    lines = []
    for index, host, its_phase, its_step, seconds, silent in others:
        process, where = f"process {index} ({host})", f"in {its_phase}, step {its_step}"
        if silent > _SILENT:
            lines.append(
                f"{process} has said nothing for {silent:.0f} s, it is stopped, or its "
                f"machine hangs; it was {where}"
            )
        elif (its_phase, its_step) != (phase, step):
            lines.append(f"{process} is {where}, since {seconds:.0f} s")
    return "\n".join(lines) or "all other processes are in the same phase"
