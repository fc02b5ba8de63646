"""The server's life: it takes a port, serves until Ctrl-C or SIGTERM, and ends."""

import argparse
import asyncio
import os
import socket
import sys
import webbrowser
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from scalegpt.data.templates import with_end
from scalegpt.errors import Mistake
from scalegpt.files import run_folder
from scalegpt.files.folder import is_url
from scalegpt.files.text_files import read_text
from scalegpt.inference.decode import Decoder
from scalegpt.server.app import Card, Service, application
from scalegpt.server.bodies import Reader
from scalegpt.server.generation import Generation
from scalegpt.server.guard import LOOPBACK, Guard
from scalegpt.server.slots import Slots
from scalegpt.weights.trained import Trained, evaluation

MOST_CONNECTIONS = 64  # of one address: more than may be served and wait
FOR_HEADERS = 60.0  # seconds
FOR_ANSWERS = 5.0  # seconds that texts have to end when the server does


def prepare(flags: argparse.Namespace) -> tuple[socket.socket, bytes | None, Path | None]:
    """Take the port that the flags name; return its socket, the key and the file of feedback.

    Raises Mistake, before a model is loaded, for all that the flags can get wrong.
    """
    if not 1 <= flags.parallel <= 256:
        raise Mistake(f"--parallel={flags.parallel} must be from 1 to 256")
    if not 0 <= flags.port < 65536:  # the system would take it modulo that
        raise Mistake(f"--port={flags.port} must be from 0, which is any, to 65535")
    key = None
    if flags.api_key_file:
        key = read_text(flags.api_key_file).strip().encode()
        if not key or b"\n" in key:
            raise Mistake(f"--api-key-file={flags.api_key_file} must hold one line, the key")
    elif flags.host not in LOOPBACK and not flags.no_api_key:
        raise Mistake(
            f"--host={flags.host} lets other machines in: give --api-key-file FILE, with a key "
            "that they must send, or --no-api-key"
        )
    feedback = None
    if flags.collect:
        if not flags.run or is_url(flags.run):
            raise Mistake("--collect writes feedback.jsonl into the folder of --run, on this disk")
        feedback = run_folder.local(flags.run) / "feedback.jsonl"
        if not os.access(feedback if feedback.exists() else feedback.parent, os.W_OK):
            raise Mistake(f"cannot write {feedback}: --collect needs it")
    try:
        family, *_, address = socket.getaddrinfo(flags.host, flags.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        known = getattr(error, "errno", None) or 0
        reason = os.strerror(known) if known > 0 else getattr(error, "strerror", error)
        raise Mistake(
            f"cannot listen on {flags.host}, port {flags.port}: {reason}; --port names another, 0 "
            "takes any that is free"
        ) from None
    return listener, key, feedback


def serve(
    flags: argparse.Namespace,
    prepared: tuple[socket.socket, bytes | None, Path | None],
    model: Trained,
    write: Decoder,
) -> None:
    """Serve a model until a signal. Raises whatever has ended the thread that writes."""
    listener, key, feedback = prepared
    codec = with_end(model.codec())  # before anything is compiled, as it may be a mistake
    slots = Slots(write, flags.parallel)
    slots.compile()
    loss = evaluation(model).get("val/loss")
    # Whoever reads this need not know where the run lies.
    card = Card(Path(model.name.rstrip("/")).name, model.step, loss, feedback)
    block_size = model.config.model.block_size
    most = min(flags.max_new_tokens, block_size)
    generation = Generation(slots)
    service = Service(card, Reader(codec, block_size, write.sampler, most), generation)
    server = _Server(Guard(application(service), flags.host, key), generation)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    facts = [f"step {model.step}"] if model.step else []
    facts += [f"val loss {loss:.4f}"] if loss is not None else []
    facts += [f"{flags.parallel} slots with {slots.bytes / 2**20:,.1f} MiB of cache"]
    print(f"serving {card.name} at {url}; {', '.join(facts)}; Ctrl-C ends", flush=True)
    if flags.host not in LOOPBACK:
        who = "with the key" if key else "at all"
        print(
            f"warning: other machines may use it, anyone {who}; it is not encrypted",
            file=sys.stderr,
        )
    if flags.open:
        webbrowser.open(url)
    asyncio.run(server.serve(sockets=[listener]))
    generation.stop()
    generation.join()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with the generation, and a signal is no failure to it."""

    def __init__(self, app: Any, generation: Generation) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                loop="asyncio",
                timeout_graceful_shutdown=int(FOR_ANSWERS) + 3,
            )
        )
        self._generation = generation

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # asked for the second time
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._generation.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(FOR_ANSWERS, self._generation.stop)
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """A connection, of which one address may have so many, and which must ask for something."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        address = (self.client or [None])[0]
        same = sum((other.client or [None])[0] == address for other in self.connections)
        if same > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        """Close the connection if no whole request comes in a while; uvicorn has no such limit."""
        if self.conn.their_state is not h11.IDLE:
            if self._late:
                self._late.cancel()
            self._late = None
        elif not self._late:
            self._late = self.loop.call_later(FOR_HEADERS, self.transport.abort)
