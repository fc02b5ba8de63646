"""A history is what a run has left in its folder so far: config, metrics, checkpoints, samples.

A run that is going on, was interrupted or lies in a bucket is read like a finished one, and nothing
is written. Its curves are arrays [N] over the rows of metrics.jsonl that have a key.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scalegpt.checkpoints import manifest
from scalegpt.config import Config, loading
from scalegpt.errors import Mistake
from scalegpt.files import json_files
from scalegpt.files.folder import Folder, open_folder
from scalegpt.files.run_folder import FOLDER, SAMPLES, first_line
from scalegpt.model import flops

DONE = "done"
AXES = ("tokens", "flops", "seconds")  # what training costs
Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """What the run in folder `name` has left. checkpoints: step -> manifest, or what is damaged."""

    name: str
    config: Config
    rows: list[Row]
    samples: list[Row]
    checkpoints: dict[int, manifest.Manifest | str]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps [N], ascending, and the values [N] of a key; not finite is NaN."""
        if key not in self._curves:
            values = {row["step"]: row[key] for row in self.rows if key in row}
            steps = sorted(values)
            found = [values[step] for step in steps]  # None becomes NaN
            self._curves[key] = np.array(steps, float), np.array(found, float)
        return self._curves[key][0].copy(), self._curves[key][1].copy()

    @cached_property
    def _curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Curves that were asked for, as a figure does for each of its axes."""
        return {}

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest val_loss; None before there is one."""
        whole = {step: m for step, m in self.checkpoints.items() if not isinstance(m, str)}
        losses = {step: m["val_loss"] for step, m in whole.items() if m["val_loss"] is not None}
        return manifest.best(losses) if losses else None

    def cost(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Return what training up to each of `steps` [N] has cost, by one of AXES.

        flops: those of training by the formula of `model.flops`. seconds: of updates alone, as in
        `training_seconds`; NaN where no update was timed.
        """
        if axis == "seconds":
            seconds = training_seconds(self.rows, steps.tolist())
            return np.full(len(steps), np.nan) if seconds is None else np.array(seconds)
        known, tokens = self.curve("train/tokens")
        tokens = np.interp(steps, [0, *known], [0, *tokens])
        return tokens * (1 if axis == "tokens" else flops.flops_per_token(self.config.model))


def comparable(histories: Sequence[History]) -> list[list[History]]:
    """Group runs whose losses compare: on the same tokens, in windows of one number and length.

    The tokens are known by their fingerprint, or by data.path where a run has no checkpoint yet.
    """
    checkpoints = [[m for m in r.checkpoints.values() if not isinstance(m, str)] for r in histories]
    groups: dict[str, list[History]] = {}
    for run, whole in zip(histories, checkpoints, strict=True):
        data = {path: path for path in run.config.data.weights}
        if all(checkpoints):
            data = whole[-1]["meta"].get("data", data)
        meta = {"config": run.config.model_dump(), "data": data}
        groups.setdefault(manifest.measure(meta), []).append(run)
    return list(groups.values())


def read_history(name: str) -> History:
    """Read the run in folder or bucket `name`. Raises Mistake where there is none."""
    folder = open_folder(name)
    try:
        if not folder.has("config.yaml"):
            raise Mistake(
                f"{name} is not the folder of a run: it has no config.yaml; "
                "give the run.out_dir of a training run"
            )
        text = folder.read("config.yaml").decode(errors="replace")
        checkpoints = manifest.steps(folder / FOLDER)
    except Mistake:
        raise
    except Exception as error:  # each file system has its own
        raise Mistake(f"cannot read {name}: {first_line(error)}") from error
    source = f"{name}/config.yaml"
    config = loading.validate(loading.sections(text, source), source)
    return History(name, config, read_rows(folder), read_rows(folder, SAMPLES), checkpoints)


def read_rows(folder: Folder, name: str = "metrics.jsonl") -> list[Row]:
    """Return the rows of a run's metrics, [] where it has none yet.

    Raises Mistake for a row that no run writes: null stands for a number that is not finite.
    """
    if not folder.has(name):
        return []
    try:
        data = io.BytesIO(folder.read(name))
    except OSError as error:
        raise Mistake(f"cannot read {folder}/{name}: {error.strerror}; move it away") from None
    rows = json_files.complete_rows(io.TextIOWrapper(data, "utf-8", "replace"))
    for row in rows:
        bad = [key for key, value in row.items() if "/" in key and not _is_number(value)]
        if name == SAMPLES and type(row.get("text")) is not str:
            bad.append("text")
        if type(row["step"]) is not int or bad:
            key = bad[0] if bad else "step"
            kind = "text" if key == "text" else "number"
            raise Mistake(
                f"{folder}/{name}: {key}={row.get(key)!r} at step {row['step']} is no {kind} that "
                "a run writes; mend that line, or move the folder away"
            )
    return rows


def _is_number(value: Any) -> bool:
    """Return whether a value is None or a number that a run may write: a perplexity is <= e^700.

    Sums of larger ones, as of matplotlib, overflow; math.isfinite raises for huge integers.
    """
    return value is None or type(value) in (int, float) and abs(value) <= 1e305


def state(rows: list[Row], steps: int) -> str:
    """Return DONE, "not finite at step 7" where the run gave up, or "step 7 of 12"."""
    keys = ("train/loss", "val/loss", "val/reward")
    last = {key: row for row in rows for key in keys if key in row}
    for key in keys[1:]:
        if last.get(key, {}).get(key) is not None and last[key]["step"] == steps:
            return DONE
    # JSON has no NaN, so null stands for it. Only last rows are read: a run that skips an update
    # that is not finite goes on, and has later rows.
    for row in last.values():
        if any(row.get(key, 0) is None for key in ("train/loss", "train/grad_norm", "val/loss")):
            return f"not finite at step {row['step']}"
    return f"step {max((row['step'] for row in last.values()), default=0)} of {steps}"


def training_seconds(rows: list[Row], steps: list[int]) -> list[float] | None:
    """Return the seconds spent in updates until each of `steps`; None where no update was timed.

    Start-up, compilation, evaluations and saves do not count. perf/step_seconds is the mean since
    the row before. The first update of each process compiles and is not timed, so it counts as much
    as its neighbours.
    """
    timed = {row["step"]: row.get("perf/step_seconds") for row in rows if "train/loss" in row}
    known = [(step, seconds) for step, seconds in sorted(timed.items()) if seconds is not None]
    if not known:
        return None
    if (last := max(timed)) > known[-1][0]:
        known.append((last, known[-1][1]))
    timed_steps, mean = np.array(known).T
    clock = np.cumsum(mean * np.diff(timed_steps, prepend=0))
    return np.interp(steps, [0, *timed_steps], [0, *clock]).round(3).tolist()
