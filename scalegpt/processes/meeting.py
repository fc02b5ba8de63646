"""How the processes of a run find each other: sockets to and from process 0."""

import contextlib
import json
import socket
import time

from scalegpt.errors import Mistake

_OPTIONS = {
    # A machine that has vanished is noticed after 30 s, whether or not anything was sent to it.
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
    "TCP_NODELAY": 1,
}
WELCOME = b"\n"  # the answer to a hello, which another run's process 0 would not give


def listen(port: int, count: int) -> socket.socket:
    """Process 0's, for `count` processes. Raises ValueError when the port is taken."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
    except (OSError, OverflowError) as error:
        raise Mistake(
            f"the coordinator's port {port} cannot be used: {error}; if another run uses it, give "
            "--distributed.coordinator=HOST:PORT with another one"
        ) from None


def connect(address: tuple[str, int], hello: list, seconds: float) -> socket.socket | None:
    """To process 0, which may start later than this one; None when it has not by then."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            link = socket.create_connection(address, timeout=min(left, 5))
            link.settimeout(left)
            link.sendall(json.dumps({"hello": hello}).encode() + b"\n")
            if link.recv(1) == WELCOME:
                return link
            link.close()  # of another run, or of one that is just ending
        time.sleep(0.2)
    return None


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
