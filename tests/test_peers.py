"""The line between processes, the watch and the request to stop; without JAX, so in a second."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import processes
import pytest

from scalegpt.processes import stop_request
from scalegpt.processes.phases import PHASES, Phases
from scalegpt.processes.stop_request import StopRequest

# Joins the others, then does what the test wants: `index`, `phases` and `stopping` are there.
PROGRAM = """
import os, signal, sys, threading, time
from scalegpt.processes import group
from scalegpt.processes import deadlines
from scalegpt.config import RunConfig
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import StopRequest
deadlines._STOPPED = 1.0
port, count, index, seconds = map(int, sys.argv[1:5])
limits = {f"deadline_{key}": 1.0 for key in ("start", "save")}
stopping, phases = StopRequest(), Phases(RunConfig(out_dir="x", **limits))
phases.begin("step", 7)
def join():
    print("port", group.join("localhost", port, count, index, seconds), flush=True)
"""


def start(count: int, then: str, seconds: int = 20, indices=None) -> list[subprocess.Popen]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM + then, *map(str, (port, count, i, seconds))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=processes.ROOT,
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


def test_an_abort_within_c_has_the_exit_code_of_a_failure():
    ended, said = codes(start(2, "join()\nif index: os.abort()\ntime.sleep(60)"))
    assert ended == [5, 5] and "process 1" in said[0] and "aborted from within JAX" in said[0]


def test_the_end_waits_for_all():
    then = """
join()
time.sleep(index)
group.farewell(3)
print("at", time.monotonic(), flush=True)
sys.exit(3)
"""
    running = start(3, then)
    outputs = processes.finish(running, 60)
    assert [p.returncode for p in running] == [3] * 3, outputs
    times = [float(out.split()[-1]) for out, _ in outputs]
    assert max(times) - min(times) < 1


# --- the watch ---


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_deadline_names_the_phase_its_key_and_who_is_late(stopped):
    then = f"""
join()
deadlines.Watch(phases)
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
    assert "save of step 7 takes" in both and "longer than run.deadline_save=1" in both
    assert f"process {stopped} (" in both, both
    assert ("does not answer" if stopped == 0 else "in step, step 7") in both
    assert all("stuck_here" in said[i] for i in ended), "the stacks of each"


def test_a_process_that_was_stopped_for_a_while_does_not_hang():
    then = """
deadlines.Watch(phases)
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


def test_what_takes_long_is_announced(capfd):
    from scalegpt.processes import deadlines, group

    phases = SimpleNamespace(
        current=SimpleNamespace(name="restore", step=0, since=time.monotonic() - 6, deadline=3600.0)
    )
    watching = deadlines.Watch(phases)
    try:
        time.sleep(1.3)
    finally:
        watching.close()
        group._phases = None
    assert re.findall("still in restore after [67] s, deadline 3600 s", capfd.readouterr().err)


def test_every_phase_has_a_deadline(tmp_path):
    from scalegpt.config import RunConfig
    from scalegpt.processes.exits import key_of

    run = RunConfig(out_dir=str(tmp_path))
    for name in PHASES:
        assert getattr(run, key_of(name).removeprefix("run.")) > 0
    assert Phases(run).current.name == "imports"


# --- the request to stop ---


def test_a_stop_request_is_noticed_and_the_signals_are_given_back(capfd):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest()
    try:
        request.saves = True
        assert not request.reached(1)
        signal.raise_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while not request.reached() and time.monotonic() < until:
            time.sleep(0.01)
        assert request.reached(2) and request.reached(3)
        assert "SIGTERM: saving after this step; once more" in capfd.readouterr().err
    finally:
        request.close()
    assert {n: signal.getsignal(n) for n in before} == before


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
    assert ended == [3] and "before there was anything to save" in said[0]
    assert time.monotonic() - began < 5
    # Of several processes, one is enough.
    running = start(3, "join()\ntime.sleep(60)")
    until_joined(running)
    running[1].send_signal(signal.SIGINT)
    assert codes(running)[0] == [3] * 3


STEPS = """
stopping.saves = True
join()
for step in range(1, 10_000):
    time.sleep(0.001 * (index + 1))
    if stopping.reached(step):
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
    request = StopRequest()
    try:
        request.saves = True
        request.heed_notices(False)
        until = time.monotonic() + 10
        while len(asked) < 8 and time.monotonic() < until:
            time.sleep(0.01)
        assert not request.reached(1) and len(set(asked)) == 2
        values[event] = {"preempted": "TRUE"}.get(event, "TERMINATE_ON_HOST_MAINTENANCE")
        while not request.reached() and time.monotonic() < until:
            time.sleep(0.01)
        assert request.reached(2)
        assert f"({event}: {values[event]}): saving after this step" in capfd.readouterr().err
    finally:
        request.close()
        server.shutdown()
