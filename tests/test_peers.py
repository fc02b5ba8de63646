"""The link between processes, the watch and the request to stop, mostly without JAX."""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import processes
import pytest

from scalegpt.processes import handshake, link, stop_request
from scalegpt.processes.deadlines import Watch
from scalegpt.processes.group import Alone
from scalegpt.processes.phases import PHASES, Phase, Phases, key_of
from scalegpt.processes.stop_request import StopRequest

# Joins the others, then does what the test wants with `group`, `phases` and `stopping`.
PROGRAM = """
import os, signal, sys, threading, time
from scalegpt.processes import deadlines, handshake
from scalegpt.config import RunConfig
from scalegpt.processes.group import Group
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import StopRequest
deadlines._STOPPED = 1.0
port, count, index, seconds = map(int, sys.argv[1:5])
limits = {f"deadline_{key}": 1.0 for key in ("start", "save")}
secret = handshake.shared_secret(launched=False)
group = Group("localhost", port, count, index, secret)
stopping, phases = StopRequest(group), Phases(RunConfig(out_dir="x", **limits))
phases.begin("step", 7)
def join():
    print("port", group.connect(seconds, phases, stopping), flush=True)
"""


def start(
    count: int, then: str, seconds: int = 20, indices=None, port: int | None = None, token: str = ""
) -> list[subprocess.Popen]:
    port = port or free_port()
    environment = {**os.environ, handshake.TOKEN: token}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM + then, *map(str, (port, count, i, seconds))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=processes.ROOT,
            env=environment,
        )
        for i in (range(count) if indices is None else indices)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def codes(running: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes and what each wrote to standard error."""
    outputs = processes.finish(running, 60)
    return [p.returncode for p in running], [err for _, err in outputs]


def until_joined(running: list[subprocess.Popen]) -> None:
    for process in running:
        assert process.stdout.readline().startswith("port")


# --- start ---


@pytest.mark.slow
def test_those_that_do_not_come_are_named():
    ended, said = codes(start(4, "join()", seconds=2, indices=(0, 2)))
    assert ended == [5, 5]
    assert "after 2 s (run.deadline_start) of 4 processes these have not come: 1, 3" in said[0]
    ended, said = codes(start(2, "join()", seconds=1, indices=(1,)))
    assert ended == [5] and "process 0 did not answer at localhost:" in said[0]


def test_a_death_while_others_still_wait_at_the_start_is_noticed():
    for victim in (1, 0):
        running = start(3, "print('up', flush=True)\njoin()", seconds=60, indices=(0, 1))
        for process in running:
            process.stdout.readline()
        time.sleep(0.5)  # they have met by now, and wait for process 2
        running[victim].kill()
        ended, said = codes(running)
        assert ended[1 - victim] == 5 and f"process {victim} (" in said[1 - victim]
        assert "died" in said[1 - victim]


def test_processes_that_cannot_be_one_run_are_refused():
    """Two that were given the same number; a port that another run uses, which goes on."""
    ended, said = codes(start(3, "join()", indices=(0, 1, 1)))
    assert ended == [2, 2, 2] and "say that they are process 1" in said[0]
    with socket.create_server(("", free_port())) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-c", PROGRAM + "join()", str(port), "2", "0", "9"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=processes.ROOT)
        assert f"the coordinator's port {port} cannot be used" in done.stderr


# --- strangers ---


def until_listening(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("localhost", port), 5).close()
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory."""
    with open(f"/proc/{process.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024


HELLO = json.dumps({"hello": [1, "x", 2]}).encode() + b"\n"
FAILURE = json.dumps({"failed": [1, "x", 5, "a stranger's word", False]}).encode() + b"\n"
RUBBISH = [
    b"",
    b"\n\n\n",
    bytes(range(256)) * 4,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
    HELLO + HELLO,
    HELLO + FAILURE,
    FAILURE,
    b"0" * 64 + b' [1, "x", 2, ""]\n',
    b"0" * 64 + b" " + b"[" * 900 + b"\n",
    b"x" * 1_000_000,  # a line without end
]


@pytest.mark.parametrize("token", ["of this run", ""])
def test_strangers_neither_enter_nor_end_nor_exhaust_a_run(token):
    """What they send is dropped, 1,000 silent ones and half a hello too; then the run begins."""
    port = free_port()
    first = start(2, "join()\ngroup.farewell(0)", 60, [0], port, token)
    until_listening(port)
    before = resident(first[0])
    silent = deque[socket.socket](maxlen=200)
    for number in range(1000):
        silent.append(socket.create_connection(("localhost", port), 5))
        if number % 2:
            silent[-1].sendall(b"0" * 500)
    for data in RUBBISH:
        with socket.create_connection(("localhost", port), 5) as stranger:
            try:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                heard = b"".join(iter(lambda: stranger.recv(4096), b""))  # noqa: B023
            except OSError:  # dropped before all was sent
                continue
            assert heard.startswith(b"scalegpt ") and len(heard) <= 42 + 65
    assert resident(first[0]) - before < 8_000_000
    running = first + start(2, "join()\ngroup.farewell(0)", 60, [1], port, token)
    until_joined(running)
    ended, said = codes(running)
    assert ended == [0, 0] and "a stranger's word" not in said[0]


def test_after_the_start_nobody_listens():
    port = free_port()
    running = start(2, "join()\ntime.sleep(2)\ngroup.farewell(0)", port=port)
    until_joined(running)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    assert codes(running)[0] == [0, 0]


@pytest.mark.slow
def test_a_process_with_another_token_is_refused_by_name_and_the_run_goes_on():
    port = free_port()
    first = start(2, "join()", 4, [0], port, "one")
    other = start(2, "join()", 60, [1], port, "another")
    ended, said = codes(first + other)
    assert ended == [5, 2]
    assert f"give all processes of a run the same {handshake.TOKEN}" in said[1]
    assert f"has another {handshake.TOKEN}" in said[0] and "have not come: 1; a process" in said[0]


@pytest.mark.parametrize(
    "answer, code",
    [(b"0" * 64 + b"\n", 2), (b"", 5), pytest.param(b"\n", 5, marks=pytest.mark.slow)],
)
def test_an_impostor_in_place_of_process_0_is_not_believed(answer, code):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

        def impostor() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                caller.sendall(b"scalegpt " + b"0" * 32 + b"\n")
                caller.recv(4096)
                caller.sendall(answer + json.dumps({"go": [1, "x"]}).encode()[: 65 - len(answer)])
                caller.close()

        threading.Thread(target=impostor, daemon=True).start()
        ended, said = codes(start(2, "join()", 2, [1], port, "secret"))
    assert ended == [code], said
    assert ("has another secret" if code == 2 else "did not answer") in said[0]


@pytest.fixture
def listener():
    """A listener for three processes, and a function that lets it do what there is to do."""
    selector = selectors.DefaultSelector()
    port = free_port()
    listener = handshake.Listener(selector, ("localhost", port), 3, b"secret")
    came = []

    def work(seconds: float = 0.2) -> list[handshake.Hello]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for key, _ in selector.select(0.02):
                if key.data is None:
                    listener.accept()
                elif hello := listener.read(key.data):
                    came.append(hello)
            listener.sweep()
        return came

    yield SimpleNamespace(listener=listener, port=port, work=work)
    listener.close()


def test_a_recorded_hello_is_of_no_use_again(listener):
    """It answers what process 0 asked once, and asks anew each time."""
    said = []
    with socket.create_server(("localhost", 0)) as recorder:
        address = ("localhost", recorder.getsockname()[1])

        def record() -> None:
            there, _ = recorder.accept()
            with there, socket.create_connection(("localhost", listener.port)) as process_0:
                there.sendall(process_0.recv(42))
                said.append(there.recv(4096))
                process_0.sendall(said[0])
                there.sendall(process_0.recv(65))

        threading.Thread(target=record, daemon=True).start()
        joining = threading.Thread(
            target=handshake.connect, args=(address, handshake.Hello(1, "x", 3), b"secret", 5)
        )
        joining.start()
        assert listener.work(1) == [(1, "x", 3)]
        joining.join()
    with socket.create_connection(("localhost", listener.port)) as replay:
        replay.sendall(said[0])
        assert listener.work() == [(1, "x", 3)]
        assert handshake._receive(replay, 200, time.monotonic() + 1)[42:] == handshake._REFUSED


def test_callers_are_limited_in_number_and_time(listener, monkeypatch):
    links = []
    for _ in range(3):
        links += [socket.create_connection(("localhost", listener.port), 5) for _ in range(50)]
        listener.work()
    assert len(listener.listener._callers) == 131  # 128 and the processes; the oldest have gone
    monkeypatch.setattr(handshake, "_PATIENCE", 0.1)
    assert listener.work() == [] and not listener.listener._callers
    for connection in links:
        connection.close()


def test_a_line_without_end_is_cut_off(listener):
    with socket.create_connection(("localhost", listener.port), 5) as endless:
        with pytest.raises(ConnectionError):
            for _ in range(30):
                endless.sendall(b"x" * 1000)
                listener.work(0.05)


@pytest.mark.parametrize(
    "body",
    [
        '{"a": 1}',
        '[1, "x", 3]',
        '["1", "x", 3, ""]',
        '[1, 2, 3, ""]',
        '[3, "x", 3, ""]',
        '[-1, "x", 3, ""]',
        '[1, "\\u001b[2J", 3, ""]',
        "[" * 900,
        "\udce9",
        "[1e999, 1, 1, 1]",
    ],
)
def test_a_hello_of_wrong_types_is_none(body):
    assert handshake._hello(body.encode("utf-8", "surrogateescape")) is None
    assert handshake._hello(b'[1, "x", 3, ""]') == (1, "x", 3)


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "{}",
        '{"at": ["step", 1]}',
        '{"at": ["step", "1", 2.0]}',
        '{"stop": 1}',
        '{"failed": [1, "x", 5, "why", "no"]}',
        '{"hello": [1, "x", 2]}',
        '{"a": 1}',
        "[",
    ],
)
def test_what_is_no_message_is_found_out(text, monkeypatch):
    ended = []
    monkeypatch.setattr(link.Link, "leave", lambda link, code, why: ended.append(why))
    ours, peer = link.Link(("localhost", 1), 2, 0), link.Peer(None, 1, "x")
    ours._handle(peer, b'{"at": ["step", 1, 2.5]}')
    assert peer.where[:2] == ("step", 1) and not ended
    ours._handle(peer, text.encode())
    assert ended == [f"process 1 (x) sent what is no message: {text.encode()!r}"]


