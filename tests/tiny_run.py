"""A run so small that a test can make several: data, command line, rows, process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scalegpt.processes.stop_request import StopRequest
from scalegpt.run.progress import Progress

TEXT = "".join(
    f"{who}:\nSpeak, {what} number {n}, and let us {n * n % 97} times be heard!\n\n"
    for n, (who, what) in enumerate(
        (w, t) for w in ("KING", "Queen", "Fool", "Page") for t in ("sir", "maid", "duke") * 30
    )
)
STEPS, ROWS, T = 12, 16, 16


def write_data(folder: Path, text: str, alphabet: str = TEXT) -> Path:
    """A character data set, as prepare.py would write it."""
    folder.mkdir(parents=True)
    chars = "".join(sorted(set(alphabet)))
    ids = np.array([chars.index(c) for c in text], "<u2")
    cut = len(ids) * 9 // 10
    meta = {"format": 1, "tokenizer": {"kind": "char", "chars": chars}, "dtype": "uint16"}
    for split, part in (("train", ids[:cut]), ("val", ids[cut:])):
        part.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(part), "bytes": len(part)}
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": len(chars)}))
    return folder


def stop_after(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Have runs of this process asked to stop during each of these updates, none to undo it."""
    done, dispatched = [0], Progress.dispatched

    def noted(progress: Progress, step: int, values: dict) -> None:
        done.append(step)
        dispatched(progress, step, values)

    monkeypatch.setattr(Progress, "dispatched", noted)
    monkeypatch.setattr(StopRequest, "reached", lambda request: done[-1] in updates)
    monkeypatch.setattr(StopRequest, "check", lambda request: None)


def arguments(data: Path, out_dir: Path, **changes) -> list[str]:
    values = {
        "data.path": data,
        "run.out_dir": out_dir,
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.block_size": T,
        "model.dropout": 0.1,
        "model.scan_layers": "true",
        "batch.sequences": ROWS,
        "batch.microbatch": 1,
        "optim.lr": 1e-2,
        "optim.min_lr": 1e-3,
        "optim.warmup_steps": 2,
        "optim.steps": STEPS,
        "eval.every": 5,
        "eval.windows": 12,
        "checkpoint.every": 4,
        "log.every": 1,
        "log.tensorboard": "false",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


def rows(out_dir: Path, key: str = "train/loss") -> dict[int, float]:
    """Step -> value; fails on a step that is there twice."""
    text = (out_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be half written
    found = [(row["step"], row[key]) for row in map(json.loads, lines) if key in row]
    assert len(found) == len(dict(found)), "a step is there twice"
    return dict(found)


# A run whose process gets a signal while it reads the batch of an update, two or three ahead.
SIGNALLED = """
import os, signal, sys
from scalegpt import train
from scalegpt.data.batches import TrainBatches
from scalegpt.processes.command import run_command
name, at = sys.argv.pop(1).split(":")
read = TrainBatches.__getitem__
def signalled(self, step):
    if step + 1 == int(at):
        os.kill(os.getpid(), getattr(signal, name))
    return read(self, step)
TrainBatches.__getitem__ = signalled
train.sample = lambda run, params: "no sample in tests"
run_command(train.main)
"""


def run_with_signal(argv: list[str], name: str, update: int) -> tuple[int, str]:
    """The exit code and what was printed. A signal sent from outside would come at any update."""
    command = [sys.executable, "-u", "-c", SIGNALLED, f"{name}:{update}", *argv]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return done.returncode, done.stdout


def start(argv: list[str], **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "scalegpt.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_step(process: subprocess.Popen, out_dir: Path, at: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (out_dir / "metrics.jsonl").exists() and max(rows(out_dir), default=0) >= at:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"step {at} was not reached: {process.communicate()[0][-2000:]}")
