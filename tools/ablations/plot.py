"""The picture of tools/ablation.py: validation loss over tokens, FLOPs and training time."""

from pathlib import Path
from typing import Any

import numpy as np
from ablations.record import Record
from ablations.report import AXES, Mean, mean_curve, summarise

LABELS = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of updates"}
LINES = ("-", "--", "-.", ":")  # after every ten colours the next kind of line
SHOWN = 20  # the loss axis begins at what the reference has after 1/20 of its tokens


def draw(record: Record, file: str) -> None:
    """A panel for each of AXES: the mean of each arm's runs, their range as a band, the reference's
    final loss dotted. The same record makes the same PNG, byte for byte. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    curves = {name: mean_curve(arm) for name, arm in record.arms.items() if arm}
    target = summarise(record)["target"]
    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axis, panel in zip(AXES, panels, strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            shown = curve.cost[axis] > 0  # a logarithmic axis has no 0; NaN: nothing was timed
            x, style = curve.cost[axis][shown], {"color": f"C{i % 10}"}
            panel.plot(x, curve.loss[shown], LINES[i // 10 % len(LINES)], label=name, **style)
            band = (curve.low[shown], curve.high[shown])
            panel.fill_between(x, *band, alpha=0.2, linewidth=0, **style)
        if target is not None:
            panel.axhline(target, color="black", linestyle=":", linewidth=1)
        panel.set(xscale="log", xlabel=LABELS[axis])
        # Else each of 2, 3, 4, ... has a label as wide as "4 x 10^12" over a decade or less.
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss, nats a token")
    if limits := loss_limits(curves, record.reference):
        panels[0].set_ylim(*limits)
    if curves:
        panels[0].legend()
    figure.suptitle(f"{record.name}: mean and range over runs; dotted: {record.reference}'s end")
    if Path(file).suffix == ".png":
        save_small(canvas, file)
    else:
        figure.savefig(file)


def save_small(canvas: Any, file: str) -> None:
    """As a PNG of 256 colours, a quarter of its size in full: it may be kept in a repository."""
    from PIL import Image  # matplotlib needs it, too

    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # The other methods give the colour of a short line to its neighbour.
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


def loss_limits(curves: dict[str, Mean], reference: str) -> tuple[float, float] | None:
    """From the lowest loss of all to one early in the reference's curve: the first losses, all of
    them high, would leave no room for what differs."""
    if reference not in curves or not np.any(curves[reference].cost["tokens"] > 0):
        return None
    tokens, loss = curves[reference].cost["tokens"], curves[reference].loss
    early = np.searchsorted(tokens, max(tokens[-1] / SHOWN, tokens[tokens > 0][0]))
    lowest = min(curve.low.min() for curve in curves.values() if len(curve.low))
    room = 0.05 * (loss[early] - lowest)
    return (lowest - room, loss[early] + room) if room > 0 else None
