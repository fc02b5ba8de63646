"""The server without a model: what it answers and refuses, and that nobody keeps a slot."""

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the server needs the extra chat")
pytest.importorskip("httpx", reason="the tests of the server speak to it through httpx")

import httpx  # noqa: E402

import scalegpt  # noqa: E402
from scalegpt import chat  # noqa: E402
from scalegpt.data import tokenizer  # noqa: E402
from scalegpt.data.chat import encode_prompt  # noqa: E402
from scalegpt.inference.sampling import Sampler  # noqa: E402
from scalegpt.server import app as server  # noqa: E402
from scalegpt.server import guard, serving  # noqa: E402
from scalegpt.server.bodies import Reader  # noqa: E402
from scalegpt.server.generation import MOST_WAITING, Generation, Order  # noqa: E402
from scalegpt.server.slots import ALTERNATIVES, Drawn  # noqa: E402

BYTES = tokenizer.load("byte")
CHAT, BLOCK = BYTES.chat(), 256
END = CHAT.marks["end"]
KEY = b"a key of the test"
JSON = {"content-type": "application/json"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


class Echo:
    """Slots without a model: each text repeats its last question, or its prompt, and ends."""

    def __init__(self, count: int = 4, seconds: float = 0.0) -> None:
        self.count, self.seconds, self.opened = count, seconds, []
        self.plans: dict[int, list[int]] = {}

    def open(self, slot, ids, sampler, seed, index):
        ids = ids.tolist()
        marks = [i for i, token in enumerate(ids) if token == CHAT.marks["user"]]
        question = ids[marks[-1] + 1 : ids.index(END, marks[-1])] if marks else ids
        self.plans[slot] = [*question, END][index:]
        self.opened.append((slot, ids, sampler, seed, index))

    def read(self, slot):
        return True

    def write(self, slots):
        time.sleep(self.seconds)
        tops = [(token, -1.0) for token in range(65, 65 + ALTERNATIVES)]
        return [Drawn(self.plans[slot].pop(0), -0.5, tops) for slot in slots]

    def append(self, slot, token):
        pass

    def close(self, slot):
        del self.plans[slot]


class Server:
    """A server in this process, and a client of it."""

    def __init__(self, slots, codec=CHAT, key=None, feedback=None, host="127.0.0.1") -> None:
        self.slots, self.generation = slots, Generation(slots)
        card = server.Card("echo", 7, 1.25, feedback)
        reader = Reader(codec, BLOCK, Sampler(), 100)
        self.service = server.Service(card, reader, self.generation)
        self.app = guard.Guard(server.application(self.service), host, key)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def request(self, method: str, path: str, **more) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    def post(self, path: str, **body) -> httpx.Response:
        return self.request("POST", path, json=body)

    def chat(self, *messages: dict, **options) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[*messages], **options)


