"""Real processes on this machine give the run of one, and none is waited for that is dead."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import psutil
import pytest

from scalegpt import evaluate, train
from scalegpt.config import Config, DistributedConfig
from scalegpt.errors import Mistake
from scalegpt.processes import handshake, startup
from scalegpt.processes.group import Alone

STEPS = 24

# The command, which records the rows that a process reads (record=FILE), and in which a signal
# comes when the batch of a step is read, or before the self-check (fault=SIGNAL:STEP or :check),
# and which may be unable to read it (unread=STEP or val), be late (late=SECONDS) or have a variable
# of its own (algo=NCCL_ALGO).
PROGRAM = """
import json, os, signal, sys, time
from scalegpt import train
from scalegpt.processes import handshake, startup
from scalegpt.data.batches import EvalBatches, TrainBatches
from scalegpt.errors import Mistake
ours = dict(a.split("=", 1) for a in sys.argv[1:] if not a.startswith("--"))
sys.argv[1:] = [a for a in sys.argv[1:] if a.startswith("--")]
os.environ["NCCL_ALGO"] = ours.get("algo", "")
init, read = TrainBatches.__init__, TrainBatches.__getitem__
def recorded(self, *arguments):
    open(ours["record"], "w").write(json.dumps(arguments[6].tolist()))
    init(self, *arguments)
def fault(now):
    name, at = ours.get("fault", "none:never").split(":")
    if now == at:
        os.kill(os.getpid(), getattr(signal, name))
def faulty(self, step):
    fault(str(step))
    if ours.get("unread") == str(step):
        raise Mistake("the bucket is away")
    return read(self, step)
def window(self, number):
    if ours.get("unread") == "val":
        raise Mistake("the bucket is away")
    return read_window(self, number)
