"""A report summarises the arms of an ablation, as numbers, as a table or in Markdown.

An arm's figures are means over its finished runs, or over all runs while none has finished. How
soon an arm reaches the reference's final loss is read from the arm's mean curve.
"""

from typing import Any, NamedTuple

import numpy as np
from ablations.record import DONE, Arm, Record
from planning.isoflop_plot import short

AXES = ("tokens", "flops", "seconds")  # what it costs to reach a loss
NOT_BEGUN = "not begun"
BUSY = 0.1  # share of a machine's cores


class Mean(NamedTuple):
    """A mean is the mean curve of an arm's runs, as arrays [n] over evaluations.

    cost: by each of AXES, where seconds are NaN if no update was timed. low, high: of all runs.
    """

    cost: dict[str, np.ndarray]
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_curve(arm: Arm) -> Mean:
    """Average an arm's runs at the steps at which all of them were evaluated."""
    begun = list(arm.curves.values())
    done, evaluated = [r for r in begun if r.state == DONE], [r for r in begun if r.step]
    runs = done or evaluated or begun
    steps = sorted(set.intersection(*(set(run.step) for run in runs)))
    rows = [np.searchsorted(run.step, steps) for run in runs]  # of each run's arrays
    losses = np.array([np.array(run.val_loss)[i] for run, i in zip(runs, rows, strict=True)])
    seconds = np.array(
        [
            np.array(run.seconds)[i] if run.seconds else np.full(len(steps), np.nan)
            for run, i in zip(runs, rows, strict=True)
        ]
    )
    tokens = np.array(steps, float) * arm.tokens_per_update
    cost = {"tokens": tokens, "flops": tokens * arm.flops_per_token, "seconds": seconds.mean(0)}
    return Mean(cost, losses.mean(0), losses.min(0), losses.max(0))


def cost_to_reach(target: float, cost: np.ndarray, loss: np.ndarray) -> float | None:
    """Return the cost at which a curve first falls to `target`; None where it never does.

    cost, loss: [n], ascending in cost. Between two evaluations the loss is linear in log cost. The
    evaluation of step 0 costs nothing and does not count. A curve that has reached the target at
    its first evaluation gets that evaluation's cost, which is then an upper bound.
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
    """Summarise a record in tokens, FLOPs, seconds, nats a token and bits; None where unknown.

    reach: the cost of reaching the reference's final loss. ratio: that over the reference's own.
    """
    curves = {name: mean_curve(arm) for name, arm in record.arms.items() if arm}
    finals = {name: _finals(arm, "val_loss") for name, arm in record.arms.items() if arm}
    # Taken from the reference's mean curve: a mean summed in another order may round lower, and
    # then the reference itself would never reach it.
    target = float(curves[record.reference].loss[-1]) if finals.get(record.reference) else None
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
        own, base = reach[name], reach.get(record.reference, {})
        arms[name] = {
            "parameters": arm.parameters,
            **{axis: _last(x) for axis, x in curves[name].cost.items()},
            "val_loss": _mean(finals[name]),
            "val_loss_std": float(np.std(f, ddof=1)) if len(f := finals[name]) > 1 else None,
            "bits_per_byte": _mean(_finals(arm, "bits_per_byte")),
            "reach": own,
            "ratio": {x: own[x] / base[x] if own[x] and base.get(x) else None for x in AXES},
            "runs": states | {seed: run.state for seed, run in arm.curves.items()},
            "others_cpu": {seed: run.others_cpu for seed, run in arm.curves.items()},
        }
    return {"name": record.name, "reference": record.reference, "target": target, "arms": arms}


def _finals(arm: Arm, key: str) -> list[float]:
    """Return the last value of each finished run; [] where a finished run lacks them."""
    values = [getattr(run, key) for run in arm.curves.values() if run.state == DONE]
    return [] if None in values else [x[-1] for x in values]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


_FIGURES = "parameters,tokens,FLOPs,train s,val loss,bits/byte,x tokens,x FLOPs,x time"
HEADER = ("arm", *_FIGURES.split(","), "runs")


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for a terminal."""
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
    """Explain the columns, and say how far each run came that has begun and is not done, and which
    runs shared their machine."""
    name, target = summary["reference"], summary["target"]
    if target is None:
        lines = [f"x: no run of {name} has finished, so there is no loss to reach"]
    else:
        lines = [
            f"x: cost of reaching {name}'s final loss {target:.4f}, over {name}'s own; "
            "mean ± standard deviation over runs"
        ]
    arms = summary["arms"].items()
    lines += [
        f"{arm}, seed {seed}: {state}"
        for arm, values in arms
        for seed, state in values["runs"].items()
        if state not in (DONE, NOT_BEGUN)
    ]
    return lines + [
        f"{arm}, seed {seed}: its seconds are of a busy machine: others used {share:.0%} of it"
        for arm, values in arms
        for seed, share in values.get("others_cpu", {}).items()
        if share is not None and share > BUSY
    ]
