"""This tool shows that training is the same on all backends, meshes and accumulations, in a table.

    python tools/parity.py --config configs/demo.yaml [--steps 5] [--section.key=value ...]

The first row, plain jit on one device, makes the first updates of the run that the configuration
describes, in float32. Every other row makes the same updates with the same data, seed and dropout
masks, and begins each from the first row's state before it: from update to update, rounding grows
as the run's own instability makes it grow, and no bound would hold for every run. Compared are:

loss       the largest difference of train/loss, relative, as rounding of a sum is
norm       the same of train/grad_norm and of the norms of each parameter's gradient
state      the largest |difference| in parameters and optimizer state, over what rounding explains
moved      bytes of all collectives of an update on one device, read from the compiled program
step       median time of an update but the first; all rows share this machine, so it is noisy

A row FAILs when loss or norm exceeds the tolerance (1e-5), or state exceeds 1, and the exit code is
1. What rounding explains of a norm is in `norm_differences`, and of the state in `rounding`.
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
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scalegpt.config import Config, command_line
from scalegpt.data.datasets import open_datasets, resolved
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.inference.preferences import log_probabilities
from scalegpt.model.parameters import parameters
from scalegpt.planning.hlo import collectives, table
from scalegpt.processes import startup
from scalegpt.processes.command import run_command
from scalegpt.run.feed import batches_from
from scalegpt.run.resume import with_model
from scalegpt.step import build_for_training, sharding
from scalegpt.step.muon import COEFFICIENTS
from scalegpt.step.objective import objective_of

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
        sizes = dict(replica=1, data=1, fsdp=1, context=1, tensor=1) | self.mesh
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
    """These are the largest differences from the first row over all updates."""

    loss: float
    norms: dict[str, float]  # train/grad_norm, and norms/NAME of each parameter's gradient
    state: dict[str, float]  # of each array, over what `rounding` explains
    seconds: float  # of an update
    moved: int | None  # bytes


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/parity.py", FLAGS)
    for name, lowest in (("steps", 1), ("tolerance", 0)):
        if not lowest <= (value := getattr(flags, name)) < float("inf"):
            raise Mistake(f"--{name}={value} must be at least {lowest}, and finite")
    if flags.worker:
        return work(config, Path(flags.worker), flags)
    if config.objective.name == "grpo":
        raise Mistake(
            "objective.name=grpo: each row would learn from answers of its own, which rounding "
            "changes; compare a run on conversations or pairs"
        )
    config = with_model(config)
    datasets = open_datasets(config)
    given, devices = config, choose_devices()
    config = resolved(config, datasets)
    divisor = DIVISOR * objective_of(config).group
    sequences = -(-config.batch.sequences // divisor) * divisor
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
    moved, rows = {}, []
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
                    result = updates(row_config, datasets, row_devices, flags, folder)
            except Exception as error:  # the other rows can still be compared
                if not rows:
                    raise
                report |= {"verdict": "FAIL", "reason": str(error)}
            else:
                # Several processes run the program of one, and cannot read the bytes off it.
                program = (row.backend, str(row.mesh), row.accumulation)
                result.moved = moved.setdefault(program, result.moved)
                report |= verdict(result, flags.tolerance)
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


def updates(
    config: Config, datasets: list[Dataset], devices: list[Any], flags: Any, folder: Path
) -> Result:
    """Make the first updates of a run on these devices, and compare each with the first row's.

    folder: where the first row, which finds none, leaves state and metrics after each update.
    """
    steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
    moved = None
    if jax.process_count() == 1:
        program = steps.lower().compile().as_text()
        moved = sum(table(collectives(program, steps.mesh)).values())
    is_first = not (folder / "0.npz").exists()
    if config.objective.name == "dpo":
        params = steps.init().params
        for dataset in datasets:
            dataset.train.reference[:] = log_probabilities(steps, params, dataset.train)
    batches = batches_from(config, datasets, steps, 0)
    before, losses, norms, states, seconds = {}, [], [], [], []
    for i in range(flags.steps + 1):
        if i == 0:
            state, metrics = steps.init(), {}
        else:
            state, batch = placed(before, steps.abstract), next(batches)
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(steps.train(state, batch))
            seconds.append(time.perf_counter() - began)
        after = arrays(state) | arrays(metrics)
        if is_first:
            np.savez(folder / f"{i}.npz", **after)
        with np.load(folder / f"{i}.npz") as file:
            expected = dict(file)
        bounds = rounding(config, before, expected, flags.tolerance)
        states.append({path: share(after[path], expected[path], b) for path, b in bounds.items()})
        if i > 0:
            losses.append(share(*(x["train/loss"] for x in (after, expected, expected))))
            norms.append(norm_differences(after, expected))
        before = expected
    return Result(
        np.max(losses).item(),
        *(
            {key: np.max([row[key] for row in rows]).item() for key in rows[0]}
            for rows in (norms, states)
        ),
        statistics.median(seconds[1:] or seconds),
        moved,
    )


def arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def placed(values: dict[str, np.ndarray], abstract: Any) -> Any:
    """Put what `arrays` returned on the devices, as a tree like `abstract`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves = [
        jax.make_array_from_callback(like.shape, like.sharding, values[name].__getitem__)
        for name, (_, like) in zip(names, paths, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def share(value: np.ndarray, expected: np.ndarray, bound: Any) -> float:
    """Return the largest |difference| over its bound."""
    gap = np.abs(value - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap == 0, 0, gap / bound).max()


def norm_differences(
    values: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return how much the gradient's norm, and each parameter's and layer's, differ relatively.

    AdamW hides a gradient's scale from the state, and the whole norm that of a small parameter.
    Rounding changes a norm in proportion to it. But where the terms of a gradient cancel, or a
    parameter hardly matters, what is left of the gradient is rounding of the signals that pass the
    layers, which are of the size of the whole gradient; so float32's step at the whole norm, 1.2e-7
    of it, is taken off a difference first. A parameter's scale of 1.001 shows if its norm is more
    than 1.2e-4 of the whole.
    """
    whole = expected["train/grad_norm"]
    found = {}
    for path in ("train/grad_norm", *(path for path in expected if path.startswith("norms/"))):
        gap = np.abs(values[path] - expected[path]) - np.finfo(np.float32).eps * whole
        found[path] = share(np.maximum(gap, 0), 0, expected[path])
    return found


def rounding(
    config: Config,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    tolerance: float,
) -> dict[str, np.ndarray]:
    """Bound how much rounding can change each array of the state in one update.

    Rounding changes an entry of a layer's gradient by up to `tolerance` of the largest entry, and
    not in proportion to itself, for it is the rest of a sum; and by its part of what rounding of
    the whole gradient leaves in the layer's norm (`norm_differences`). A mean of gradients, or of
    their squares, takes no more from one than the mean before and the mean after together.

    AdamW's step is lr m / r, with m the mean of an entry's gradients and r the root of their mean
    square. To first order it changes by 2 lr e / r, with e the change of the gradient, for m and r
    both do, and hardly by more than 2 lr, for |m| is about r at most. So where the gradient is
    large, the bound is a small part of a step; a parameter whose gradient is mere rounding may take
    any step. Muon divides by the norm of the momentum, and each of its Newton-Schulz steps
    multiplies what is small by up to 3.4445, so that mean squares of its rows change by twice that
    part. If decay is cautious, rounding may decide whether an entry decays. At last, the sum of
    parameter and step is rounded. An average of weights, or of their changes, changes by no more
    than they do; initial weights may by `tolerance` of the largest, and counts not.
    before, after: state and metrics of the first row, as `arrays` returns them. Before the first
    update `before` is empty, and the bounds are those of the initial state.
    """
    bounds = {path: 0.0 for path in after if path.startswith(("params/", "opt_state/"))}
    if not before:
        return {path: tolerance * abs(after[path]).max() for path in bounds}
    optim, epsilon = config.optim, np.finfo(np.float32).eps
    peaks = {"embeddings": optim.embedding_lr, "head": optim.head_lr, "scalars": optim.scalar_lr}
    for name, parameter in parameters(config.model, config.lora).items():
        x = after[f"params/{name}"]
        axes = tuple(range(name.startswith("h/"), x.ndim))  # of one layer
        entries = prod(x.shape[axis] for axis in axes)
        noise = epsilon * after["train/grad_norm"] / np.sqrt(entries)
        relative = tolerance * COEFFICIENTS[0] ** optim.ns_steps
        for path in bounds:
            if path.endswith((f"/mu/{name}", f"/momentum/{name}")):
                bounds[path] = tolerance * (abs(before[path]) + abs(after[path])).max() + noise
            elif path.endswith(f"/variance/{name}"):
                bounds[path] = 2 * min(1, relative) * abs(after[path]).max()
            elif path.endswith(f"/nu/{name}"):
                largest = np.sqrt((before[path] + after[path]).max())
                gap = tolerance * largest + noise
                bounds[path] = (2 * largest + gap) * gap
                root = np.sqrt(after[path] / (1 - optim.beta2 ** int(after["step"])))
                gap = tolerance * root.max(axes, keepdims=True) + noise
                relative = gap / (root + optim.eps)
        step = 2 * np.minimum(1, relative) + optim.cautious_decay * optim.weight_decay * abs(x)
        rate = after["train/lr"] * (peaks.get(parameter.kind) or optim.lr) / optim.lr
        bound = (1 + optim.lookahead) * rate * step + epsilon * abs(x)
        weights = (f"params/{name}", f"/average/{name}", f"/drift/{name}")
        bounds |= {path: bound for path in bounds if path.endswith(weights)}
    return bounds


def verdict(result: Result, tolerance: float) -> dict[str, Any]:
    """Return the largest differences of a row, and whether they are within their bounds."""
    # "not <=", so that a NaN fails too.
    failed = [] if result.loss <= tolerance else ["loss"]
    failed += [path for path, gap in result.norms.items() if not gap <= tolerance]
    failed += [path for path, part in result.state.items() if not part <= 1]
    report = {
        "loss_difference": result.loss,
        "norm_difference": np.max([*result.norms.values()]).item(),
        "state_difference": np.max([*result.state.values()]).item(),
        "bytes_moved": result.moved,
        "step_seconds": result.seconds,
        "verdict": "FAIL" if failed else "ok",
    }
    return report | ({"reason": ", ".join(failed[:3])} if failed else {})


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
    return Result(**json.loads((folder / "result.json").read_text()))


def work(config: Config, folder: Path, flags: Any) -> int:
    """Make the updates as one process of several; the first writes the result to `folder`."""
    with startup.start(config.distributed) as group:
        result = updates(config, open_datasets(config), jax.devices(), flags, folder)
        if group.index == 0:
            (folder / "result.json").write_text(json.dumps(vars(result)))
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
        f"{flags.steps} updates of {new} x {config.row_width} tokens in float32 on "
        f"{len(devices)} x {devices[0].device_kind}; tolerance {flags.tolerance:g}"
    )
    columns = f"{'':{WIDTH}}     loss     norm    state       moved      step  verdict"
    return "\n".join([title, *(note for note, holds in notes.items() if holds), columns])


def line(report: dict[str, Any]) -> str:
    verdict = ": ".join(report[key] for key in ("verdict", "reason") if key in report)
    if "loss_difference" not in report:
        return verdict
    moved = "-" if (n := report["bytes_moved"]) is None else f"{n / 1e6:,.1f}"
    return (
        f"{report['loss_difference']:7.1e}  {report['norm_difference']:7.1e}  "
        f"{report['state_difference']:7.1e}  {moved:>7} MB  "
        f"{report['step_seconds'] * 1e3:5,.0f} ms  {verdict}"
    )


if __name__ == "__main__":
    run_command(main)
