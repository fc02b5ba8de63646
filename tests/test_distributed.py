"""Two real processes on this machine give the run of one, and only the first of them writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scalegpt import distributed
from scalegpt.config import DistributedConfig

STEPS = 120
TEXT = "".join(f"{n} green bottles hanging on the wall number {n * n % 101}.\n" for n in range(400))

# Records which rows a process reads, and runs the command.
PROGRAM = """
import json, sys
from scalegpt import train
seen = []
class Recording(train.TrainBatches):
    def __init__(self, *arguments):
        seen.append(arguments[-1].tolist())
        super().__init__(*arguments)
train.TrainBatches = Recording
code = train.main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(seen))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bottles")
    chars = "".join(sorted(set(TEXT)))
    ids = np.array([chars.index(c) for c in TEXT], "<u2")
    meta = {"format": 1, "tokenizer": {"kind": "char", "chars": chars}, "dtype": "uint16"}
    for split, part in (("train", ids[:-2000]), ("val", ids[-2000:])):
        part.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(part)}
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": len(chars)}))
    return folder


def launch(data: Path, out_dir: Path, record: Path, devices: int, *extra: str) -> subprocess.Popen:
    argv = [
        *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16"),
        *("--model.dropout=0.1", "--model.scan_layers=true", "--mesh.data=2", "--mesh.fsdp=2"),
        *(
            "--batch.sequences=16",
            "--batch.microbatch=2",
            "--optim.lr=1e-2",
            f"--optim.steps={STEPS}",
        ),
        *("--optim.warmup_steps=0", "--eval.every=40", "--eval.windows=9", "--checkpoint.every=50"),
        *("--log.every=1", "--log.tensorboard=false"),
        *(f"--data.path={data}", f"--run.out_dir={out_dir}", *extra),
    ]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(data / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(record), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], seconds: float = 150) -> list[str]:
    """Outputs; no process outlives this."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def pair(data: Path, out_dir: Path, *extra: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--distributed.coordinator=localhost:{port}", "--distributed.num_processes=2"]
    return [
        launch(data, out_dir, out_dir.parent / f"rows{i}", 2, *flags,
               f"--distributed.process_id={i}", *extra)
        for i in range(2)
    ]  # fmt: skip


def wait_for_step(processes: list[subprocess.Popen], out_dir: Path, at: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if (out_dir / "metrics.jsonl").exists() and max(
            rows(out_dir, "train/loss"), default=0
        ) > at:
            return
        time.sleep(0.01)
    for process in processes:
        process.kill()
    pytest.fail(f"step {at} was not reached: {finish(processes)}")


def rows(out_dir: Path, key: str) -> dict[int, float]:
    text = (out_dir / "metrics.jsonl").read_text()
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    found = [(row["step"], row[key]) for row in lines if key in row]
    assert len(found) == len(dict(found)), "two processes have written"
    return dict(found)


def test_fault_18_two_processes_are_the_run_of_one(data, tmp_path):
    """Also when a signal to one of the two stops both, and the same commands continue."""
    alone, shared = tmp_path / "alone" / "run", tmp_path / "shared" / "run"
    for out_dir in (alone, shared):
        out_dir.parent.mkdir()
    one = launch(data, alone, alone.parent / "rows0", 4)
    output = finish([one])[0]
    assert one.returncode == 0, output
    two = pair(data, shared)
    wait_for_step(two, shared, 10)
    two[1].send_signal(signal.SIGINT)
    outputs = finish(two)
    assert [p.returncode for p in two] == [3, 3], outputs
    stopped = max(rows(shared, "train/loss"))
    assert f"stopped on request after update {stopped}" in outputs[0] and stopped < STEPS
    two = pair(data, shared)
    outputs = finish(two)
    assert [p.returncode for p in two] == [0, 0], outputs
    assert f"continuing from step {stopped}" in outputs[0]

    for key in ("train/loss", "val/loss"):
        ours, theirs = rows(shared, key), rows(alone, key)
        assert list(ours) == list(theirs) and len(ours) >= 3
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-5)
    # Only the first speaks; each reads its own half of a microbatch's rows.
    assert f"step {STEPS}/{STEPS}" in outputs[0] and "step " not in outputs[1]
    read = [json.loads((shared.parent / f"rows{i}").read_text())[0] for i in range(2)]
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert json.loads((alone.parent / "rows0").read_text()) == [[0, 1, 2, 3, 4, 5, 6, 7]]

    # One process on another mesh reads what two have written: the evaluation is theirs.
    command = [sys.executable, "-m", "scalegpt.evaluate", "--run", str(shared), "--json"]
    command += ["--checkpoint", "latest", "--windows", "9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["step"] == STEPS
    assert abs(row["val/loss"] - rows(shared, "val/loss")[STEPS]) < 1e-5


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
        distributed.start(DistributedConfig(**given))


def test_one_process_does_not_look_for_others(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("jax.distributed.initialize", lambda *a: pytest.fail("started"))
    distributed.start(DistributedConfig())
    monkeypatch.setenv("SLURM_NTASKS", "2")
    called = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a: called.append(a))
    distributed.start(DistributedConfig())
    assert called == [()]


def test_a_stop_request_is_noticed_once_and_a_second_signal_ends_the_process(capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = distributed.StopRequest()
        assert not stop.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reached(2) and stop.reached(3)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert "SIGTERM: saving after this step" in capsys.readouterr().err
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