read_window, EvalBatches.__getitem__ = EvalBatches.__getitem__, window
opened = train.open_datasets
train.sample = lambda run, params: None
train.open_datasets = lambda *a: (time.sleep(int(ours.get("late", 0))), opened(*a))[1]
check = startup.self_check
startup.self_check = lambda: (fault("check"), check())
TrainBatches.__init__, TrainBatches.__getitem__ = recorded, faulty
from scalegpt.processes.command import run_command
run_command(train.main)
"""


def launch(
    data: Path,
    out_dir: Path,
    count: int,
    *extra: str,
    devices: int = 2,
    each: list[list[str]] | None = None,
) -> list[subprocess.Popen]:
    """each: what every process gets besides."""
    out_dir.parent.mkdir(exist_ok=True)
    each = [[f"record={out_dir.parent}/rows{i}", *(each[i] if each else [])] for i in range(count)]
    command = ["-c", PROGRAM, *arguments(data, out_dir), *extra]
    return processes.start(
        command, count, devices, each, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )


def arguments(data: Path, out_dir: Path) -> list[str]:
    return [
        *("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16"),
        *("--model.dropout=0.1", "--model.scan_layers=true", "--mesh.data=2", "--mesh.fsdp=-1"),
        *("--batch.sequences=16", "--batch.microbatch=2", "--optim.lr=1e-2"),
        *(f"--optim.steps={STEPS}", "--optim.warmup_steps=0", "--eval.every=12"),
        *("--eval.windows=9", "--checkpoint.every=16", "--log.every=1", "--log.tensorboard=false"),
        *(f"--data.path={data}", f"--run.out_dir={out_dir}"),
    ]


def wait_for_step(running: list[subprocess.Popen], out_dir: Path, at: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(p.poll() is None for p in running):
        if (out_dir / "metrics.jsonl").exists() and max(
            rows(out_dir, "train/loss"), default=0
        ) > at:
            return
        time.sleep(0.01)
    for process in running:
        process.kill()
    pytest.fail(f"step {at} was not reached: {processes.finish(running)}")


def rows(out_dir: Path, key: str) -> dict[int, float]:
    text = (out_dir / "metrics.jsonl").read_text()
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    found = [(row["step"], row[key]) for row in lines if key in row]
    assert len(found) == len(dict(found)), "two processes have written"
    return dict(found)


def codes(running: list[subprocess.Popen]) -> list[int]:
    return [process.returncode for process in running]


@pytest.fixture(scope="module")
def alone(bottles, tmp_path_factory) -> Path:
    """The run of one process, this one, with eight devices."""
    out_dir = tmp_path_factory.mktemp("alone") / "run"
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert train.main(arguments(bottles, out_dir)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return out_dir


def assert_same_run(ours: Path, theirs: Path) -> None:
    for key in ("train/loss", "val/loss"):
        a, b = rows(ours, key), rows(theirs, key)
        assert list(a) == list(b) and len(a) >= 3
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0, atol=1e-5)


def test_fault_18_two_processes_are_the_run_of_one(bottles, alone, tmp_path, capsys):
    shared = tmp_path / "shared" / "run"
    two = launch(bottles, shared, 2)
    outputs = processes.finish(two)
    assert codes(two) == [0, 0], outputs
    assert_same_run(shared, alone)

    # Only the first speaks; each reads its own half of a microbatch's rows.
    assert f"step {STEPS}/{STEPS}" in outputs[0][0] and not outputs[1][0]
    read = [json.loads((shared.parent / f"rows{i}").read_text()) for i in range(2)]
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7]]

    # One process on another mesh reads what two have written: the evaluation is theirs.
    argv = ["--run", str(shared), "--checkpoint", "latest", "--windows", "9", "--json"]
    assert evaluate.main(argv) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["step"] == STEPS
    assert abs(row["val/loss"] - rows(shared, "val/loss")[STEPS]) < 1e-5


@pytest.mark.slow
def test_strangers_at_every_port_change_nothing(bottles, tmp_path):
    """From the start to the farewell: neither the losses nor the memory of process 0."""
    _, most = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    psutil.Process().rlimit(psutil.RLIMIT_NOFILE, (most, most))

    def train(out_dir: Path, visit: Callable[[set[int]], None]) -> float:
        two = launch(bottles, out_dir, 2)
        # Process 1 waits, for as soon as it has come the link listens no more.
        two[1].send_signal(signal.SIGSTOP)
        first, peak, rounds = psutil.Process(two[0].pid), 0, 0
        first.rlimit(psutil.RLIMIT_NOFILE, (1024, most))
        while all(process.poll() is None for process in two):
            with contextlib.suppress(psutil.Error):
                peak = max(peak, first.memory_info().rss)
                sockets = first.net_connections("tcp")
            ports = {s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN}
            visit(ports)
            rounds += bool(ports)
            if rounds == 5:
                two[1].send_signal(signal.SIGCONT)
        two[1].send_signal(signal.SIGCONT)  # where process 0 has failed, it is to hear of that
        outputs = processes.finish(two)
        assert codes(two) == [0, 0], outputs
        return peak / 1e6

    plain, visited = tmp_path / "plain" / "run", tmp_path / "visited" / "run"
    alone = train(plain, lambda ports: time.sleep(0.1))
    nonce, body, secret = b"0" * 32, b'[1, "x", 2, ""]', (plain / ".secret").read_bytes()
    replayed = handshake._proof(secret, b"hello", nonce, body) + b" " + body + b"\n"
    failure = b'{"failed": [1, "x", 5, "a word of a stranger", false]}\n'
    strange = (
        *(b"", b"\n", random.Random(1).randbytes(1000), b"x" * 100_000, failure),
        *(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64)),
        *(replayed, replayed + failure, replayed[:70]),
    )
    visits, kept = Counter(), deque(maxlen=2000)

    def visit(ports: set[int]) -> None:
        for port in ports:
            for data in strange:
                with contextlib.suppress(OSError):
                    kept.append(socket.create_connection(("localhost", port), 0.2))
                    kept[-1].sendall(data)
                    visits[port] += 1
                    if visits[port] % 2:  # the rest stay as they are
                        kept[-1].shutdown(socket.SHUT_WR)
        time.sleep(0.02)

    peak = train(visited, visit)
    assert min(visits.values()) > 20 and visits.total() > 2000, visits
    for key in ("train/loss", "val/loss"):
        assert rows(visited, key) == rows(plain, key)
    assert peak < alone + 50


@pytest.mark.slow
def test_a_signal_to_a_process_that_was_late_stops_two_and_both_continue(bottles, alone, tmp_path):
    shared = tmp_path / "shared" / "run"
    two = launch(bottles, shared, 2, each=[[], ["late=3"]])
    wait_for_step(two, shared, 5)
    two[1].send_signal(signal.SIGINT)
    outputs = processes.finish(two)
    assert codes(two) == [3, 3], outputs
    stopped = max(rows(shared, "train/loss"))
    assert f"stopped on request after update {stopped}" in outputs[0][0] and stopped < STEPS
    two = launch(bottles, shared, 2)
    outputs = processes.finish(two)
    assert codes(two) == [0, 0], outputs
    assert f"continuing from step {stopped}" in outputs[0][0]
    assert_same_run(shared, alone)


@pytest.mark.slow
def test_four_processes_with_their_own_copies_of_the_data_are_the_run_of_one(
    bottles, alone, tmp_path
):
    """Until a signal to one of them stops all."""
    each = []
    for index in range(4):
        copy = tmp_path / f"host{index}" / "bottles"
        shutil.copytree(bottles, copy)
        each.append([f"--data.path={copy}"])
    shared = tmp_path / "four" / "run"
    four = launch(bottles, shared, 4, each=each)
    wait_for_step(four, shared, 8)
    four[2].send_signal(signal.SIGTERM)
    outputs = processes.finish(four)
    assert codes(four) == [3] * 4, outputs
    ours, theirs = (rows(folder, "train/loss") for folder in (shared, alone))
    assert len(ours) > 8 and all(abs(ours[step] - theirs[step]) < 1e-5 for step in ours)
    assert [bool(out) for out, _ in outputs] == [True, False, False, False]
    assert "SIGTERM in another process: saving after this step" in outputs[0][1]
    read = [json.loads((tmp_path / "four" / f"rows{i}").read_text()) for i in range(4)]
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "when"), [(0, "12"), (1, "check")])
def test_a_killed_process_ends_the_other_in_seconds(bottles, tmp_path, victim, when):
    """Process 0 is the coordinator, whose end JAX itself answers with SIGABRT."""
    each = [[f"fault=SIGKILL:{when}"] if i == victim else [] for i in range(2)]
    two = launch(bottles, tmp_path / "a" / "run", 2, each=each)
    two[victim].wait(120)
    began = time.monotonic()
    two[1 - victim].wait(60)
    assert time.monotonic() - began < 15
    outputs = processes.finish(two)
    assert two[1 - victim].returncode == 5, outputs
    assert f"process {victim} (" in outputs[1 - victim][1] and "died" in outputs[1 - victim][1]


@pytest.mark.slow
def test_a_stopped_process_ends_the_other_at_the_deadline(bottles, tmp_path):
    """With where it stands, the key to raise, the stacks, and the process that is missing."""
    each = [[], ["fault=SIGSTOP:check"]]
    two = launch(bottles, tmp_path / "a" / "run", 2, "--run.deadline_data=12", each=each)
    two[0].wait(100)
    two[1].kill()
    outputs = processes.finish(two)
    said = outputs[0][1]
    assert two[0].returncode == 5, outputs
    assert "self-check takes 1" in said and "longer than run.deadline_data=12" in said
    assert "in self_check" in said and "process 1 (" in said and "has said nothing for" in said


@pytest.mark.slow
def test_faulty_data_on_one_host_end_all(bottles, tmp_path):
    shutil.copytree(bottles, tmp_path / "bottles")
    with open(tmp_path / "bottles" / "train.bin", "r+b") as file:
        file.truncate(5000)
    each = [[], [f"--data.path={tmp_path / 'bottles'}"]]
    two = launch(bottles, tmp_path / "a" / "run", 2, each=each)
    outputs = processes.finish(two)
    assert codes(two) == [2, 2], outputs
    assert "train.bin" in outputs[1][1] and "process 1 (" in outputs[0][1]
    assert "train.bin" in outputs[0][1] and "Traceback" not in outputs[0][1]


@pytest.mark.slow
def test_a_host_that_cannot_read_a_batch_has_all_save_the_update_before_it(
    bottles, alone, tmp_path
):
    out_dir = tmp_path / "shared" / "run"
    two = launch(bottles, out_dir, 2, each=[[], ["unread=10"]])
    outputs = processes.finish(two)
    assert codes(two) == [2, 2], outputs
    assert re.search(r"error: process 1 \(.*\): the bucket is away", outputs[0][0])
    assert "the last good checkpoint is step 10" in outputs[0][0]
    assert max(rows(out_dir, "train/loss")) == 10
    again = launch(bottles, out_dir, 2, each=[[], ["unread=val"]])
    outputs = processes.finish(again)
    assert codes(again) == [2, 2] and "continuing from step 10" in outputs[0][0], outputs
    assert "the last good checkpoint is step 12" in outputs[0][0]
    again = launch(bottles, out_dir, 2)
    outputs = processes.finish(again)
    assert codes(again) == [0, 0], outputs
    assert_same_run(out_dir, alone)


@pytest.mark.slow
def test_processes_set_for_different_runs_are_refused(bottles, tmp_path):
    """Before anything is restored or compiled, and in all of them."""
    shutil.copytree(bottles, tmp_path / "bottles")
    with open(tmp_path / "bottles" / "train.bin", "r+b") as file:
        file.write(b"\1\0\2\0")
    each = [[], [f"--data.path={tmp_path / 'bottles'}", "--run.seed=5"]]
    two = launch(bottles, tmp_path / "a" / "run", 2, each=each)
    outputs = processes.finish(two)
    assert codes(two) == [2, 2], outputs
    for _, said in outputs:
        assert "run.seed: process 0 (" in said and ") has 1337, process 1 (" in said
        assert ") has 5" in said and "data set 0: process 0" in said
    assert not (tmp_path / "a" / "run" / "config.yaml").exists()
    two = launch(bottles, tmp_path / "b" / "run", 2, each=[[], ["algo=Ring"]])
    outputs = processes.finish(two)
    assert codes(two) == [2, 2], outputs
    for _, said in outputs:
        assert "variable NCCL_ALGO: process 0 (" in said and ") has Ring" in said


def test_what_must_agree_and_what_may_differ():
    def facts(latest=None, mark="a", **changes):
        values = {"data": {"path": "one"}, "run": {"out_dir": "x"}}
        for key, value in changes.items():
            section, name = key.split("__")
            values[section] = {**values.get(section, {}), name: value}
        config = Config.model_validate(values)
        return {"host": "h", **startup.facts(config, {"one": mark}, latest)}

    def differ(**changes):
        return startup._difference([facts(), facts(), facts(**changes)])

    assert not differ(
        data__path="another",
        data__cache_dir="/tmp",
        run__out_dir="y",
        distributed__process_id=2,
        distributed__num_processes=3,
        distributed__coordinator="h:1",
    ).strip()
    assert "model.n_layer: process 0 (h) has 12, process 2 (h) has 3" in differ(model__n_layer=3)
    assert "data set 0: process 0 (h) has a, process 2 (h) has b" in differ(mark="b")
    assert "latest checkpoint: process 0 (h) has none, process 2 (h) has step 5" in differ(latest=5)
    assert "weights of the data" in differ(data__path={"one": 1, "two": 3})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "variable XLA_FLAGS: .*has.*fast_math"),
        ("JAX_ENABLE_X64", "true", "variable JAX_ENABLE_X64: process 0 .* has none, .* has true"),
        ("NVIDIA_TF32_OVERRIDE", "0", "variable NVIDIA_TF32_OVERRIDE: .*has none, .* has 0"),
        ("JAX_PROCESS_ID", "1", ""),
        ("JAX_CUDA_VISIBLE_DEVICES", "1", ""),
        ("HOME", "/elsewhere", ""),
        ("JAX_COMPILATION_CACHE_DIR", "/elsewhere", ""),
        ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_dump_to=/tmp/x", ""),
    ],
)
def test_what_must_agree_around_the_processes(monkeypatch, name, value, message):
    first = {"host": "h", **startup.surroundings()}
    assert first["version of jax"] == jax.__version__
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        second = {"host": "i", **startup.surroundings()}
    difference = startup._difference([first, second])
    assert re.search(message, difference) if message else not difference


def test_a_process_without_the_plugin_of_the_others_is_named(monkeypatch):
    """It would go on with its CPU, while they wait for its GPUs."""
    plugin = SimpleNamespace(name="jax-cuda12-plugin")
    version = startup.metadata.version
    first = {"host": "h", **startup.surroundings()}
    whole = startup.metadata.distributions
    monkeypatch.setattr(startup.metadata, "distributions", lambda: [*whole(), plugin])
    monkeypatch.setattr(
        startup.metadata, "version", lambda n: "0.10.2" if n == plugin.name else version(n)
    )
    difference = startup._difference([first, {"host": "i", **startup.surroundings()}])
    assert "version of jax-cuda12-plugin: process 0 (h) has none" in difference


def test_the_devices_of_one_process_add_up(monkeypatch):
    startup.self_check()
    whole = jax.make_array_from_callback
    broken = lambda shape, sharding, data: whole(  # noqa: E731
        shape, sharding, lambda index: data(index) + (index[0].start == 3)
    )
    monkeypatch.setattr(jax, "make_array_from_callback", broken)
    with pytest.raises(RuntimeError, match="add up to 37 instead of 36"):
        startup.self_check()
    other = {"host": "i", "devices of a process": "3 x NVIDIA L4, 1 x NVIDIA A10G"}
    monkeypatch.setattr(startup, "gather", lambda name, ours, deadline: [ours, other])
    with pytest.raises(Mistake, match=r"has 8 x cpu, process 1 \(i\) has 3 x NVIDIA L4, 1 x"):
        startup.self_check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "belong together; give all three or none"),
        ({"num_processes": 2, "process_id": 0}, "belong together"),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            "process_id=2 must be below distributed.num_processes=2",
        ),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "=h is not HOST:PORT"),
    ],
)
def test_distributed_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        startup.start(DistributedConfig(**given))


def test_launchers_that_are_not_recognised_are_told_what_to_type(monkeypatch):
    """With torchrun, two machines would each have trained a run of its own."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    launchers = (("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("NUM_PROCESSES", "PROCESS_ID"))
    for names in launchers:
        with monkeypatch.context() as patch:
            patch.setenv("MASTER_ADDR", "10.0.0.1")
            for name, value in zip(names, ("2", "1"), strict=True):
                patch.setenv(name, value)
            line = r"coordinator=10.0.0.1:PORT --distributed.num_processes=2 .*process_id=1"
            with pytest.raises(Mistake, match=line):
                startup.find(DistributedConfig(), 1)
            flags = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
            assert startup.find(DistributedConfig(**flags), 1).index == 1
            patch.setenv(names[0], "1")  # one process, as in many containers
            assert isinstance(startup.find(DistributedConfig(), 1), Alone)


