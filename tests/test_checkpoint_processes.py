"""Two processes that save together come to the same answer, whichever of them has the trouble."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, time
import jax
index, address, out_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, index)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from scalegpt.step import health
from scalegpt.checkpoints import manifest
from scalegpt.checkpoints import writing
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.step.update import State
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, P("x"))

def state(at):
    whole = np.arange(16, dtype=np.float32).reshape(4, 4) * at
    array = jax.make_array_from_callback((4, 4), split, lambda i: whole[i])
    common = lambda x: jax.make_array_from_callback(
        np.shape(x), NamedSharding(mesh, P()), lambda i: np.asarray(x)[i])
    return State(common(np.int32(at)), {"w": array}, {"mu": array},
                 jax.tree.map(common, health.initial()))

def holds(restored, at):
    parts = [(s.data, a.data) for s, a in zip(restored.params["w"].addressable_shards,
                                              state(at).params["w"].addressable_shards)]
    return all(np.array_equal(a, b) for a, b in parts) and int(restored.step) == at

said, seen = [], {}
def saved(at, checkpoints):
    stall = checkpoints.save(state(at), at, {}, None)
    began = time.monotonic()
    failure = checkpoints.wait()
    assert stall < 10 and time.monotonic() - began < 10
    return failure.reason if failure else None

checkpoints = Checkpoints(out_dir, keep=9, deadline=60, say=said.append)
seen["start"] = checkpoints.continue_from()
seen["first"] = saved(1, checkpoints)
copy = writing.Save._copy
def broken(*arguments):
    raise OSError(28, "No space left on device")
for name, process in (("copy on 1", 1), ("copy on 0", 0)):
    writing.Save._copy = broken if index == process else copy
    seen[name] = saved(2, checkpoints)
writing.Save._copy = copy
for name, process in (("hash on 1", 1), ("hash on 0", 0)):
    checksums = manifest.checksums
    manifest.checksums = broken if index == process else checksums
    seen[name] = saved(2, checkpoints)
    manifest.checksums = checksums
seen["again"] = saved(2, checkpoints)
seen["restored"] = holds(checkpoints.restore(2, state(0)), 2)
if index == 0:
    files = [p for p in __import__("pathlib").Path(out_dir, "checkpoints", "2").rglob("*")
             if p.is_file() and "/d/" in str(p)]
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
from scalegpt.processes.agreement import Deadline, from_first
from_first("flipped", 1, Deadline(30))
checkpoints = Checkpoints(out_dir, keep=9, deadline=60, say=said.append)
seen["damaged"] = checkpoints.continue_from()
seen["said"] = said
began = time.monotonic()
try:  # the other one never comes
    if index == 0:
        from scalegpt.processes.agreement import gather
        gather("alone", 1, Deadline(0.5))
except TimeoutError as error:
    assert time.monotonic() - began < 5 and "process 1 did not answer within 0.5 s" in str(error)
    seen["alone"] = True
# What a process leaves out in one occasion does not shift the collectives of the next.
from scalegpt.processes import agreement
for number in (1, 2):
    trial = agreement.occasion("trial")
    if index == number - 1:
        agreement._write(agreement._next_key(f"{trial}/left out"), number)
seen["in step"] = agreement.gather(f"{agreement.occasion('trial')}/sum", 1, Deadline(30))
seen["kept of save 1"] = len(agreement._store().key_value_dir_get("scalegpt/save/1"))
seen["kept of save 2"] = len(agreement._store().key_value_dir_get("scalegpt/save/2")) > 0
print("RESULT" + json.dumps(seen), flush=True)
from_first("end", 1, Deadline(30))
"""


@pytest.mark.slow
def test_a_failure_on_one_counts_for_both_and_damage_is_found_by_both(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), address, str(tmp_path / "run")],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    seen = [json.loads(out[out.index("RESULT") + 6 :].splitlines()[0]) for out, _ in outputs]
    assert seen[0].pop("alone")
    assert seen[0] == seen[1]
    full = "No space left on device"
    said = seen[0].pop("said")
    assert seen[0] == {
        "start": None,
        "first": None,
        "copy on 1": full,
        "copy on 0": full,
        "hash on 1": full,
        "hash on 0": full,
        "again": None,
        "restored": True,
        "damaged": 1,
        "in step": [1, 1],
        "kept of save 1": 0,  # a save that went well is forgotten
        "kept of save 2": True,
    }
    assert len(said) == 3 and full in said[0] and "saving works again" in said[1]
    assert "its bytes were altered" in said[2]