def test_a_process_that_sends_what_is_no_message_is_named():
    then = """
join()
if index == 1:
    group.link._peers[0].socket.sendall(b"[" * 100_000 + b"\\n")
time.sleep(60)
"""
    ended, said = codes(start(3, then))
    assert ended == [5, 5, 5]
    assert all("process 1 (" in text and "sent what is no message: b'[[[" in text for text in said)


def test_the_secret_is_the_token_or_what_the_launcher_said(monkeypatch):
    for name in (handshake.TOKEN, *handshake._LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert handshake.shared_secret(launched=False) == b""
    seven = handshake.shared_secret(launched=True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert handshake.shared_secret(launched=True) != seven
    monkeypatch.setenv(handshake.TOKEN, "mine")
    assert (
        handshake.shared_secret(launched=True) == handshake.shared_secret(launched=False) == b"mine"
    )


def test_the_secret_of_a_run_is_in_its_folder(monkeypatch, tmp_path):
    """Whoever comes first makes it, and the others have the same."""
    monkeypatch.delenv(handshake.TOKEN, raising=False)
    folder, heard = tmp_path / "new" / "run", []
    ask = lambda: heard.append(handshake.shared_secret(True, str(folder)))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 8 and len(set(heard)) == 1 and len(heard[0]) == 32
    assert (folder / ".secret").stat().st_mode & 0o777 == 0o600
    assert handshake.shared_secret(False, str(tmp_path / "other")) != heard[0]
    assert handshake.shared_secret(False, "gs://bucket/run") == b""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"cannot hold the secret.*{handshake.TOKEN}"):
        handshake.shared_secret(False, str(tmp_path / "file"))
    monkeypatch.setenv(handshake.TOKEN, "mine")
    assert handshake.shared_secret(False, str(folder)) == b"mine"


def test_process_0_listens_only_where_it_is_needed():
    assert handshake.interface("localhost") in ("127.0.0.1", "::1")
    assert handshake.interface("127.0.0.1") == "127.0.0.1"
    for other in ("192.0.2.1", socket.gethostname(), "no.such.host.invalid"):
        assert handshake.interface(other) == ""


# --- failures ---


def test_an_error_in_one_process_ends_all_with_its_code():
    then = """
join()
if index == 2:
    group.leave(2, "train.bin is short")
time.sleep(60)
"""
    ended, said = codes(start(4, then))
    assert ended == [2] * 4
    assert all("process 2 (" in text and "): train.bin is short" in text for text in said)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_the_others(victim):
    """Also from within C, where Python's main thread hears nothing; in a second at most."""
    running = start(4, "join()\nimport ctypes\nctypes.CDLL(None).sleep(60)")
    until_joined(running)
    began = time.monotonic()
    running[victim].kill()
    ended, said = codes(running)
    assert time.monotonic() - began < 10
    for index in {0, 1, 2, 3} - {victim}:
        assert ended[index] == 5 and f"process {victim} (" in said[index] and "died" in said[index]


@pytest.mark.slow
def test_an_abort_within_c_has_the_exit_code_of_a_failure():
    ended, said = codes(start(2, "join()\nif index: os.abort()\ntime.sleep(60)"))
    assert ended == [5, 5] and "process 1" in said[0] and "aborted from within JAX" in said[0]


def test_the_end_waits_for_all():
    then = """
join()
time.sleep(index / 2)
came = time.monotonic()
group.farewell(3)
print("at", came, time.monotonic(), flush=True)
sys.exit(3)
"""
    running = start(3, then)
    outputs = processes.finish(running, 60)
    assert [p.returncode for p in running] == [3] * 3, outputs
    came, left = zip(*(map(float, out.split()[-2:]) for out, _ in outputs), strict=True)
    assert max(came) <= min(left)


# --- the watch ---


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_deadline_names_the_phase_its_key_and_who_is_late(stopped):
    then = f"""
join()
deadlines.Watch(phases, group)
def stuck_here():
    time.sleep(60)
time.sleep(1.5)  # by now all have said where they are
if index == {stopped}:
    os.kill(os.getpid(), signal.SIGSTOP)
with phases("save"):
    stuck_here()
"""
    running = start(3, then)
    ended = {i: running[i].wait(60) for i in {0, 1, 2} - {stopped}}
    running[stopped].kill()
    _, said = codes(running)
    assert set(ended.values()) == {5}
    both = "".join(said)
    assert "save after update 7 takes" in both and "longer than run.deadline_save=1" in both
    assert f"process {stopped} (" in both, both
    assert ("does not answer" if stopped == 0 else "in step, step 7") in both
    assert all("stuck_here" in said[i] for i in ended), "the stacks of each"


def test_a_process_alone_that_hangs_ends_with_its_stacks():
    then = """
from scalegpt.processes.group import Alone
deadlines.Watch(phases, Alone())
def stuck_here():
    time.sleep(60)
with phases("save"):
    stuck_here()
"""
    ended, said = codes(start(1, then))
    assert ended == [5] and "longer than run.deadline_save=1" in said[0]
    assert "stuck_here" in said[0]


@pytest.mark.slow
def test_a_process_that_was_stopped_for_a_while_does_not_hang():
    then = """
deadlines.Watch(phases, group)
phases.current = phases.current._replace(deadline=3.0, since=time.monotonic())
end = time.monotonic() + 4.5  # of the clock: it may be stopped before it sleeps
print("up", flush=True)
time.sleep(max(0, end - time.monotonic()))
"""
    (process,) = start(1, then)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    ended, said = codes([process])
    assert ended == [0], said


def test_what_takes_long_is_announced_and_its_deadline_when_that_is_near(capfd):
    since = time.monotonic() - 6
    phases = [
        SimpleNamespace(current=Phase(name, 0, since, deadline))
        for name, deadline in (("restore", 3600.0), ("compile", 20.0))
    ]
    watching = [Watch(p, Alone()) for p in phases]
    said, until = "", time.monotonic() + 10
    try:
        while said.count("\n") < 2 and time.monotonic() < until:
            time.sleep(0.05)
            said += capfd.readouterr().err
    finally:
        for watch in watching:
            watch.close()
    first, second = sorted(said.splitlines())
    seconds = "([6-9]|1[0-9]) s so far"
    assert re.fullmatch(f"compile: {seconds}; run.deadline_compile=20 ends the run", first)
    assert re.fullmatch(f"restore: {seconds}", second)


def test_every_phase_has_a_deadline(tmp_path):
    from scalegpt.config import RunConfig

    run = RunConfig(out_dir=str(tmp_path))
    for name in PHASES:
        assert getattr(run, key_of(name).removeprefix("run.")) > 0
    assert Phases(run).current.name == "imports"


# --- the request to stop ---


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_stop_request_is_noticed_and_the_signals_are_given_back(name, capfd):
    before = {n: signal.getsignal(n) for n in STOPS}
    request = StopRequest(Alone())
    try:
        request.saves = True
        assert not request.reached()
        signal.raise_signal(getattr(signal, name))
        until = time.monotonic() + 10
        while not request.reached() and time.monotonic() < until:
            time.sleep(0.01)
        assert request.reached() and request.reached()
        assert f"{name}: saving after this step; a second" in capfd.readouterr().err
    finally:
        request.close()
    assert {n: signal.getsignal(n) for n in before} == before


def test_only_ctrl_c_and_sigterm_hurry_and_nohup_keeps_its_meaning(capfd):
    """The end of a terminal sends SIGHUP twice; Slurm sends SIGUSR1, and SIGTERM a minute later."""

    class Recorded(Alone):
        def leave(self, code, text, with_stacks=False):
            left.append((code, text))

    left, nohup = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest(Recorded())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        request.close()
        signal.signal(signal.SIGHUP, nohup)
        request = StopRequest(Recorded())
        request.saves = True
        for name in ("SIGHUP", "SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT"):
            assert not left
            signal.raise_signal(getattr(signal, name))
            said, until = "", time.monotonic() + 10
            while f"{name}: saving" not in said and time.monotonic() < until:
                said += capfd.readouterr().err
            assert "SIGHUP" not in said or name == "SIGHUP"
        request.close()
    finally:
        signal.signal(signal.SIGHUP, nohup)
    assert left == [(128 + signal.SIGINT, "left at once on a second signal")]


def test_in_a_thread_a_stop_request_hears_no_signals_and_does_no_harm():
    before, requests = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: requests.append(StopRequest(Alone())))
    thread.start()
    thread.join()
    assert not requests[0].reached() and signal.getsignal(signal.SIGTERM) == before
    requests[0].close()


