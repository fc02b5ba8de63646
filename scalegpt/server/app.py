"""The routes of the server: OpenAI's completions, what the page asks for, and the page itself."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from scalegpt.errors import Mistake
from scalegpt.inference.chat import ROOM
from scalegpt.server import bodies
from scalegpt.server.bodies import Asked, Reader, Refusal
from scalegpt.server.generation import Full, Generation, Order, Stopped, Written
from scalegpt.server.guard import error_body

KEEP_ALIVE = 15.0  # seconds without a token after which a stream says that it goes on
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


@dataclass(frozen=True)
class Card:
    """What the server says of its model. feedback: the file of preferences, None to take none."""

    name: str
    step: int | None
    val_loss: float | None
    feedback: Path | None


@dataclass(frozen=True)
class Form:
    """How an answer is written down: its object's name, and a choice with some of the text."""

    kind: str
    chunk: str
    id: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    first: dict[str, Any] | None = None


CHAT = Form(
    "chat.completion",
    "chat.completion.chunk",
    "chatcmpl",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)
TEXT = Form(
    "text_completion",
    "text_completion",
    "cmpl",
    lambda text: {"text": text},
    lambda text: {"text": text},
)


class Service:
    """The functions behind the routes."""

    def __init__(self, card: Card, reader: Reader, generation: Generation) -> None:
        self.card, self.reader, self.generation = card, reader, generation
        self.created, self.n_feedback = int(time.time()), 0
        self.routes = [
            *(Route(path, partial(_file, *file)) for path, file in _FILES.items()),
            Route("/health", self.health),
            Route("/props", self.props),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.text, methods=["POST"]),
        ]
        if card.feedback:
            self.routes.append(Route("/feedback", self.feedback, methods=["POST"]))

    async def health(self, request: Request) -> Response:
        generation = self.generation
        state = {"busy": generation.busy, "waiting": generation.waiting}
        status = "stopped" if generation.stopped else "ok"
        content = {"status": status, "slots": generation.slots.count, **state}
        return JSONResponse(content, 503 if generation.stopped else 200)

    async def props(self, request: Request) -> Response:
        card, codec = self.card, self.reader.codec
        defaults = asdict(self.reader.sampler) | {"max_tokens": self.reader.max_tokens}
        del defaults["prompt_lookup"]  # which a server does without
        return JSONResponse(
            {
                **{"name": card.name, "step": card.step, "val_loss": card.val_loss},
                **{"block_size": self.reader.block_size, "vocab_size": codec.vocab_size},
                **{"kind": "chat" if codec.chats else "base", "marks": codec.marks},
                **{"slots": self.generation.slots.count, "room": ROOM},
                "collect": card.feedback is not None,
                "defaults": defaults,
            }
        )

    async def models(self, request: Request) -> Response:
        model = {"id": self.card.name, "object": "model", "created": self.created}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "scalegpt"}]})

    async def chat(self, request: Request) -> Response:
        if not self.reader.codec.chats:
            what = f"{self.card.name} has not learned to answer; /v1/completions continues texts"
            raise Refusal(400, what, "no_chat")
        asked = await run_sync(self.reader.chat, await request.body())
        return await self._answer(request, asked, CHAT)

    async def text(self, request: Request) -> Response:
        asked = await run_sync(self.reader.text, await request.body())
        return await self._answer(request, asked, TEXT)

    async def feedback(self, request: Request) -> Response:
        pair = await run_sync(bodies.feedback, await request.body())
        with open(self.card.feedback, "a", encoding="utf-8") as file:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
        self.n_feedback += 1
        return JSONResponse({"stored": self.n_feedback})

    async def _answer(self, request: Request, asked: Asked, form: Form) -> Response:
        tokens = Tokens(self.generation, asked)
        head = {
            "id": f"{form.id}-{secrets.token_hex(12)}",
            "object": form.chunk if asked.stream else form.kind,
            "created": int(time.time()),
            "model": self.card.name,
            "system_fingerprint": f"step-{self.card.step}",
        }
        if asked.stream:
            return Stream(tokens, self._events(tokens, head, form))
        try:
            return JSONResponse(
                await _unless_disconnected(request, self._whole(tokens, head, form))
            )
        finally:
            tokens.leave()

    async def _whole(self, tokens: "Tokens", head: dict[str, Any], form: Form) -> dict[str, Any]:
        text, entries = "", []
        async for token in tokens:
            if token is not None:
                text += token.text
                entries += self._entries(tokens.asked, token)
        probabilities = None if tokens.asked.top is None else {"content": entries}
        choice = {"index": 0, **form.whole(text), "logprobs": probabilities}
        return head | {
            "choices": [choice | {"finish_reason": _reason(token)}],
            "usage": tokens.usage(),
        }

    async def _events(
        self, tokens: "Tokens", head: dict[str, Any], form: Form
    ) -> AsyncIterator[str]:
        def chunk(part: dict[str, Any], entries: Any = None, finish: str | None = None) -> str:
            choice = {"index": 0, **part, "logprobs": entries, "finish_reason": finish}
            return _event(head | {"choices": [choice]})

        if form.first:
            yield chunk(form.first)
        try:
            async for token in tokens:
                if token is None:
                    yield ": keep-alive\n\n"
                    continue
                entries = self._entries(tokens.asked, token)
                if token.text or entries:
                    yield chunk(form.part(token.text), {"content": entries} if entries else None)
        except Refusal as error:
            yield _event(error_body(error.status, str(error)))
            return
        yield chunk(form.part(""), None, _reason(token))
        if tokens.asked.include_usage:
            yield _event(head | {"choices": [], "usage": tokens.usage()})
        yield "data: [DONE]\n\n"

    def _entries(self, asked: Asked, token: Written) -> list[dict[str, Any]]:
        """Return OpenAI's entry of a token's probabilities, in a list, if they are asked for."""
        if asked.top is None:
            return []
        drawn = token.drawn
        top = [self._entry(*alternative) for alternative in drawn.top[: asked.top]]
        return [self._entry(drawn.id, drawn.logprob) | {"top_logprobs": top}]

    def _entry(self, id_: int, logprob: float) -> dict[str, Any]:
        codec = self.reader.codec
        text, raw = codec.decode([id_], marks=True), codec.bytes_of(id_)
        shown = {"token": text, "bytes": None if raw is None else [*raw]}
        return {"id": id_, **shown, "logprob": logprob}


