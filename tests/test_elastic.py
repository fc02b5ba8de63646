"""One run that changes its machine three times: the same batches, and the same losses."""

import hashlib
import json

import numpy as np
import processes
import pytest
import tiny_run

from scalegpt.config.command_line import parse
from scalegpt.data.datasets import open_datasets, train_batches

# Notes what each step is given, over all processes, and asks to stop after a step.
PROGRAM = """
import hashlib, json, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from scalegpt import train
from scalegpt.step.build import Steps
from scalegpt.processes.stop_request import StopRequest
seen, file, last = {}, sys.argv.pop(1), int(sys.argv.pop(1))
update = Steps.train
def noted(self, state, tokens):
    rows = np.asarray(multihost_utils.process_allgather(tokens, tiled=True), "<i4")
    rows = rows.reshape(-1, rows.shape[-1])
    seen[int(state.step) + 1] = hashlib.sha256(rows.tobytes()).hexdigest()
    return update(self, state, tokens)
Steps.train = noted
StopRequest.reached = lambda self: max(seen) == last
StopRequest.check = lambda self: None
def main(argv):
    code = train.main(argv)
    if jax.process_index() == 0:
        json.dump(seen, open(file, "w"))
    return code
from scalegpt.processes.command import run_command
run_command(main)
"""
LIVES = [  # processes, devices of each, mesh, last update
    (1, 8, {"data": 8}, 4),
    (2, 2, {"data": 1, "context": 4}, 7),  # both have a part of each row
    (1, 2, {"data": 2}, 9),
    (4, 2, {"data": 2, "fsdp": 2, "tensor": 2}, tiny_run.STEPS),
]


def live(argv: list[str], folder, count: int, devices: int, mesh: dict, last: int) -> dict:
    """One life of the run; what its steps were given."""
    seen = folder / f"seen-{last}.json"
    flags = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    started = processes.start(["-c", PROGRAM, seen, last, *argv, *flags], count, devices)
    outputs = processes.finish(started)
    expected = 0 if last == tiny_run.STEPS else 3
    assert [p.returncode for p in started] == [expected] * count, outputs
    return {int(step): digest for step, digest in json.loads(seen.read_text()).items()}


@pytest.mark.slow
def test_8_4_2_8_devices_in_1_2_1_4_processes_are_one_run(plays, tmp_path):
    whole = {"model.dropout": 0}  # which context needs
    argv = tiny_run.arguments(plays, tmp_path / "run", **whole)
    seen = [live(argv, tmp_path, *life) for life in LIVES]
    assert [list(part) for part in seen] == [[1, 2, 3, 4], [5, 6, 7], [8, 9], [10, 11, 12]]
    config = parse(argv, "test", {})[0]
    batches = train_batches(config, open_datasets(config), tiny_run.ROWS, np.arange(tiny_run.ROWS))
    for step, digest in {k: v for part in seen for k, v in part.items()}.items():
        assert digest == hashlib.sha256(batches[step - 1].astype("<i4").tobytes()).hexdigest()

    alone = tiny_run.arguments(plays, tmp_path / "unbroken", **whole)
    live(alone, tmp_path, 1, 1, {"data": 1}, tiny_run.STEPS)
    for key in ("train/loss", "val/loss"):
        ours, theirs = (tiny_run.rows(tmp_path / run, key) for run in ("run", "unbroken"))
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-5)
