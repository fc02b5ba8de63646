"""What every request has to pass: names of the host, origin, key, kind and size of its body.

A page of the internet may ask for http://localhost from the browser of whoever reads it. It cannot
give a Host of ours by a name of its own (DNS rebinding), nor send JSON from another Origin.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1_000_000
SECONDS = 60.0  # for a body to arrive
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/page.js", "/page.css", "/health")  # without a key
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Guard:
    """An ASGI application before the server's own.

    host: what the server listens on. Where that is open to other machines, a Host may be any
    address, and the name of this machine. key: what requests must have, or None.
    """

    app: ASGIApp
    host: str
    key: bytes | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *headers]}
            await send(message)

        refusal, body = self._refusal(scope), b""
        if not refusal and scope["method"] == "POST":
            refusal, body = await _body(receive)
        if refusal:
            return await _refuse(guarded, *refusal)
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, receive_body, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str, str | None] | None:
        """Return status, message and code for a request that may not pass."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._is_ours(host):
            return 400, f"Host {host[:80]!r} is not this server's: use its address", "bad_host"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            return 403, "this page is not of this server", "bad_origin"
        if self.key and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                return 401, "send the key: Authorization: Bearer KEY", "invalid_api_key"
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").decode("latin-1").lower()
            if kind.partition(";")[0].strip() != "application/json":
                return 415, "send JSON: Content-Type: application/json", None
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > MOST_BYTES:
                return 413, f"a body has at most {MOST_BYTES:,} bytes", None
        return None

    def _is_ours(self, host: str) -> bool:
        """Tell whether a Host is a name of this server. No other's can be an address."""
        name = (host if host.endswith("]") else host.rpartition(":")[0] or host).strip("[]")
        if name in (*LOOPBACK, self.host.lower()) or self.host in LOOPBACK:
            return name in (*LOOPBACK, self.host.lower())
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name == socket.gethostname().lower()


async def _body(receive: Receive) -> tuple[tuple[int, str, str | None] | None, bytes]:
    """Return a refusal or None, and the body."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return (400, "the connection was closed", None), b""
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MOST_BYTES:
                    return (413, f"a body has at most {MOST_BYTES:,} bytes", None), b""
                if not message.get("more_body"):
                    return None, b"".join(parts)
    except TimeoutError:
        return (408, f"the body has not arrived within {SECONDS:.0f} s", None), b""


async def _refuse(send: Send, status: int, message: str, code: str | None) -> None:
    body = json.dumps(error_body(status, message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    # What is left of a body that nobody reads must not be taken for the next request.
    headers += [(b"connection", b"close")] if status in (408, 413) else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