@pytest.fixture
def start():
    """Returns a function that starts a server, which ends with the test."""
    started = []

    def start(*arguments, **options) -> Server:
        started.append(Server(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.generation.stop()
        one.generation.join()


def events(response: httpx.Response) -> list[dict]:
    """The chunks of a stream that has ended well."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = [e.removeprefix("data: ") for e in response.text.split("\n\n") if e]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_an_answer_comes_whole_or_as_a_stream(start):
    echo = start(Echo())
    body = echo.chat({"role": "system", "content": "Be."}, user("Héllo ✓")).json()
    (choice,) = body["choices"]
    assert choice["message"] == answer("Héllo ✓") and choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None and body["object"] == "chat.completion"
    prompt = encode_prompt(CHAT, [{"role": "system", "content": "Be."}, user("Héllo ✓")])
    n_written = len("Héllo ✓".encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": n_written,
        "total_tokens": len(prompt) + n_written,
        "dropped_messages": 0,
        "dropped_tokens": 0,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, *parts, last, usage = events(echo.chat(user("Héllo ✓"), **options))
    assert first["choices"][0]["delta"] == answer("")
    # Half a character is held back until the other half is there.
    assert [p["choices"][0]["delta"]["content"] for p in parts] == [*"Héllo ✓"]
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == n_written
    assert len({chunk["id"] for chunk in (first, *parts, last, usage)}) == 1
    short = echo.chat(user("Hello"), max_completion_tokens=3).json()["choices"][0]
    assert short["message"]["content"] == "Hel" and short["finish_reason"] == "length"
    cut = echo.chat(user("one two three"), stop=["three", "wo t"]).json()["choices"][0]
    assert cut["message"]["content"] == "one t" and cut["finish_reason"] == "stop"
    parts = events(echo.chat(user("a wood"), stop="world", stream=True))
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
    assert text == "a wood"


def test_probabilities_come_with_their_tokens_and_the_end(start):
    echo = start(Echo())
    content = echo.chat(user("é"), logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    first, second, end = content["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9]) and first["token"] == "\ufffd"
    assert (end["id"], end["token"], end["bytes"]) == (END, "<|end|>", [])
    top = {"id": 65, "token": "A", "bytes": [65], "logprob": -1.0}
    assert first["logprob"] == -0.5 and len(first["top_logprobs"]) == 2
    assert first["top_logprobs"][0] == top
    chunks = events(echo.chat(user("é"), logprobs=True, stream=True))
    entries = [c["choices"][0]["logprobs"] for c in chunks]
    assert [len(e["content"]) if e else 0 for e in entries] == [0, 1, 1, 1, 0]
    assert entries[1]["content"][0]["top_logprobs"] == []


def test_an_answer_goes_on_from_its_text_or_its_ids(start):
    echo = start(Echo())
    whole = encode_prompt(CHAT, [user("Hello")])
    for so_far in ({}, {"answer_ids": [*b"Hel"]}):
        talk = [user("Hello"), answer("Hel" if not so_far else "")]
        body = echo.chat(*talk, seed=-1, **so_far).json()
        assert body["choices"][0]["message"]["content"] == "lo"
        assert body["usage"]["prompt_tokens"] == len(whole) + 3
        slot, ids, sampler, seed, index = echo.slots.opened[-1]
        assert ids == [*whole, *b"Hel"] and (seed, index) == (2**32 - 1, 3)
    # An alternative may be half a character; the other half completes it.
    body = echo.chat(user("né"), answer_ids=[*b"n\xc3"]).json()
    assert body["choices"][0]["message"]["content"] == "é"
    assert echo.chat(user("né"), answer_ids=[END]).status_code == 400
    empty = echo.chat(user("Hello"), answer("")).json()["choices"][0]["message"]["content"]
    assert empty == "Hello"
    body = echo.post("/v1/completions", prompt="abc", answer_ids=[*b"ab"]).json()
    assert body["choices"][0]["text"] == "cab"


def test_a_calculator_writes_the_results_of_calls(start):
    call, result, back = (CHAT.marks[name] for name in ("call", "result", "back"))
    drawn, appended = [call, *b"6*7", result, *b"???", *b"42.", END], []

    class Calls(Echo):
        def open(self, slot, ids, sampler, seed, index):
            self.plans[slot] = drawn[index:]

        def append(self, slot, token):
            appended.append(token)

    echo = start(Calls())
    choice = echo.chat(user("6*7?"), logprobs=True).json()["choices"][0]
    assert choice["message"]["content"] == "42." and choice["finish_reason"] == "stop"
    assert appended == [call, *b"6*7", result, *b"42", back, *b"42."]
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries[5:8]] == [0.0] * 3
    appended.clear()
    echo.chat(user("6*7?"), answer_ids=[call, *b"6*7", result, *b"4"])
    assert appended == [*b"2", back, *b"42."]


def test_old_turns_are_left_out_and_counted(start):
    echo = start(Echo())
    talk = [user("a" * 100), answer("b" * 100), user("c" * 100)]
    assert echo.chat(*talk).json()["usage"]["dropped_messages"] == 2
    response = echo.chat(user("a" * 300))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    usage = echo.post("/v1/completions", prompt="a" * 300, max_tokens=9).json()["usage"]
    assert (usage["prompt_tokens"], usage["dropped_tokens"]) == (BLOCK - 16, 300 - BLOCK + 16)


def test_a_base_model_continues_text_and_does_not_chat(start):
    echo = start(Echo(), codec=BYTES)
    assert echo.request("GET", "/props").json()["kind"] == "base"
    response = echo.chat(user("Hello"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat")
    body = echo.post("/v1/completions", prompt="Hello", max_tokens=5, logprobs=3).json()
    (choice,) = body["choices"]
    assert choice["text"] == "Hello" and body["object"] == "text_completion"
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 3
    first, *_, last = events(echo.post("/v1/completions", prompt="Hi", max_tokens=2, stream=True))
    assert first["choices"][0]["text"] == "H" and last["choices"][0]["finish_reason"] == "length"


def test_it_says_what_it_is(start, tmp_path):
    echo = start(Echo(), feedback=tmp_path / "feedback.jsonl")
    props = echo.request("GET", "/props").json()
    assert props["defaults"] == {
        **{"temperature": 0.8, "top_k": 200, "top_p": 1.0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "max_tokens": 100},
    }
    assert (props["name"], props["step"], props["val_loss"]) == ("echo", 7, 1.25)
    assert (props["kind"], props["collect"], props["marks"]) == ("chat", True, CHAT.marks)
    assert echo.request("GET", "/v1/models").json()["data"][0]["id"] == "echo"
    health = {"status": "ok", "slots": 4, "busy": 0, "waiting": 0}
    assert echo.request("GET", "/health").json() == health
    for path, kind in (("/", "html"), ("/page.js", "javascript"), ("/page.css", "css")):
        response = echo.request("GET", path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(f"text/{kind}")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_feedback_is_rows_to_learn_from(start, tmp_path):
    file = tmp_path / "feedback.jsonl"
    echo = start(Echo(), feedback=file)
    pair = {"messages": [user("Héllo\n?")], "chosen": "Yes ✓", "rejected": "No"}
    assert [echo.post("/feedback", **pair).json() for _ in range(2)] == [
        {"stored": 1},
        {"stored": 2},
    ]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [pair, pair]
    for bad in (
        pair | {"chosen": "No"},
        pair | {"rejected": " "},
        pair | {"messages": [user("a"), answer("b")]},
        pair | {"messages": []},
        {"messages": [user("a")], "chosen": "b"},
    ):
        assert echo.post("/feedback", **bad).status_code == 400
    assert len(file.read_text().splitlines()) == 2
    assert start(Echo()).post("/feedback", **pair).status_code == 404  # without --collect


TALK = {"messages": [user("Hello")]}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
# Status, path, and what is wrong with a request for it, else of TALK.
HOSTILE = {
    "no JSON": (400, CHATS, b"{"),
    "no object": (400, CHATS, b"[]"),
    "nothing": (400, CHATS, b""),
    "no UTF-8": (400, CHATS, b'{"messages": [{"role": "user", "content": "\xff"}]}'),
    "half a pair": (400, CHATS, b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    "NUL for bytes": (400, CHATS, {"messages": [user("a\0b")]}),
    "nested": (400, CHATS, b"[" * 100_000),
    "long number": (400, CHATS, b'{"max_tokens": 1' + b"0" * 5000 + b"}"),
    "no messages": (400, CHATS, {}),
    "empty messages": (400, CHATS, {"messages": []}),
    "messages of text": (400, CHATS, {"messages": "Hello"}),
    "messages of numbers": (400, CHATS, {"messages": [1]}),
    "257 messages": (400, CHATS, {"messages": [user("a"), answer("b")] * 128 + [user("c")]}),
    "100,001 characters": (400, CHATS, {"messages": [user("a" * 100_001)]}),
    "unknown role": (400, CHATS, {"messages": [{"role": "root", "content": "a"}]}),
    "no content": (400, CHATS, {"messages": [{"role": "user"}]}),
    "null content": (400, CHATS, {"messages": [user(None)]}),
    "an image": (400, CHATS, {"messages": [user([{"type": "image_url", "image_url": "x"}])]}),
    "two questions": (400, CHATS, {"messages": [user("a"), user("b")]}),
    "only an answer": (400, CHATS, {"messages": [answer("a")]}),
    "NaN": (400, CHATS, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'),
    "cold": (400, CHATS, TALK | {"temperature": -1}),
    "warm words": (400, CHATS, TALK | {"temperature": "1"}),
    "top_p 0": (400, CHATS, TALK | {"top_p": 0}),
    "top_k -1": (400, CHATS, TALK | {"top_k": -1}),
    "max_tokens 0": (400, CHATS, TALK | {"max_tokens": 0}),
    "max_tokens beyond": (400, CHATS, TALK | {"max_tokens": BLOCK + 1}),
    "21 alternatives": (400, CHATS, TALK | {"logprobs": True, "top_logprobs": 21}),
    "alternatives alone": (400, CHATS, TALK | {"top_logprobs": 2}),
    "two answers": (400, CHATS, TALK | {"n": 2}),
    "tools": (400, CHATS, TALK | {"tools": [{"type": "function"}]}),
    "five stops": (400, CHATS, TALK | {"stop": list("abcde")}),
    "an empty stop": (400, CHATS, TALK | {"stop": ""}),
    "ids beyond": (400, CHATS, TALK | {"answer_ids": [CHAT.vocab_size]}),
    "ids below": (400, CHATS, TALK | {"answer_ids": [-1]}),
    "too many ids": (400, TEXTS, {"prompt": "a", "answer_ids": [65] * BLOCK}),
    "prompt of ids": (400, TEXTS, {"prompt": [65]}),
    "2 MB": (413, CHATS, b" " * 2_000_000),
    "no such path": (404, "/etc/passwd", TALK),
    "up the path": (404, "/../../etc/passwd", TALK),
    "up, escaped": (404, "/page.js/%2e%2e/%2e%2e/README.md", TALK),
    "post of a file": (405, "/page.js", TALK),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_body_gets_its_status(hostile, what):
    status, path, body = HOSTILE[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = hostile.request("POST", path, content=content, headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error" and hostile.generation.busy == 0


@pytest.fixture(scope="module")
def hostile():
    echo = Server(Echo())
    yield echo
    echo.generation.stop()
    echo.generation.join()


# Status, host that the server listens on, and headers, for a request for a chat with these.
HEADERS = [
    (200, "127.0.0.1", {}),
    (200, "127.0.0.1", {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}),
    (200, "127.0.0.1", {"host": "[::1]:8000"}),
    (200, "127.0.0.1", {"content-type": "application/json; charset=utf-8"}),
    (400, "127.0.0.1", {"host": "evil.example"}),
    (400, "127.0.0.1", {"host": "evil.example:8000"}),
    (400, "127.0.0.1", {"host": "192.168.1.9:8000"}),
    (400, "127.0.0.1", {"host": "localhost.evil.example"}),
    (400, "127.0.0.1", {"host": ""}),
    (403, "127.0.0.1", {"origin": "http://evil.example"}),
    (403, "127.0.0.1", {"origin": "null"}),
    (403, "127.0.0.1", {"origin": "http://localhost:9999"}),
    (415, "127.0.0.1", {"content-type": "text/plain"}),
    (415, "127.0.0.1", {"content-type": "application/x-www-form-urlencoded"}),
    (413, "127.0.0.1", {"content-length": "99999999999999999999999"}),
    (413, "127.0.0.1", {"content-length": "-1"}),
    (200, "0.0.0.0", {"host": "192.168.1.9:8000"}),
    (400, "0.0.0.0", {"host": "evil.example:8000"}),
    (200, "box.example", {"host": "Box.example:8000"}),
]


@pytest.mark.parametrize("status, host, headers", HEADERS)
def test_a_request_needs_a_host_an_origin_and_a_kind_of_ours(start, status, host, headers):
    echo = start(Echo(), host=host)
    response = echo.request(
        "POST", CHATS, content=json.dumps(TALK).encode(), headers=JSON | headers
    )
    assert response.status_code == status, response.text


def test_a_key_is_needed_where_there_is_one(start):
    echo = start(Echo(), key=KEY)
    for path in ("/", "/page.js", "/page.css", "/health"):
        assert echo.request("GET", path).status_code == 200
    wrong = ["Bearer wrong", "Bearer", KEY.decode(), "Basic " + KEY.decode(), "Bearer é".encode()]
    for headers in ({}, *({"authorization": given} for given in wrong)):
        for method, path in (("GET", "/props"), ("GET", "/v1/models"), ("POST", CHATS)):
            response = echo.request(method, path, headers=JSON | headers)
            assert response.status_code == 401, (path, headers)
            assert response.json()["error"]["code"] == "invalid_api_key"
    right = {"authorization": f"Bearer {KEY.decode()}"}
    assert echo.request("POST", CHATS, json=TALK, headers=right).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(start, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.05)
    echo = start(Echo())

    async def slowly():
        yield b'{"messages": '
        await asyncio.sleep(10)

    assert echo.request("POST", CHATS, content=slowly(), headers=JSON).status_code == 408


def test_forty_at_once_are_served_wait_or_hear_that_there_are_too_many(start):
    go_on = threading.Event()

    class Held(Echo):
        def write(self, slots):
            go_on.wait()
            return super().write(slots)

    echo = start(Held(count=4))

    async def all_at_once() -> list[httpx.Response]:
        async with echo.client() as client:
            send = (client.post(CHATS, json=TALK) for _ in range(40))
            asked = [asyncio.ensure_future(next(send))]
            while not echo.generation.busy:
                await asyncio.sleep(0.001)
            asked += map(asyncio.ensure_future, send)
            while sum(one.done() for one in asked) < 40 - 1 - MOST_WAITING:
                await asyncio.sleep(0.001)
            go_on.set()
            return await asyncio.gather(*asked)

    responses = asyncio.run(all_at_once())
    refused = [r for r in responses if r.status_code == 429]
    assert len(refused) == 40 - 1 - MOST_WAITING and all(r.headers["retry-after"] for r in refused)
    assert {r.json()["error"]["code"] for r in refused} == {"queue_full"}
    assert [r.status_code for r in responses].count(200) == 1 + MOST_WAITING


async def ask_and_leave(app, body: dict, after: int) -> None:
    """Send a request, and close the connection when so many parts of the answer are there."""
    content, parts, gone = json.dumps(body).encode(), 0, asyncio.Event()
    if not after:
        gone.set()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal parts
        parts += 1
        if parts == after:
            gone.set()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST"}
    scope |= {"path": CHATS, "raw_path": CHATS.encode(), "query_string": b"", "headers": headers}
    await app(scope | {"http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)


@pytest.mark.slow
def test_whoever_leaves_gives_the_slot_back_within_a_token(start):
    echo = start(Echo(count=3, seconds=0.0005))
    rng = random.Random(0)

    async def crowd(n: int) -> None:
        for _ in range(n // 20):  # not more at once than may wait
            bodies = [
                {"messages": [user("a" * 90)], "stream": rng.random() < 0.6} for _ in range(20)
            ]
            await asyncio.gather(
                *(ask_and_leave(echo.app, body, rng.randrange(12)) for body in bodies)
            )
        until = time.monotonic() + 5
        while time.monotonic() < until and (
            echo.generation.busy or echo.generation.waiting or len(asyncio.all_tasks()) > 1
        ):
            await asyncio.sleep(0.001)
        assert (echo.generation.busy, echo.generation.waiting) == (0, 0)
        assert len(asyncio.all_tasks()) == 1  # this one

    def orders() -> int:
        gc.collect()
        return sum(isinstance(o, Order) for o in gc.get_objects())

    asyncio.run(crowd(20))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    asyncio.run(crowd(200))
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors
    assert orders() <= 1 and len(echo.slots.plans) == 0
    assert len(echo.slots.opened) > 50
    assert echo.chat(user("Hello")).json()["choices"][0]["message"]["content"] == "Hello"


def test_a_request_that_goes_in_the_moment_a_token_comes_ends():
    orders = []
    generation = SimpleNamespace(place=orders.append)
    text = SimpleNamespace(ids=[], codec=SimpleNamespace(marks={}))
    asked = SimpleNamespace(ids=[1], text=text, max_tokens=9, sampler=None, seed=1)

    async def ends(turns: int) -> bool:
        async def read() -> None:
            async for _ in server.Tokens(generation, asked):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.001)
        orders[-1].take(SimpleNamespace(finish=None))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=0.2)
        return task.cancelled()

    assert all(asyncio.run(ends(turns)) for turns in range(5))


def test_a_fault_in_the_midst_ends_streams_with_an_error(start):
    class Broken(Echo):
        def write(self, slots):
            if len(self.plans[slots[0]]) < 3:
                raise MemoryError("no room")
            return super().write(slots)

    echo = Server(Broken())
    text = echo.chat(user("Hello"), stream=True).text
    assert "[DONE]" not in text and "the server has stopped" in text.split("data: ")[-1]
    assert echo.request("GET", "/health").status_code == 503
    assert echo.chat(user("Hello")).status_code == 503
    with pytest.raises(MemoryError):
        echo.generation.join()


def test_a_stream_that_waits_says_that_it_goes_on(start, monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.02)
    text = start(Echo(seconds=0.05)).chat(user("a"), stream=True).text
    assert ": keep-alive\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "scalegpt.server.serving")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(scalegpt.Mistake, match="uvicorn: pip install 'scalegpt.chat.'"):
        chat.main(["--run", "none", "--serve"])


@contextlib.contextmanager
def at_a_port(echo: Server):
    """Serves at a port of this machine; yields what ends it, and the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = serving._Server(echo.app, echo.generation)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listener])))
    thread.start()
    try:
        yield running, listener.getsockname()
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def listening(start):
    """The address of a server with a key."""
    with at_a_port(start(Echo(), key=KEY)) as (_, address):
        yield address


