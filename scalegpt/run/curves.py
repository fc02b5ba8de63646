"""Draw the curves of one or several runs, and where their time went, into one figure."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from scalegpt.run.history import History, Row, comparable
from scalegpt.run.ledger import TIMES

# What lies on a horizontal axis, by history.AXES.
LABELS = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "{} of updates"}
LOSSES, BITS = ("train/loss", "val/loss"), ("val/bits_per_byte",)
REWARDS = ("rl/reward", "val/reward")  # of runs whose losses say nothing
OTHERS = {  # title of a panel over training tokens -> its key of metrics.jsonl
    "learning rate": "train/lr",
    "gradient norm": "train/grad_norm",
    "tokens a second": "perf/tokens_per_second",
    "MFU": "perf/mfu",
}
THIN, DOTTED = {"linewidth": 0.7, "alpha": 0.5}, {"marker": "."}  # as training, as validation
UNITS = ((1, "seconds"), (60, "minutes"), (3600, "hours"))
MOST_POINTS = 1000  # of a curve; where a run has more rows, neighbours are averaged
EARLY = 0.03  # the first losses are all high, and would leave no room for the differences
SIZE = {"dpi": 144, "layout": "constrained"}  # at 10 inches, text is as large as a README's
NOT_COMPARABLE = "these losses do not compare: text, windows, masks or tokenizers differ"


def draw(histories: Sequence[History]) -> Any:
    """Return a matplotlib figure of the runs, a colour each.

    Above, `loss_rows` over tokens, FLOPs and time; below, learning rate, gradient norm, speed and,
    where a run knows it, MFU; and a bar of each run's time.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogFormatter

    colours = {run.name: f"C{i % 10}" for i, run in enumerate(histories)}
    names = short_names(histories)
    losses = loss_rows(histories)
    others = [t for t, key in OTHERS.items() if any(len(run.curve(key)[0]) for run in histories)]
    times = [ledger_of(run) for run in histories]
    rows = [[f"{axis} {i}" for axis in LABELS] for i in range(len(losses))]
    rows += [others, ["ledger"] if any(times) else []]
    heights = [2.8] * len(losses) + [2.4, 0.8 + 0.3 * len(histories)]
    columns = 4 if max(map(len, names)) < 20 else 2  # of the legend, each of whose rows is 0.2 high
    # The panels of a row share its width, whatever their number: 12 columns are 1, 2, 3 or 4.
    grid = [[name for name in row for _ in range(12 // len(row))] for row in rows if row]
    heights = [height for height, row in zip(heights, rows, strict=True) if row]
    figure = Figure(figsize=(10, sum(heights) + 0.2 * (2 + len(names) // columns)), **SIZE)
    panels = figure.subplot_mosaic(grid, height_ratios=heights)
    longest = max((seconds[-1] for run in histories if len(seconds := _seconds(run))), default=0.0)
    scale, unit = next(x for x in UNITS if longest <= x[0] * 120 or x is UNITS[-1])

    def add(run: History, panel: Any, axis: str, key: str, style: dict[str, Any]) -> None:
        steps, values = run.curve(key)
        x, y = thinned(run.cost(axis, steps), values)
        panel.plot(x / scale if axis == "seconds" else x, y, color=colours[run.name], **style)
        label_axis(panel, axis, unit)

    for i, (label, keys, runs) in enumerate(losses):
        for axis in LABELS:
            for run in runs:
                for key in keys:
                    add(
                        run,
                        panels[f"{axis} {i}"],
                        axis,
                        key,
                        DOTTED if key.startswith("val") else THIN,
                    )
            if limits := loss_limits(runs, keys):
                panels[f"{axis} {i}"].set_ylim(*limits)
        panels[f"tokens {i}"].set_ylabel(label)
    for title in others:
        for run in histories:
            add(run, panels[title], "tokens", OTHERS[title], {"linewidth": 1, "alpha": 0.8})
        panels[title].set_title(title, fontsize=10)
        if title == "gradient norm":
            panels[title].set_yscale("log")
            # Within a decade matplotlib writes 4 x 10^-1, so wide that the layout may fail.
            panels[title].yaxis.set_minor_formatter(LogFormatter())
        if title == "tokens a second":
            panels[title].yaxis.set_major_formatter(EngFormatter(sep=""))
    lines = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)]
    styles = {"validation": DOTTED, "training": THIN}
    lines += [Line2D([], [], color="black", label=name, **styles[name]) for name in styles]
    apart = NOT_COMPARABLE if len(comparable(histories)) > 1 else None
    place = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    figure.legend(handles=lines, title=apart, **place)
    if any(times):
        _draw_ledger(panels["ledger"], names, times)
    return figure


def short_names(histories: Sequence[History]) -> list[str]:
    """Return the end of each run's name that the runs do not have in common, for a figure.

    A name may have bytes that are not UTF-8, and dollars, between which matplotlib reads formulas.
    """
    parts = [
        os.fsencode(run.name).decode(errors="replace").rstrip("/").split("/") for run in histories
    ]
    common = len(os.path.commonprefix([folders[:-1] for folders in parts]))
    return ["/".join(folders[common:])[-40:].replace("$", r"\$") for folders in parts]


def loss_rows(
    histories: Sequence[History],
) -> list[tuple[str, tuple[str, ...], Sequence[History]]]:
    """Return what each row of loss panels shows: its label, its keys and the runs that share it.

    Runs whose losses compare share a row. Others do so in bits per byte, where all know these.
    """
    rewarded = [run for run in histories if run.config.goal == "reward"]
    if rewarded:
        others = [run for run in histories if run.config.goal == "loss"]
        return (loss_rows(others) if others else []) + [("reward", REWARDS, rewarded)]
    groups = comparable(histories)
    if len(groups) > 1 and all(len(run.curve(key)[0]) for run in histories for key in BITS):
        return [("bits a byte of the run's\nown validation text", BITS, histories)]
    return [("loss, nats a token", LOSSES, runs) for runs in groups]


def label_axis(panel: Any, axis: str, unit: str) -> None:
    """Name a panel's horizontal axis, and give it a grid and short numbers."""
    from matplotlib.ticker import EngFormatter

    panel.set_xlabel(LABELS[axis].format(unit))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if axis != "seconds":
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _seconds(run: History) -> np.ndarray:
    return run.cost("seconds", run.curve("train/loss")[0])


def _draw_ledger(panel: Any, names: Sequence[str], times: Sequence[dict[str, float]]) -> None:
    """Draw a bar for each run, the parts of its time side by side."""
    from matplotlib import colormaps  # not the colours of the runs

    totals = [sum(time.values()) for time in times]
    scale, unit = next(x for x in UNITS if max(totals) <= x[0] * 120 or x is UNITS[-1])
    left = np.zeros(len(times))
    for i, name in enumerate(TIMES):
        width = np.array([time.get(name, 0.0) for time in times]) / scale
        if width.any():
            panel.barh(range(len(times)), width, 0.7, left, label=name, color=colormaps["Set3"](i))
        left += width
    if len(names) > 1:  # of a single run, the legend has it
        for i, name in enumerate(names):  # beside the bars, long ones would leave them no room
            panel.annotate(name, (0, i), (4, 0), textcoords="offset points", va="center", size=9)
    panel.set_yticks([])
    panel.set_ylim(len(times) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(f"{unit} of the whole run, by what they were spent on", fontsize=10)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 2.5}
    panel.legend(ncols=len(TIMES), fontsize=9, **place)


def ledger_of(run: History) -> dict[str, float]:
    """Return the seconds of the run by ledger.TIMES, as its last row has them; {} without one."""
    rows = [row for row in run.rows if "time/step" in row]
    return {name: rows[-1].get(f"time/{name}") or 0.0 for name in TIMES} if rows else {}


def loss_limits(
    histories: Sequence[History], keys: Sequence[str] = LOSSES
) -> tuple[float, float] | None:
    """Return the axis of these keys, from the lowest value to the highest that is not early.

    Early is the share EARLY of the tokens of the longest run; a shorter run's last value counts.
    Returns None where no run has a finite loss.
    """
    curves = []
    for run in histories:
        for key in keys:
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

    goal = "reward" if any("rl/reward" in row for row in rows) else "loss"
    keys = REWARDS if goal == "reward" else LOSSES
    lines = dict(zip(("training", "validation"), keys, strict=True))
    points = [
        [(r["step"], r[key]) for r in rows if r.get(key) is not None] for key in lines.values()
    ]
    if len(points[0]) < 3 or not points[1]:
        return ""
    x, y = zip(*(np.array(p, float).T for p in points), strict=True)
    # As in the figure, the first losses are left out: they are far above all others.
    late = [losses[steps >= EARLY * steps[-1]] for steps, losses in zip(x, y, strict=True)]
    return "\n".join(
        [
            f"{goal} over updates",
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
