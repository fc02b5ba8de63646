"""This tool shows that training is the same on all backends, meshes and accumulations, in a table.

    python tools/parity.py --config configs/demo.yaml [--steps 5] [--section.key=value ...]

Every row runs the first updates of the run that the configuration describes, in float32, with the
same data, seed and dropout masks, and is compared with plain jit on one device:

loss       the largest |difference| of train/loss, over the number of the update
norm       the same of train/grad_norm, relative; AdamW hides its scale from params
params     the largest |difference| of a parameter after the updates, over what rounding explains
moved      bytes of all collectives of an update on one device, read from the compiled program
step       median time of an update but the first; all rows share this machine, so it is noisy

A row FAILs when loss or norm exceeds the tolerance (1e-5), or params exceeds 1, and the exit code
is 1. Losses and norms are over the number of the update because each update adds rounding of its
own. What rounding explains of a parameter depends on gradients and learning rates: `rounding`.
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
from flax.traverse_util import flatten_dict
from hlo_traffic import collectives, table
from optax import ScaleByAdamState

from scalegpt.config import Config, command_line
from scalegpt.data.datasets import open_datasets, resolved
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.model.parameters import parameters
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.run.feed import batches_from
from scalegpt.step import build_for_training, sharding
from scalegpt.step.muon import COEFFICIENTS

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
    bounds: dict[str, np.ndarray]  # what `rounding` explains of a difference, over all updates
    seconds: float  # of an update
    moved: int | None  # bytes


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/parity.py", FLAGS)
    for name, lowest in (("steps", 1), ("tolerance", 0)):
        if not lowest <= (value := getattr(flags, name)) < float("inf"):
            raise Mistake(f"--{name}={value} must be at least {lowest}, and finite")
    if flags.worker:
        return work(config, Path(flags.worker), flags)
    datasets = open_datasets(config)
    given, devices = config, choose_devices()
    config = resolved(config, datasets)
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
                    result = in_processes(row, row_config, flags, folder)
                else:
                    row_devices = devices[: prod(row.mesh.values())]
                    result = updates(row_config, datasets, row_devices, flags)
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


def updates(config: Config, datasets: list[Dataset], devices: list[Any], flags: Any) -> Result:
    """Make the first updates of a run on these devices."""
    steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
    moved = None
    if jax.process_count() == 1:
        program = steps.lower().compile().as_text()
        moved = sum(table(collectives(program, steps.mesh)).values())
    state, rows, seconds = steps.init(), [], []
    bounds = {path: np.zeros(x.shape, np.float32) for path, x in arrays(state.params).items()}
    for batch in islice(batches_from(config, datasets, steps, 0), flags.steps):
        began = time.perf_counter()
        state, metrics = steps.train(state, batch)
        rows.append({k: float(v) for k, v in metrics.items() if k.startswith("train/")})
        seconds.append(time.perf_counter() - began)
        for path, bound in rounding(config, state, rows[-1]["train/lr"], flags.tolerance).items():
            bounds[path] += bound
    losses, norms = ([row[key] for row in rows] for key in ("train/loss", "train/grad_norm"))
    median = statistics.median(seconds[1:] or seconds)
    return Result(losses, norms, arrays(state.params), bounds, median, moved)


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}


def rounding(config: Config, state: Any, lr: float, tolerance: float) -> dict[str, np.ndarray]:
    """Bound how much rounding can have changed each parameter in the last update.

    Rounding changes an entry of a layer's gradient by up to `tolerance` of the largest entry, and
    not in proportion to itself, for it is the rest of a sum; e is the tolerance times the number
    of updates, as each adds its own. AdamW's step is lr m / r, with m the mean of an entry's
    gradients and r the root of their mean square. To first order it changes by 2 lr e (largest r)
    / r, for m and r both do, and hardly by more than 2 lr, for |m| is about r at most. So where the
    gradient is large, the bound is a small part of a step; a parameter whose gradient is mere
    rounding may take any step. Muon divides by the norm of the momentum, and each of its Newton-
    Schulz steps multiplies what is small by up to 3.4445. If decay is cautious, rounding may decide
    whether an entry decays. At last, the sum of parameter and step is rounded.
    state: after the update. lr: train/lr of the update.
    """
    optim, count, bounds = config.optim, int(state.step), {}
    peaks = {"embeddings": optim.embedding_lr, "head": optim.head_lr, "scalars": optim.scalar_lr}
    states = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, ScaleByAdamState))
    adams = [x for x in states if isinstance(x, ScaleByAdamState)]
    squares = {path: x for adam in adams for path, x in arrays(adam.nu).items()}
    for path, parameter in arrays(state.params).items():
        kind = parameters(config.model)[path].kind
        if path in squares:
            root = np.sqrt(squares[path] / (1 - optim.beta2**count))
            axes = tuple(range(1, root.ndim)) if path.startswith("h/") else None
            share = tolerance * count * root.max(axes, keepdims=True) / (root + optim.eps)
        else:
            share = tolerance * count * COEFFICIENTS[0] ** optim.ns_steps
        step = 2 * np.minimum(1, share) + optim.cautious_decay * optim.weight_decay * abs(parameter)
        rate = lr * (peaks.get(kind) or optim.lr) / optim.lr
        bounds[path] = rate * step + np.finfo(np.float32).eps * abs(parameter)
    return bounds


def difference(result: Result, reference: Result, tolerance: float) -> dict[str, Any]:
    """Return the largest differences of a row's result from the reference's, and the verdict."""
    shares = {}
    for path, x in result.params.items():
        gap = np.abs(x - reference.params[path])
        # The lesser bound, so that neither run excuses what the other one shows to be wrong.
        bound = np.minimum(result.bounds[path], reference.bounds[path])
        with np.errstate(divide="ignore", invalid="ignore"):
            shares[path] = float(np.where(gap == 0, 0, gap / bound).max())
    update = 1 + np.arange(len(result.norms))
    losses = np.abs(np.subtract(result.losses, reference.losses))
    norms = np.abs(np.divide(result.norms, reference.norms) - 1)
    report = {
        "loss_difference": float((losses / update).max()),
        "norm_difference": float((norms / update).max()),
        "parameter_difference": max(shares.values()),
        "bytes_moved": result.moved,
        "step_seconds": result.seconds,
        "verdict": "ok",
    }
    # "not <=", so that a NaN fails too.
    failed = [x for x in ("loss", "norm") if not report[f"{x}_difference"] <= tolerance]
    if failed := [*failed, *(path for path, share in shares.items() if not share <= 1)]:
        report |= {"verdict": "FAIL", "reason": ", ".join(failed[:3])}
    return report


def in_processes(row: Row, config: Config, flags: Any, folder: Path) -> Result:
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
        f"--steps={flags.steps}",
        f"--tolerance={flags.tolerance}",
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
    for name in ("params", "bounds"):
        setattr(result, name, dict(np.load(folder / f"{name}.npz")))
    return result


def work(config: Config, folder: Path, flags: Any) -> int:
    """Make the updates as one process of several; the first writes the result to `folder`."""
    with startup.start(config.distributed) as group:
        result = updates(config, open_datasets(config), jax.devices(), flags)
        if group.index == 0:
            numbers = {**vars(result), "params": {}, "bounds": {}}
            (folder / "result.json").write_text(json.dumps(numbers))
            np.savez(folder / "params.npz", **result.params)
            np.savez(folder / "bounds.npz", **result.bounds)
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