def test_a_signal_while_there_is_nothing_to_save_ends_the_process_though_it_is_in_c():
    then = """
import hashlib
print("up", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)  # minutes, without a look at signals
"""
    (process,) = start(1, then)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    ended, said = codes([process])
    assert ended == [3] and "SIGTERM: stopped; there was nothing new to save" in said[0]
    assert time.monotonic() - began < 5
    # Of several processes, one is enough.
    running = start(3, "join()\ntime.sleep(60)")
    until_joined(running)
    running[1].send_signal(signal.SIGINT)
    assert codes(running)[0] == [3] * 3


STEPS = """
from scalegpt.processes import startup
stopping.saves = True
startup.join(group, seconds, phases, stopping)
startup.jax.devices()
print("port", flush=True)
for step in range(1, 10_000):
    time.sleep(0.001 * (index + 1))
    if stopping.reached():
        print("stopped", step, flush=True)
        group.farewell(3)
        sys.exit(3)
"""


def test_all_processes_stop_after_the_same_step():
    running = start(4, STEPS)
    until_joined(running)
    time.sleep(0.3)
    for index in (3, 1):
        running[index].send_signal(signal.SIGTERM)
    outputs = processes.finish(running, 60)
    assert [p.returncode for p in running] == [3] * 4, outputs
    stopped = {out.splitlines()[-1] for out, _ in outputs}
    assert len(stopped) == 1 and stopped.pop() > "stopped 1"


