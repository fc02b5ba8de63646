"""The handshake by which the processes of a run connect with process 0, and nobody else does.

Process 0 listens only until all others have come, and each of them proves that it knows the run's
secret, as process 0 proves it in turn (HMAC-SHA256 over fresh random numbers of both, compared in
constant time). Until then nothing that a caller sends is parsed, and its bytes, its seconds and the
number of callers are limited. `multiprocessing.connection` has such a challenge, too, but it waits
for one caller after the other without a time limit, and uses MD5 on Python 3.11.

What this does not do: where there is neither SCALEGPT_TOKEN nor a run's folder on a disk, the
secret is what a launcher tells all its processes, such as Slurm's job id, or is empty. That keeps
out port scanners and other runs, but no one who knows it and this protocol. Messages are neither
encrypted nor signed, so whoever sits on the path between the hosts can read and change them. JAX's
own service and its collectives ask nobody for a secret: on a network with strangers a firewall must
keep their ports closed.
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
from pathlib import Path
from typing import NamedTuple

from scalegpt.errors import Mistake
from scalegpt.processes.exits import say

TOKEN = "SCALEGPT_TOKEN"  # the environment variable of a run's secret
# Variables that a launcher sets alike in all processes of a job. JAX derives the coordinator's
# address from the first two; the third, of Open MPI, is random.
_LAUNCHED = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_orte_precondition_transports")
_CALLERS = 128  # at most at one time, besides the processes of the run
_PATIENCE = 10.0  # seconds in which a caller must prove that it is of the run
_LONGEST = 1024  # bytes that a caller may send
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
    """What a process says of itself. count: of how many processes it was told."""

    index: int
    host: str
    count: int


@dataclass(eq=False)
class Caller:
    """A connection to process 0 whose other end has not proved yet that it is of this run."""

    socket: socket.socket
    address: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    came: float = field(default_factory=time.monotonic)
    unread: bytes = b""


class Listener:
    """Takes in the other processes, in process 0.

    Its sockets are in `selector`: those of callers with their Caller, the listening one with None.
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
        """Greet all who wait to be accepted.

        Of too many callers the oldest are dropped: a process of the run needs an instant only.
        """
        with contextlib.suppress(OSError):  # nobody waits any more, or one has left meanwhile
            for _ in range(self._limit):
                connection, address = self._server.accept()
                connection.setblocking(False)
                caller = Caller(connection, address[0])
                self._callers[caller] = None
                self._selector.register(connection, selectors.EVENT_READ, caller)
                if len(self._callers) > self._limit:
                    self._drop(next(iter(self._callers)))
                with contextlib.suppress(OSError):
                    connection.send(_GREETING + caller.nonce.encode() + b"\n")

    def read(self, caller: Caller) -> Hello | None:
        """Read from a caller; return its Hello once it has proved that it is of the run.

        The socket is the caller of this method's from then on. Before, None is returned; a caller
        that fails to prove it is dropped.
        """
        if caller not in self._callers:  # it was dropped in the meantime
            return None
        try:
            data = caller.socket.recv(_LONGEST)
        except OSError:
            data = b""
        caller.unread += data
        line, newline, rest = caller.unread.partition(b"\n")
        if data and not newline and len(caller.unread) <= _LONGEST:
            return None  # the rest of the line is still to come
        proof, _, body = line.partition(b" ")
        nonce = caller.nonce.encode()
        proved = hmac.compare_digest(proof, _proof(self._secret, b"hello", nonce, body))
        hello = _hello(body) if proved and newline and not rest else None
        if hello is None:
            if newline and not proved and re.fullmatch(rb"[0-9a-f]{64}", proof):
                self._refuse(caller)
            self._drop(caller)
            return None
        with contextlib.suppress(OSError):  # it is dead already, which the link will notice
            caller.socket.send(_proof(self._secret, b"welcome", nonce, body) + b"\n")
        self._selector.unregister(caller.socket)
        del self._callers[caller]
        return hello

    def sweep(self) -> None:
        """Drop the callers that have taken longer than their time."""
        for caller in list(self._callers):
            if time.monotonic() - caller.came > _PATIENCE:
                self._drop(caller)

    def close(self) -> None:
        """Listen no longer."""
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
        if not self.refused:  # only once, for a stranger must not fill the terminal
            self.refused = f"a process from {caller.address} was refused, as it has another {TOKEN}"
            say(f"process 0: {self.refused}, or is of another job")