@pytest.mark.parametrize("numbers", ["all", "0;1", "0,,1"])
def test_device_numbers_that_are_none_are_a_mistake(monkeypatch, numbers):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", numbers)
    flags = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    with pytest.raises(Mistake, match=f"JAX_LOCAL_DEVICE_IDS={numbers} is not device numbers"):
        startup.find(DistributedConfig(**flags), 1)


def test_a_tpu_of_one_host_looks_for_no_other(monkeypatch):
    """Kaggle calls that host "local"; what is wrong with a look-up is told without a traceback."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(startup, "on_tpu", lambda: True)

    def look_up(*_: object) -> None:
        raise RuntimeError("Failed to recognize coordinator address")

    monkeypatch.setattr(
        "jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params", look_up
    )
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(Mistake, match="Failed to recognize .*; is the network up.*=HOST:PORT"):
        startup.find(DistributedConfig(), 1)
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "local")
    assert isinstance(startup.find(DistributedConfig(), 1), Alone)


def test_launchers_are_recognised(monkeypatch):
    """One process does not look for others; of several, Slurm and Open MPI say who is who."""
    met, started = [], []

    def open_link(link, *_: object) -> int:
        met.append((*link.address, link.count, link.index))
        return 4321

    monkeypatch.setattr("scalegpt.processes.link.Link.open", open_link)
    monkeypatch.setattr("scalegpt.processes.group.Group._leave_on_aborts", lambda group: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: started.append(a))
    monkeypatch.setattr(jax.config, "update", lambda *a: None)
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI"))]:
        monkeypatch.delenv(name)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    startup.start(DistributedConfig())
    assert not met and not started
    with monkeypatch.context() as slurm:
        for name, value in {
            "NTASKS": 4,
            "JOB_ID": 7,
            "STEP_NODELIST": "node[003-006]",
            "PROCID": 2,
            "LOCALID": 0,
        }.items():
            slurm.setenv(f"SLURM_{name}", str(value))
        startup.start(DistributedConfig())
    with monkeypatch.context() as ompi:
        for name, value in {
            "COMM_WORLD_SIZE": 2,
            "COMM_WORLD_RANK": 1,
            "COMM_WORLD_LOCAL_RANK": 1,
            "MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:3",
        }.items():
            ompi.setenv(f"OMPI_{name}", str(value))
        startup.start(DistributedConfig())
    assert met == [("node003", 61447, 4, 2), ("10.0.0.1", 61441, 2, 1)]
    assert started == [("node003:4321", 4, 2, [0]), ("10.0.0.1:4321", 2, 1, [1])]