class Tokens:
    """The tokens of a text that has been asked for, as they come; None after a time without one.

    Raises Refusal at once where no more may wait, and later where the server stops.
    """

    def __init__(self, generation: Generation, asked: Asked) -> None:
        self.asked, self.n_written = asked, 0
        self._generation = generation
        self._queue: asyncio.Queue[Written | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def take(token: Written | Exception) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, token)
            except RuntimeError:  # the loop is closed, and so is whoever has asked
                self._order.left = True

        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        self._order = Order(asked.ids, asked.text, asked.max_tokens, asked.sampler, seed, take)
        try:
            generation.place(self._order)
        except Full:
            raise Refusal(429, "too many requests wait; try again", "queue_full") from None
        except Stopped:
            raise Refusal(503, "the server stops") from None

    async def __aiter__(self) -> AsyncIterator[Written | None]:
        finish = None
        while finish is None:
            try:
                # Not wait_for, which in Python 3.11 may swallow that this task is cancelled.
                async with asyncio.timeout(KEEP_ALIVE):
                    token = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(token, Exception):
                raise Refusal(503, "the server has stopped before the end of the text")
            self.n_written += 1
            finish = token.finish
            yield token

    def leave(self) -> None:
        self._generation.leave(self._order)

    def usage(self) -> dict[str, int]:
        n_read = len(self.asked.ids)
        return {
            "prompt_tokens": n_read,
            "completion_tokens": self.n_written,
            "total_tokens": n_read + self.n_written,
            "dropped_messages": self.asked.dropped_messages,
            "dropped_tokens": self.asked.dropped_tokens,
        }


class Stream(StreamingResponse):
    """A stream of events. However it ends, also before it has begun, its slot becomes free."""

    def __init__(self, tokens: Tokens, events: AsyncIterator[str]) -> None:
        super().__init__(events, 200, {"cache-control": "no-cache"}, "text/event-stream")
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._tokens.leave()


def application(service: Service) -> Starlette:
    """Return the application of these routes. Every error has OpenAI's form."""
    return Starlette(
        routes=service.routes,
        exception_handlers={
            Refusal: _refused,
            Mistake: _mistaken,
            HTTPException: _no_such_thing,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


async def _file(name: str, kind: str, request: Request) -> Response:
    """Answer with a file of the page. Its name is fixed: no path comes from a URL."""
    content = resources.files("scalegpt.server").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """Return what `work` does. Raises ClientDisconnect if nobody is there any more to read it."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _reason(token: Written | None) -> str:
    return "length" if token and token.finish == "length" else "stop"


def _error(
    status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
) -> Response:
    return JSONResponse(error_body(status, message, code, param), status, headers=headers)


async def _refused(request: Request, error: Refusal) -> Response:
    more = {"retry-after": "5"} if error.status == 429 else {}
    return _error(error.status, str(error), error.code, error.param, **more)


async def _mistaken(request: Request, error: Mistake) -> Response:
    return _error(400, str(error))


async def _no_such_thing(request: Request, error: HTTPException) -> Response:
    what = {404: "there is nothing here", 405: f"{request.method} is not for this"}
    return _error(error.status_code, what.get(error.status_code, error.detail))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "the server has failed; its log says why")