def shared_secret(launched: bool, folder: str | None = None) -> bytes:
    """Return the secret of this run's processes.

    That is SCALEGPT_TOKEN, else what the run's folder holds, else what their launcher has set.
    launched: a launcher, not flags, has told each process its number.
    """
    if token := os.environ.get(TOKEN):
        return os.fsencode(token)
    if folder and "://" not in folder:
        return _secret_in(Path(folder))
    if not launched:
        return b""
    return "\n".join(os.environ.get(name, "") for name in _LAUNCHED).encode()


def _secret_in(folder: Path) -> bytes:
    """Return the secret in a run's folder, made by the first process to come. Raises Mistake."""
    file, until = folder / ".secret", time.monotonic() + _PATIENCE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "w") as new:
                new.write(secrets.token_hex(16))
        while not (secret := file.read_bytes()) and time.monotonic() < until:
            time.sleep(0.1)  # another process writes it
        return secret
    except OSError as error:
        raise Mistake(
            f"run.out_dir={folder} cannot hold the secret of its processes: {error}; or give all "
            f"the same {TOKEN}"
        ) from None


def interface(host: str) -> str:
    """Return the address at which process 0 listens for a coordinator HOST, or "" for all.

    That is HOST if it is an address of this machine. It is not if it is translated on the way here;
    and other machines may resolve a name to another address than this one does.
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
    """Connect to process 0, which may start later; return None if it has not after `seconds`.

    Raises Mistake when whoever answers at the address does not know the secret.
    """
    until = time.monotonic() + seconds
    body = json.dumps([*hello, secrets.token_hex(16)]).encode()
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(address, timeout=min(left, 5))
            greeting = _receive(connection, len(_GREETING) + 33, min(until, time.monotonic() + 5))
            if greeting.startswith(_GREETING):
                nonce = greeting.removeprefix(_GREETING).rstrip()
                connection.sendall(_proof(secret, b"hello", nonce, body) + b" " + body + b"\n")
                answer = _receive(connection, 65, until)
                if hmac.compare_digest(answer, _proof(secret, b"welcome", nonce, body) + b"\n"):
                    return connection
                if len(answer) == 65:
                    where = "{}:{}".format(*address)
                    raise Mistake(
                        f"process 0 at {where} has another secret: give all processes of a run "
                        f"the same {TOKEN} or the same run.out_dir, and each run that starts there "
                        "another address"
                    )
            connection.close()  # a stranger answered, or a process that is just ending
        time.sleep(0.2)
    return None


def _receive(connection: socket.socket, size: int, until: float) -> bytes:
    """Return so many bytes, or fewer if the other end closes before. Raises TimeoutError."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.1, until - time.monotonic()))
        piece = connection.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def _proof(secret: bytes, role: bytes, nonce: bytes, body: bytes) -> bytes:
    # The body holds the caller's own random number. The role keeps a proof from being sent back as
    # that of the other end.
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


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that the machine at the other end is gone."""
    connection.settimeout(5)  # or else writing to a process that is stopped might wait for good
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def free_port(wanted: int) -> int:
    """Return the port `wanted` if it is free, so that a firewall may open it, else any other."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError, OverflowError), socket.socket() as free:
            free.bind(("", port))
            return free.getsockname()[1]
    raise Mistake("this host has no free port for jax.distributed")
