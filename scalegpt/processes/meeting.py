"""How the processes of a run find each other: sockets to and from process 0, closed to strangers.

Process 0 listens only until all others have come, and each of them proves that it knows the run's
secret, as process 0 proves it in turn (HMAC-SHA256 over fresh random numbers of both, compared in
constant time). Until then nothing that a caller says is parsed, and bytes, seconds and the number
of callers are limited. `multiprocessing.connection` has such a challenge, too, but waits for each
caller in turn without a time limit, and by MD5 on Python 3.11.

What this does not do: without SCALEGPT_TOKEN the secret is what a launcher tells all its processes,
such as Slurm's job id, or is empty; that keeps out port scanners and other runs, but no one who
knows it and this protocol. Messages are neither encrypted nor signed, so whoever sits on the path
between the hosts can read and change them. JAX's own service and its collectives ask nobody for a
secret: on a network with strangers a firewall must keep their ports closed.
"""

import contextlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from scalegpt.errors import Mistake
from scalegpt.processes.exits import say

TOKEN = "SCALEGPT_TOKEN"  # the environment variable of a run's secret
# What a launcher gives to all processes of a job; JAX derives the coordinator's address from the
# first two. Open MPI's third is random.
_LAUNCHED = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_orte_precondition_transports")
_CALLERS = 128  # that may be in front of the door at once, besides those of the run
_PATIENCE = 10.0  # seconds in which a caller must have proved itself
_LONGEST = 1024  # bytes that a caller may say
_GREETING = b"scalegpt "  # followed by a nonce: 32 hexadecimal digits and a newline
_REFUSED = b"another secret".ljust(64) + b"\n"  # as long as a proof and its newline
_OPTIONS = {
    # A machine that has vanished is noticed after 30 s, whether or not anything was sent to it.
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
    "TCP_NODELAY": 1,
}


class Hello(NamedTuple):
    """What a process says of itself when it comes. count: how many processes it was told of."""

    index: int
    host: str
    count: int


@dataclass(eq=False)
class Caller:
    """Somebody who has connected to process 0 and has not proved yet that it is of this run."""

    socket: socket.socket
    address: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    came: float = field(default_factory=time.monotonic)
    unread: bytes = b""


class Door:
    """Where process 0 lets the others in; its sockets are in `selector`, with a Caller or None.

    Raises Mistake when the port is taken.
    """

    def __init__(
        self, selector: selectors.BaseSelector, address: tuple[str, int], count: int, secret: bytes
    ) -> None:
        self._selector, self._secret = selector, secret
        self._limit = _CALLERS + count
        self._callers: dict[Caller, None] = {}  # in the order in which they came
        self.refused = ""  # who had another secret, if anybody
        self._server = _listen(*address, self._limit)
        selector.register(self._server, selectors.EVENT_READ)

    def accept(self) -> None:
        """Greet those who wait; of too many callers the oldest go, as ours need an instant only."""
        with contextlib.suppress(OSError):  # nobody is left, or one left before it was let in
            for _ in range(self._limit):
                link, address = self._server.accept()
                link.setblocking(False)
                caller = Caller(link, address[0])
                self._callers[caller] = None
                self._selector.register(link, selectors.EVENT_READ, caller)
                if len(self._callers) > self._limit:
                    self._drop(next(iter(self._callers)))
                with contextlib.suppress(OSError):
                    link.send(_GREETING + caller.nonce.encode() + b"\n")

    def read(self, caller: Caller) -> Hello | None:
        """Who has come, whose socket is the caller's from now on; None if it is not of the run."""
        if caller not in self._callers:  # dropped in the meantime
            return None
        try:
            data = caller.socket.recv(_LONGEST)
        except OSError:
            data = b""
        caller.unread += data
        line, newline, rest = caller.unread.partition(b"\n")
        if data and not newline and len(caller.unread) <= _LONGEST:
            return None  # more is to come
        proof, _, body = line.partition(b" ")
        nonce = caller.nonce.encode()
        proved = hmac.compare_digest(proof, _proof(self._secret, b"hello", nonce, body))
        hello = _hello(body) if proved and newline and not rest else None
        if hello is None:
            if newline and not proved and re.fullmatch(rb"[0-9a-f]{64}", proof):
                self._refuse(caller)
            self._drop(caller)
            return None
        with contextlib.suppress(OSError):  # dead already, which reading finds out
            caller.socket.send(_proof(self._secret, b"welcome", nonce, body) + b"\n")
        self._selector.unregister(caller.socket)
        del self._callers[caller]
        return hello

    def sweep(self) -> None:
        """Drop those who have been there for too long."""
        for caller in list(self._callers):
            if time.monotonic() - caller.came > _PATIENCE:
                self._drop(caller)

    def close(self) -> None:
        """All have come; nobody else is let in."""
        for caller in list(self._callers):
            self._drop(caller)
        self._selector.unregister(self._server)
        self._server.close()

    def _drop(self, caller: Caller) -> None:
        self._selector.unregister(caller.socket)
        caller.socket.close()
        del self._callers[caller]

    def _refuse(self, caller: Caller) -> None:
        with contextlib.suppress(OSError):
            caller.socket.send(_REFUSED)
        if not self.refused:  # once: a stranger must not fill anybody's terminal
            self.refused = f"a process from {caller.address} was refused, as it has another {TOKEN}"
            say(f"process 0: {self.refused}, or is of another job")


