"""tools/ablation.py draws validation loss over tokens, FLOPs and training time."""

import numpy as np
from ablations.record import Record
from ablations.report import AXES, Mean, mean_curve, summarise

from scalegpt.run.curves import SIZE, label_axis

LINES = ("-", "--", "-.", ":")  # ten arms differ by colour; each further ten, by style, too
EARLY = 20  # the loss axis ends at the reference's loss after 1/20 of its tokens


def draw(record: Record, file: str) -> None:
    """Draw a panel for each of AXES, with the mean of each arm's runs and their range as a band.

    A dotted line is the reference's final loss. Raises OSError.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    curves = {name: mean_curve(arm) for name, arm in record.arms.items() if arm}
    target = summarise(record)["target"]
    figure = Figure(figsize=(10, 3.6), **SIZE)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axis, panel in zip(AXES, panels, strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            shown = curve.cost[axis] > 0  # not 0, as the axis is logarithmic, nor NaN, not timed
            x, style = curve.cost[axis][shown], {"color": f"C{i % 10}"}
            panel.plot(x, curve.loss[shown], LINES[i // 10 % len(LINES)], label=name, **style)
            band = (curve.low[shown], curve.high[shown])
            panel.fill_between(x, *band, alpha=0.2, linewidth=0, **style)
        if target is not None:
            panel.axhline(target, color="black", linestyle=":", linewidth=1)
        panel.set_xscale("log")
        label_axis(panel, axis, "seconds")
        # By default an axis of a decade or less labels 2, 3, 4, ..., each as wide as "4 x 10^12".
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("validation loss, nats a token")
    if limits := loss_limits(curves, record.reference):
        panels[0].set_ylim(*limits)
    title = f"{record.name}: mean and range over runs; dotted: {record.reference}'s end"
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=5, frameon=False, title=title)
    figure.savefig(file)


def loss_limits(curves: dict[str, Mean], reference: str) -> tuple[float, float] | None:
    """Return the loss axis: from the lowest loss to one early in the reference's curve.

    The first losses are all high, and would leave no room for the differences.
    """
    if reference not in curves or not np.any(curves[reference].cost["tokens"] > 0):
        return None
    tokens, loss = curves[reference].cost["tokens"], curves[reference].loss
    early = np.searchsorted(tokens, max(tokens[-1] / EARLY, tokens[tokens > 0][0]))
    lowest = min(curve.low.min() for curve in curves.values() if len(curve.low))
    room = 0.05 * (loss[early] - lowest)
    return (lowest - room, loss[early] + room) if room > 0 else None