def test_a_second_signal_ends_all_at_once():
    running = start(2, "stopping.saves = True\njoin()\ntime.sleep(60)")
    until_joined(running)
    running[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    running[1].send_signal(signal.SIGTERM)
    ended, said = codes(running)
    assert ended == [143, 143] and "left at once on a second signal" in said[0]


@pytest.mark.parametrize("event", ["preempted", "maintenance-event"])
def test_the_clouds_notice_of_an_end_is_a_request_to_stop(event, monkeypatch, capfd):
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}
    asked = []

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                values[self.path.removeprefix("/computeMetadata/v1/instance/")].encode()
            )

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(stop_request, "_POLL", 0.02)
    request = StopRequest(Alone())
    try:
        request.saves = True
        request.heed_notices(False)
        until = time.monotonic() + 10
        while len(asked) < 8 and time.monotonic() < until:
            time.sleep(0.01)
        assert not request.reached() and len(set(asked)) == 2
        values[event] = {"preempted": "TRUE"}.get(event, "TERMINATE_ON_HOST_MAINTENANCE")
        while not request.reached() and time.monotonic() < until:
            time.sleep(0.01)
        assert request.reached()
        assert f"({event}: {values[event]}): saving after this step" in capfd.readouterr().err
    finally:
        request.close()
        server.shutdown()
