"""The command that serves, as its own process: speed, people who leave, signals, mistakes."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_run

import scalegpt
from scalegpt import chat, train

pytest.importorskip("starlette", reason="the server needs the extra chat")
httpx = pytest.importorskip("httpx", reason="the tests of the server speak to it through httpx")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signals_as_they_were")]


@pytest.fixture(scope="module")
def run(plays, tmp_path_factory) -> str:
    """A model that has learned nothing, but is large enough that its products take the time."""
    folder = tmp_path_factory.mktemp("serving") / "run"
    size = {"model.n_layer": 4, "model.n_embd": 256, "model.n_head": 4, "model.block_size": 256}
    steps = {"optim.steps": 1, "optim.warmup_steps": 0, "batch.sequences": 8, "eval.every": 0}
    assert train.main(tiny_run.arguments(plays, folder, **size, **steps)) == 0
    return str(folder)


@pytest.fixture(scope="module")
def served(run):
    """The process of a server with 8 slots on this run, and its URL."""
    # As a user has it, on one device, where a test's process has eight that are not optimized.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "scalegpt.chat", "--run", run, "--serve", "--port=0"]
    process = subprocess.Popen(
        [*command, "--parallel=8", "--collect"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        (url,) = re.findall(r"serving run at (http:\S+:\d+); step 1, val loss .*, 8 slots", line)
        yield process, url
    finally:
        process.kill()
        process.wait()


async def write(client, tokens: int, seed: int, prompt: str = "KING:\n") -> str:
    """The text of a stream of so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_eight_at_once_get_their_texts_and_three_times_the_tokens_of_one(served):
    tokens = 150

    async def measure() -> None:
        async with httpx.AsyncClient(base_url=served[1], timeout=60) as client:
            alone, rates = [], []
            for seed in range(8):
                began = time.perf_counter()
                alone.append(await write(client, tokens, seed))
                rates.append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            together = await asyncio.gather(*(write(client, tokens, seed) for seed in range(8)))
            rate = 8 * tokens / (time.perf_counter() - began)
        assert together == alone and len(set(alone)) == 8
        one = sorted(rates)[4]
        print(f"one client {one:,.0f} tokens/s, eight at once {rate:,.0f}: {rate / one:.1f} times")
        assert rate >= 3 * one

    asyncio.run(measure())


def test_a_hundred_who_leave_keep_nothing(served):
    process, url = served
    address, rng, seen = ("127.0.0.1", int(url.rpartition(":")[2])), random.Random(1), []
    body = json.dumps({"prompt": "KING", "max_tokens": 200, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def crowd() -> None:
        for _ in range(100):
            with socket.create_connection(address) as connection:
                # Some do not even say all that they want, and some read on for a while.
                connection.sendall(request[: rng.choice([10, len(request) - 5, len(request)])])
                if rng.random() < 0.5:
                    connection.settimeout(rng.random() / 10)
                    try:
                        connection.recv(1000)
                    except TimeoutError:
                        pass
        until = time.monotonic() + 10
        while time.monotonic() < until:
            health = httpx.get(f"{url}/health").json()
            if health["busy"] == health["waiting"] == 0:
                break
        of = psutil.Process(process.pid)
        seen.append((health["busy"], of.num_fds(), of.memory_info().rss >> 20))

    crowd()
    crowd()
    assert seen[1][0] == 0 and seen[1][1] <= seen[0][1] + 2  # connections that are still kept
    assert seen[1][2] <= seen[0][2] + 20  # MiB


def test_a_signal_ends_it_well_and_texts_have_five_seconds(served, run):
    process, url = served
    with pytest.raises(scalegpt.Mistake, match="cannot listen on 127.0.0.1, port .* in use"):
        chat.main(["--run", run, "--serve", "--port", url.rpartition(":")[2]])

    async def stopped() -> str:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            text = asyncio.create_task(write(client, 100, 1))
            while (await client.get("/health")).json()["busy"] == 0:
                pass
            process.send_signal(signal.SIGTERM)
            return await text

    assert len(asyncio.run(stopped())) > 50  # it was written to its end
    assert process.wait(10) == 0


def test_mistakes_of_the_command_are_named(run, tmp_path):
    key = tmp_path / "key"
    key.write_text("\n")
    for flags, message in (
        (["--serve", "--parallel=0"], "--parallel=0"),
        (["--serve", "--host=0.0.0.0"], "--api-key-file FILE.*or --no-api-key"),
        (["--serve", f"--api-key-file={key}"], "one line"),
        (["--serve", f"--api-key-file={tmp_path / 'none'}"], "cannot read"),
        (["--serve", "--host=no.such.host.invalid", "--no-api-key"], "cannot listen on no.such"),
        (["--serve", "--port=70000"], "--port=70000"),
        (["--serve", "--prompt=x"], "--prompt is of a chat without --serve"),
        (["--collect"], "--collect is of a chat with --serve"),
        (["--serve", "--prompt-lookup=4"], "--prompt-lookup=4 is of a chat without --serve"),
    ):
        with pytest.raises(scalegpt.Mistake, match=message):
            chat.main(["--run", run, *flags])
    with pytest.raises(scalegpt.Mistake, match="--collect writes feedback.jsonl into"):
        chat.main(["--hf", "gpt2", "--serve", "--collect"])