def shared_secret(launched: bool) -> bytes:
    """The secret of this run's processes: SCALEGPT_TOKEN, else what their launcher gave to all.

    launched: a launcher has said who is who, rather than flags.
    """
    if token := os.environ.get(TOKEN):
        return os.fsencode(token)
    if not launched:
        return b""
    return "\n".join(os.environ.get(name, "") for name in _LAUNCHED).encode()


def interface(host: str) -> str:
    """Where process 0 listens: at HOST of the coordinator, if that is an address of this machine.

    At all of its addresses, "", for a name: others may resolve it to another address than this
    machine does, and for an address that is translated on its way here.
    """
    with contextlib.suppress(OSError, ValueError):
        if host == "localhost":
            host = socket.getaddrinfo(host, None)[0][4][0]
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family) as free:
            free.bind((host, 0))
        return host
    return ""


def connect(
    address: tuple[str, int], hello: Hello, secret: bytes, seconds: float
) -> socket.socket | None:
    """To process 0, which may start later than this one; None when it has not by then.

    Raises Mistake when whoever answers there does not share the secret.
    """
    until = time.monotonic() + seconds
    body = json.dumps([*hello, secrets.token_hex(16)]).encode()
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            link = socket.create_connection(address, timeout=min(left, 5))
            greeting = _receive(link, len(_GREETING) + 33, min(until, time.monotonic() + 5))
            if greeting.startswith(_GREETING):
                nonce = greeting.removeprefix(_GREETING).rstrip()
                link.sendall(_proof(secret, b"hello", nonce, body) + b" " + body + b"\n")
                answer = _receive(link, 65, until)
                if hmac.compare_digest(answer, _proof(secret, b"welcome", nonce, body) + b"\n"):
                    return link
                if len(answer) == 65:
                    where = "{}:{}".format(*address)
                    raise Mistake(
                        f"process 0 at {where} has another secret: give all processes of a run "
                        f"the same {TOKEN}, and each run that starts there another address"
                    )
            link.close()  # none of ours, or one that is just ending
        time.sleep(0.2)
    return None


def _receive(link: socket.socket, size: int, until: float) -> bytes:
    """So many bytes, or fewer, when the other end closes. Raises TimeoutError."""
    data = b""
    while len(data) < size:
        link.settimeout(max(0.1, until - time.monotonic()))
        piece = link.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def _proof(secret: bytes, role: bytes, nonce: bytes, body: bytes) -> bytes:
    # body holds the other nonce; role, that nobody can send back what it was sent.
    return hmac.new(secret, b" ".join((role, nonce, body)), "sha256").hexdigest().encode()


def _hello(body: bytes) -> Hello | None:
    try:
        match json.loads(body):
            case [int(index), str(host), int(count), str()] if 0 <= index < count:
                return Hello(index, host, count) if host.isprintable() else None
    except (ValueError, RecursionError):
        pass
    return None


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    host = interface(host)
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        server = socket.create_server(
            (host, port), family=family, dualstack_ipv6=both, backlog=backlog
        )
    except (OSError, OverflowError) as error:
        raise Mistake(
            f"the coordinator's port {port} cannot be used: {error}; if another run uses it, give "
            "--distributed.coordinator=HOST:PORT with another one"
        ) from None
    server.setblocking(False)
    return server


def keep_alive(link: socket.socket) -> None:
    link.settimeout(5)  # to write: a process that is stopped does not hold up another one for long
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def free_port(wanted: int) -> int:
    """The one next to the coordinator's, for those who open ports in a firewall, else any."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError, OverflowError), socket.socket() as free:
            free.bind(("", port))
            return free.getsockname()[1]
    raise Mistake("this host has no free port for jax.distributed")
