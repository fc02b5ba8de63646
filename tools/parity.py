"""This tool shows that training is the same on all backends, meshes and accumulations, in a table.

    python tools/parity.py --config configs/demo.yaml [--steps 5] [--section.key=value ...]

Every row runs the first updates of the run that the configuration describes, in float32, with the
same data, seed and dropout masks, and is compared with plain jit on one device:

loss       the largest |difference| of train/loss over the updates
norm       the largest |relative difference| of train/grad_norm; AdamW hides its scale from params
params     the largest |difference| of a parameter after the updates, neither scaled nor averaged
moved      bytes of all collectives of an update on one device, read from the compiled program
step       median time of an update but the first; all rows share this machine, so it is noisy

A row FAILs when loss, norm or params exceeds the tolerance (1e-5), and the exit code is 1. AdamW
divides a gradient by its own size, so a parameter whose gradient is mere rounding moves by up to
the learning rate: without a warm-up, or for many --steps, see which parameter the verdict names.
"""
# ruff: noqa: E402

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # JAX reads it on import; a TPU or GPU does not

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hlo_traffic import collectives, table

from scalegpt.config import Config, command_line
from scalegpt.data.datasets import open_datasets
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.run.feed import batches_from
from scalegpt.step import build_for_training, sharding

DEVICES, DIVISOR = 8, 8 * 4  # the most devices of a row, times the most accumulation
FLAGS = {
    "--steps": {"type": int, "default": 5, "help": "updates to compare (default 5)"},
    "--tolerance": {"type": float, "default": 1e-5, "help": "largest difference (default 1e-5)"},
    "--json": {"action": "store_true", "help": "print one JSON object"},
    "--worker": {"help": argparse.SUPPRESS},  # a process of several, started by this tool
}


@dataclass(frozen=True)
class Row:
    """A row is one way to distribute the run: mesh, accumulation, backend, processes."""

    name: str
    mesh: dict[str, int]
    accumulation: int = 1
    backend: str = "jit"
    processes: int = 1

    def config(self, config: Config) -> Config:
        """Return the run's config with this row's mesh, accumulation and backend."""
        sizes = dict(replica=1, data=1, fsdp=1, tensor=1) | self.mesh
        shards = prod(sizes[axis] for axis in sharding.ROWS)
        microbatch = config.batch.sequences // shards // self.accumulation
        batch, run = {"microbatch": microbatch}, {"backend": self.backend}
        return changed(config, mesh=sizes, batch=batch, run=run)


ROWS = [
    Row("jit, 1 device", {}),
    Row("data 8", {"data": 8}),
    Row("data 8, accumulation 2", {"data": 8}, 2),
    Row("data 8, accumulation 4", {"data": 8}, 4),
    Row("fsdp 8", {"fsdp": 8}),
    Row("data 2 x fsdp 2 x tensor 2", {"data": 2, "fsdp": 2, "tensor": 2}),
    Row("replica 2 x data 4", {"replica": 2, "data": 4}),
    Row("pmap 8", {"data": 8}, backend="pmap"),
    Row("pmap 8, accumulation 4", {"data": 8}, 4, backend="pmap"),
    Row("data 8, two processes", {"data": 8}, processes=2),
    Row("pmap 8, two processes", {"data": 8}, backend="pmap", processes=2),
]
WIDTH = max(len(row.name) for row in ROWS)


