"""Draw the curves of one or several runs, and where their time went, into one figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scalegpt.run.history import History, Row
from scalegpt.run.ledger import TIMES

# Title of a panel -> (its horizontal axis, the keys of metrics.jsonl).
LOSSES = {
    "loss over training tokens": ("tokens", ("train/loss", "val/loss")),
    "loss over training FLOPs": ("flops", ("train/loss", "val/loss")),
    "loss over {unit} of updates": ("seconds", ("train/loss", "val/loss")),
}
OTHERS = {
    "learning rate": ("tokens", ("train/lr",)),
    "gradient norm": ("tokens", ("train/grad_norm",)),
    "tokens a second": ("tokens", ("perf/tokens_per_second",)),
    "MFU": ("tokens", ("perf/mfu",)),
}
UNITS = ((1, "seconds"), (60, "minutes"), (3600, "hours"))
MOST_POINTS = 1000  # of a curve; where a run has more rows, neighbours are averaged
EARLY = 0.03  # the first losses are all high, and would leave no room for the differences


def draw(histories: Sequence[History]) -> Any:
    """Return a matplotlib figure of the runs, a colour each.

    Above, training (thin) and validation loss over tokens, FLOPs and time; below, learning rate,
    gradient norm, speed and, where a run knows it, MFU; and a bar of each run's time.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    others = {
        title: panel
        for title, panel in OTHERS.items()
        if any(len(run.curve(panel[1][0])[0]) for run in histories)
    }
    times = [ledger_of(run) for run in histories]
    rows = [list(LOSSES), list(others), ["ledger"] if any(times) else []]
    heights = [3.6, 3.0, 0.9 + 0.3 * len(histories)]
    # The panels of a row share its width, whatever their number: 12 columns are 1, 2, 3 or 4.
    grid = [[name for name in row for _ in range(12 // len(row))] for row in rows if row]
    heights = [height for height, row in zip(heights, rows, strict=True) if row]
    figure = Figure(figsize=(12, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplot_mosaic(grid, height_ratios=heights)
    longest = max((seconds[-1] for run in histories if len(seconds := _seconds(run))), default=0.0)
    scale, unit = next(x for x in UNITS if longest <= x[0] * 120 or x is UNITS[-1])
    for title, (axis, keys) in {**LOSSES, **others}.items():
        panel = panels[title]
        for i, run in enumerate(histories):
            for key in keys:
                steps, values = run.curve(key)
                x, y = thinned(run.cost(axis, steps), values)
                style = {"marker": "."} if key == "val/loss" else {"linewidth": 0.7, "alpha": 0.6}
                panel.plot(x / scale if axis == "seconds" else x, y, color=f"C{i % 10}", **style)
        panel.set_title(title.format(unit=unit), fontsize=10)
        panel.grid(alpha=0.3)
        if axis != "seconds":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if title in LOSSES and (limits := loss_limits(histories)):
            panel.set_ylim(*limits)
        if title == "gradient norm":
            panel.set_yscale("log")
        if title == "tokens a second":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
    first = panels[next(iter(LOSSES))]
    first.set_ylabel("nats a token\n(dots: validation, thin: training)")
    lines = [
        first.plot([], [], color=f"C{i % 10}", label=run.name)[0] for i, run in enumerate(histories)
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=3)
    if any(times):
        _draw_ledger(panels["ledger"], [run.name for run in histories], times)
    return figure


def _seconds(run: History) -> np.ndarray:
    return run.cost("seconds", run.curve("train/loss")[0])


def _draw_ledger(panel: Any, names: Sequence[str], times: Sequence[dict[str, float]]) -> None:
    """Draw a bar for each run, the parts of its time side by side."""
    totals = [sum(time.values()) for time in times]
    scale, unit = next(x for x in UNITS if max(totals) <= x[0] * 120 or x is UNITS[-1])
    left = np.zeros(len(times))
    for i, name in enumerate(TIMES):
        width = np.array([time.get(name, 0.0) for time in times]) / scale
        if width.any():
            panel.barh(range(len(times)), width, 0.7, left, label=name, color=f"C{i}")
        left += width
    panel.set_yticks(range(len(times)), names)
    panel.invert_yaxis()
    panel.set_title(f"{unit} of the whole run, by what they were spent on", fontsize=10)
    panel.legend(ncols=len(TIMES), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))


def ledger_of(run: History) -> dict[str, float]:
    """Return the seconds of the run by ledger.TIMES, as its last row has them; {} without one."""
    rows = [row for row in run.rows if "time/step" in row]
    return {name: rows[-1].get(f"time/{name}") or 0.0 for name in TIMES} if rows else {}


def loss_limits(histories: Sequence[History]) -> tuple[float, float] | None:
    """Return the axis of losses, from the lowest to the highest after the first part of training.

    That part is EARLY of the tokens of the longest run; of a shorter run the last loss counts.
    Returns None where no run has a finite loss.
    """
    curves = []
    for run in histories:
        for key in ("train/loss", "val/loss"):
            steps, values = run.curve(key)
            finite = np.isfinite(values)
            if finite.any():
                curves.append((run.cost("tokens", steps[finite]), values[finite]))
    if not curves:
        return None
    early = EARLY * max(tokens[-1] for tokens, _ in curves)
    highest = max(
        values[(tokens >= early) | (tokens == tokens[-1])].max() for tokens, values in curves
    )
    lowest = min(values.min() for _, values in curves)
    room = 0.05 * (highest - lowest)
    return (lowest - room, highest + room) if room else None


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours of a curve [N] so that at most MOST_POINTS remain."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*parts, len(x)])
    return np.add.reduceat(x, parts) / counts, np.add.reduceat(y, parts) / counts


def text_plot(rows: Sequence[Row]) -> str:
    """Return a small plot of the losses over updates for a terminal, "" where there are too few."""
    from uniplot import plot_to_string

    lines = {"training": "train/loss", "validation": "val/loss"}
    points = [
        [(r["step"], r[key]) for r in rows if r.get(key) is not None] for key in lines.values()
    ]
    if min(map(len, points)) < 3:
        return ""
    x, y = zip(*(np.array(p, float).T for p in points), strict=True)
    # As in the figure, the first losses are left out: they are far above all others.
    late = [losses[steps >= EARLY * steps[-1]] for steps, losses in zip(x, y, strict=True)]
    return "\n".join(
        [
            "loss over updates",
            plot_to_string(
                list(y),
                list(x),
                lines=[False, True],
                width=60,
                height=12,
                y_max=max(losses.max() for losses in late),
                legend_labels=list(lines),
                color=True,
            ),
        ]
    )