def test_texts_that_go_on_when_the_server_ends_end_with_an_error(start, monkeypatch):
    monkeypatch.setattr(serving, "FOR_ANSWERS", 0.1)
    talk = {"messages": [user("a" * 90)], "stream": True}
    with at_a_port(start(Echo(seconds=0.05))) as (running, address):
        url = "http://{}:{}{}".format(*address, CHATS)
        with httpx.stream("POST", url, json=talk) as response:
            lines = (line for line in response.iter_lines() if line)
            assert all(json.loads(next(lines).removeprefix("data: "))["choices"] for _ in range(3))
            running.should_exit = True
            last = [*lines][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.slow
def test_a_connection_that_asks_for_nothing_ends_and_an_address_has_so_many(listening, monkeypatch):
    monkeypatch.setattr(serving, "FOR_HEADERS", 1.0)
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 4)

    def ended(connection: socket.socket) -> bool:
        try:
            return connection.recv(1000) == b""
        except ConnectionResetError:
            return True

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(listening, 30)) for _ in range(5)]
        assert ended(opened[4])
        # One says nothing, one does not go on, and one neither after it has had an answer.
        opened[1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        opened[2].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = b""
        while b"}" not in received:
            received += opened[2].recv(10_000)
        assert received.startswith(b"HTTP/1.1 200") and b'"ok"' in received
        opened[2].sendall(b"GET /hea")
        assert all(ended(connection) for connection in opened[:3])
        again = stack.enter_context(socket.create_connection(listening, 30))
        again.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 400")


@pytest.mark.oracle
def test_the_openai_client_understands_answers_streams_and_errors(listening):
    openai = pytest.importorskip("openai")
    url = "http://{}:{}/v1".format(*listening)
    client = openai.OpenAI(base_url=url, api_key=KEY.decode(), max_retries=0)
    create, talk = client.chat.completions.create, {"model": "any", "messages": [user("Héllo")]}
    whole = create(**talk, seed=1, temperature=0.5, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == "Héllo" and whole.usage.completion_tokens == 7
    assert whole.choices[0].finish_reason == "stop"
    entry = whole.choices[0].logprobs.content[0]
    assert (entry.token, entry.bytes, len(entry.top_logprobs)) == ("H", [72], 2)
    parts = [*create(**talk, stream=True, stream_options={"include_usage": True})]
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == "Héllo"
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "stop" and parts[-1].usage.completion_tokens == 7
    text = client.completions.create(model="any", prompt="Hello", max_tokens=3)
    assert text.choices[0].text == "Hel" and text.choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["echo"]
    with pytest.raises(openai.BadRequestError, match="n is not supported") as refusal:
        create(**talk, n=2)
    assert (refusal.value.code, refusal.value.param) == ("unsupported", "n")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