@dataclass
class Result:
    losses: list[float]  # of each update
    norms: list[float]
    params: dict[str, np.ndarray]  # after the last
    seconds: float  # of an update
    moved: int | None  # bytes


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/parity.py", FLAGS)
    for name, lowest in (("steps", 1), ("tolerance", 0)):
        if not lowest <= (value := getattr(flags, name)) < float("inf"):
            raise Mistake(f"--{name}={value} must be at least {lowest}, and finite")
    if flags.worker:
        return work(config, Path(flags.worker), flags.steps)
    datasets = open_datasets(config)
    given, devices = config, choose_devices()
    config = config.with_vocab(max(d.vocab_size for d in datasets))
    sequences = -(-config.batch.sequences // DIVISOR) * DIVISOR
    config = changed(
        config, batch={"sequences": sequences, "growth": {}}, model={"dtype": "float32"}
    )
    if not flags.json:
        print(header(given, config, devices, flags))
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        settings(Path(folder))
        rows = compare(config, datasets, devices, flags, Path(folder))
    count = Counter(row["verdict"] for row in rows)
    if flags.json:
        print(json.dumps({"ok": not count["FAIL"], "tolerance": flags.tolerance, "rows": rows}))
    else:
        print(f"{count['ok']} rows agree, {count['FAIL']} FAIL, {count['skipped']} skipped")
    return 1 if count["FAIL"] else 0


def compare(
    config: Config, datasets: list[Dataset], devices: list[Any], flags: Any, folder: Path
) -> list[dict[str, Any]]:
    """Run every row, and print its name when it begins and its result when it ends."""
    reference, moved, rows = None, {}, []
    for row in ROWS:
        say = partial(print, end="", flush=True, file=sys.stderr if flags.json else sys.stdout)
        say(f"{row.name:{WIDTH}}  ")
        report, row_config = dict(vars(row)), row.config(config)
        if reason := obstacle(row, row_config, devices):
            report |= {"verdict": "skipped", "reason": reason}
        else:
            try:
                if row.processes > 1:
                    result = in_processes(row, row_config, flags.steps, folder)
                else:
                    row_devices = devices[: prod(row.mesh.values())]
                    result = updates(row_config, datasets, row_devices, flags.steps)
            except Exception as error:  # the other rows can still be compared
                if reference is None:
                    raise
                report |= {"verdict": "FAIL", "reason": str(error)}
            else:
                # Several processes run the program of one, and cannot read the bytes off it.
                program = (row.backend, str(row.mesh), row.accumulation)
                result.moved = moved.setdefault(program, result.moved)
                reference = reference or result
                report |= difference(result, reference, flags.tolerance)
        say(f"{line(report)}\n")
        rows.append(report)
    return rows


def obstacle(row: Row, config: Config, devices: list[Any]) -> str | None:
    """Return why a row cannot run with this model or on this machine; None if it can."""
    if row.processes > 1 and devices[0].platform != "cpu":
        return f"this process holds all {len(devices)} {devices[0].platform} devices"
    try:
        mesh = sharding.make_mesh(config.mesh, devices[: prod(row.mesh.values())])
        sharding.check_divisible(config.model, mesh)
    except ValueError as error:
        return str(error)
    return None


def updates(config: Config, datasets: list[Dataset], devices: list[Any], count: int) -> Result:
    """Make the first `count` updates of a run on these devices."""
    steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
    moved = None
    if jax.process_count() == 1:
        program = steps.lower().compile().as_text()
        moved = sum(table(collectives(program, steps.mesh)).values())
    state, rows, seconds = steps.init(), [], []
    for batch in islice(batches_from(config, datasets, steps, 0), count):
        began = time.perf_counter()
        state, metrics = steps.train(state, batch)
        rows.append({k: float(v) for k, v in metrics.items() if k.startswith("train/")})
        seconds.append(time.perf_counter() - began)
    losses, norms = ([row[key] for row in rows] for key in ("train/loss", "train/grad_norm"))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    params = {name(path): np.asarray(x) for path, x in leaves}
    return Result(losses, norms, params, statistics.median(seconds[1:] or seconds), moved)


def difference(result: Result, reference: Result, tolerance: float) -> dict[str, Any]:
    """Return the largest differences of a row's result from the reference's, and the verdict."""
    gaps = {k: np.abs(x - reference.params[k]).max() for k, x in result.params.items()}
    norms = np.divide(result.norms, reference.norms)
    report = {
        "loss_difference": float(np.abs(np.subtract(result.losses, reference.losses)).max()),
        "norm_difference": float(np.abs(norms - 1).max()),
        "parameter_difference": float(max(gaps.values())),
        "bytes_moved": result.moved,
        "step_seconds": result.seconds,
        "verdict": "ok",
    }
    values = {"loss": report["loss_difference"], "norm": report["norm_difference"], **gaps}
    # "not <=", so that a NaN fails too.
    if failed := [name for name, value in values.items() if not value <= tolerance]:
        report |= {"verdict": "FAIL", "reason": ", ".join(failed[:3])}
    return report


def in_processes(row: Row, config: Config, count: int, folder: Path) -> Result:
    """Run a row in several processes, each with a part of the devices."""
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable,
        __file__,
        f"--worker={folder}",
        f"--config={folder}/config.yaml",
        f"--steps={count}",
        f"--distributed.coordinator={address}",
        f"--distributed.num_processes={row.processes}",
    ]
    per_process = str(prod(row.mesh.values()) // row.processes)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": per_process}
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = [
        start([*command, f"--distributed.process_id={i}"], env=environment)
        for i in range(row.processes)
    ]
    try:
        outputs = [worker.communicate()[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"the processes of {row.name} failed:\n" + "\n".join(outputs))
    result = Result(**json.loads((folder / "result.json").read_text()))
    result.params = dict(np.load(folder / "params.npz"))
    return result


def work(config: Config, folder: Path, count: int) -> int:
    """Make the updates as one process of several; the first writes the result to `folder`."""
    with startup.start(config.distributed) as group:
        result = updates(config, open_datasets(config), jax.devices(), count)
        if group.index == 0:
            (folder / "result.json").write_text(json.dumps({**vars(result), "params": {}}))
            np.savez(folder / "params.npz", **result.params)
        return group.farewell(0)


def choose_devices() -> list[Any]:
    """Return eight real devices, or else eight simulated on the CPU. Raises Mistake."""
    devices = sharding.all_devices()
    devices = devices if len(devices) >= DEVICES else jax.devices("cpu")
    if (count := len(devices)) < DEVICES:
        raise Mistake(f"{count} devices, parity needs {DEVICES}: unset JAX_NUM_CPU_DEVICES")
    return devices[:DEVICES]


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """Return the config with some keys of some sections replaced."""
    parts = {name: getattr(config, name).model_copy(update=u) for name, u in sections.items()}
    return config.model_copy(update=parts)


def settings(folder: Path) -> None:
    """Set JAX's configuration for this process and those that it starts."""
    # Without "highest" a TPU multiplies float32 in bfloat16; without the cache a row's program is
    # compiled twice.
    keys = {
        "jax_default_matmul_precision": "highest",
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    for key, value in keys.items():
        jax.config.update(key, value)
        os.environ[key.upper()] = str(value)


def header(given: Config, config: Config, devices: list[Any], flags: Any) -> str:
    old, new, real = given.batch.sequences, config.batch.sequences, jax.default_backend()
    notes = {
        f"batch.sequences raised from {old} to {new}: 8 devices x accumulation 4": old != new,
        "model.dtype is float32 here, not bfloat16": given.model.dtype == "bfloat16",
        f"fewer than 8 {real} devices: 8 simulated on the CPU": devices[0].platform != real,
    }
    title = (
        f"{flags.steps} updates of {new} x {config.model.block_size} tokens in float32 on "
        f"{len(devices)} x {devices[0].device_kind}; tolerance {flags.tolerance:g}"
    )
    columns = f"{'':{WIDTH}}     loss     norm   params       moved      step  verdict"
    return "\n".join([title, *(note for note, holds in notes.items() if holds), columns])


def line(report: dict[str, Any]) -> str:
    verdict = ": ".join(report[key] for key in ("verdict", "reason") if key in report)
    if "loss_difference" not in report:
        return verdict
    moved = "-" if (n := report["bytes_moved"]) is None else f"{n / 1e6:,.1f}"
    return (
        f"{report['loss_difference']:7.1e}  {report['norm_difference']:7.1e}  "
        f"{report['parameter_difference']:7.1e}  {moved:>7} MB  "
        f"{report['step_seconds'] * 1e3:5,.0f} ms  {verdict}"
    )


if __name__ == "__main__":
    run_command(main)
