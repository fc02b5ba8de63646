"""What the arms of an ablation come to: one summary, and it as a table for a person or in Markdown.

Figures of an arm are means over its finished runs, or over all while none has finished. How soon it
reaches the reference arm's final loss is read off its mean curve.
"""

from typing import Any, NamedTuple

import numpy as np
from ablations.record import DONE, Arm, Record
from planning.isoflop_plot import short

AXES = ("tokens", "flops", "seconds")  # what a loss may cost
NOT_BEGUN = "not begun"


class Mean(NamedTuple):
    """Arrays [n], by evaluation; cost: AXES, seconds NaN where none were measured; low and high:
    of all runs."""

    cost: dict[str, np.ndarray]
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_curve(arm: Arm) -> Mean:
    begun = list(arm.curves.values())
    done, evaluated = [r for r in begun if r.state == DONE], [r for r in begun if r.step]
    runs = done or evaluated or begun
    steps = sorted(set.intersection(*(set(run.step) for run in runs)))
    # runs x evaluations
    at = [np.searchsorted(run.step, steps) for run in runs]
    losses = np.array([np.array(run.val_loss)[i] for run, i in zip(runs, at, strict=True)])
    seconds = np.array(
        [
            np.array(run.seconds)[i] if run.seconds else np.full(len(steps), np.nan)
            for run, i in zip(runs, at, strict=True)
        ]
    )
    tokens = np.array(steps, float) * arm.tokens_per_update
    cost = {"tokens": tokens, "flops": tokens * arm.flops_per_token, "seconds": seconds.mean(0)}
    return Mean(cost, losses.mean(0), losses.min(0), losses.max(0))


def cost_to_reach(target: float, cost: np.ndarray, loss: np.ndarray) -> float | None:
    """Where a curve first falls to `target`: linear in log cost between two evaluations.

    cost, loss: [n], ascending in cost. None where it never does; a curve that is there at its first
    evaluation (that of step 0 costs nothing, and does not count) has that one's cost: at most that.
    """
    cost, loss = cost[cost > 0], loss[cost > 0]
    reached = np.flatnonzero(loss <= target)
    if not len(reached):
        return None
    if (i := reached[0]) == 0:
        return float(cost[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(cost[i - 1] * (cost[i] / cost[i - 1]) ** share)


def summarise(record: Record) -> dict[str, Any]:
    """All figures: tokens, FLOPs, seconds, nats a token, bits; None where there is none.

    `ratio` is the cost of reaching the reference's final loss over the reference's own.
    """
    curves = {name: mean_curve(arm) for name, arm in record.arms.items() if arm}
    finals = {name: _finals(arm, "val_loss") for name, arm in record.arms.items() if arm}
    # Of the very curve that is to reach it: a mean in another order may be the least bit lower.
    done = finals.get(record.reference)
    target = float(curves[record.reference].loss[-1]) if done else None
    reach = {
        name: {
            axis: None if target is None else cost_to_reach(target, x, curve.loss)
            for axis, x in curve.cost.items()
        }
        for name, curve in curves.items()
    }
    arms = {}
    for name, arm in record.arms.items():
        states = dict.fromkeys(record.seeds, NOT_BEGUN)
        if arm is None:
            arms[name] = {"runs": states}
            continue
        own, theirs = reach[name], reach.get(record.reference, {})
        arms[name] = {
            "parameters": arm.parameters,
            **{axis: _last(x) for axis, x in curves[name].cost.items()},
            "val_loss": _mean(finals[name]),
            "val_loss_std": float(np.std(f, ddof=1)) if len(f := finals[name]) > 1 else None,
            "bits_per_byte": _mean(_finals(arm, "bits_per_byte")),
            "reach": own,
            "ratio": {x: own[x] / theirs[x] if own[x] and theirs.get(x) else None for x in AXES},
            "runs": states | {seed: run.state for seed, run in arm.curves.items()},
        }
    return {"name": record.name, "reference": record.reference, "target": target, "arms": arms}


def _finals(arm: Arm, key: str) -> list[float]:
    """The last value of each finished run; nothing where one has none."""
    values = [getattr(run, key) for run in arm.curves.values() if run.state == DONE]
    return [] if None in values else [x[-1] for x in values]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


HEADER = (
    "arm",
    "parameters",
    "tokens",
    "FLOPs",
    "train s",
    "val loss",
    "bits/byte",
    "x tokens",
    "x FLOPs",
    "x time",
    "runs",
)


def table(summary: dict[str, Any]) -> str:
    """For a person at a terminal."""
    rows = [HEADER, *_rows(summary)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{'>' if i else '<'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *notes(summary)])


def markdown(summary: dict[str, Any]) -> str:
    rule = ["---", *["---:"] * (len(HEADER) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, rule, *_rows(summary))]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(summary))]) + "\n"


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, *_cells(arm)) for name, arm in summary["arms"].items()]


def _cells(arm: dict[str, Any]) -> list[str]:
    def cell(form: str, value: float | None) -> str:
        return "-" if value is None else form.format(value)

    states = arm["runs"].values()
    runs = f"{sum(state == DONE for state in states)}/{len(states)}"
    if "parameters" not in arm:
        return ["-"] * (len(HEADER) - 2) + [runs]
    loss = cell("{:.4f}", arm["val_loss"]) + (
        "" if arm["val_loss_std"] is None else f" ± {arm['val_loss_std']:.4f}"
    )
    tokens = "-" if arm["tokens"] is None else short(arm["tokens"])
    return [
        f"{arm['parameters']:,}",
        tokens,
        cell("{:.3g}", arm["flops"]),
        cell("{:,.1f}", arm["seconds"]),
        loss,
        cell("{:.4f}", arm["bits_per_byte"]),
        *(cell("{:.3f}", arm["ratio"][axis]) for axis in AXES),
        runs,
    ]


def notes(summary: dict[str, Any]) -> list[str]:
    """What the columns mean, and how far the runs came that have begun and are not done."""
    name, target = summary["reference"], summary["target"]
    if target is None:
        found = [f"x: no run of {name} has finished, so there is no loss to reach"]
    else:
        found = [
            f"x: cost of reaching {name}'s final loss {target:.4f}, over {name}'s own; "
            "mean ± standard deviation over runs"
        ]
    return found + [
        f"{arm}, seed {seed}: {state}"
        for arm, values in summary["arms"].items()
        for seed, state in values["runs"].items()
        if state not in (DONE, NOT_BEGUN)
    ]
