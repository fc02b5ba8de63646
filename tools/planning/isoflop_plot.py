"""tools/sizing.py draws the predicted loss over model size at one budget of FLOPs."""

from typing import Any

import numpy as np
from planning.scaling_laws import LAWS

COLOURS = {"Chinchilla": "tab:blue", "Epoch": "tab:orange"}
NAMES = {"Chinchilla": "Chinchilla's fit", "Epoch": "Epoch's fit of the same data"}
REACH = 30  # the size axis goes from optimum / REACH to optimum * REACH


def draw(scaling: dict[str, Any], file: str) -> None:
    """Draw the `scaling` part of sizing's report to a file, without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budget, own, run = scaling["budget"], scaling["run_6ND"], scaling["models"]["this run"]
    optima = {name: scaling["models"][name] for name in LAWS}
    low = min(run["parameters"], *(o["parameters"] / REACH for o in optima.values())) / 1.3
    high = max(run["parameters"], *(o["parameters"] * REACH for o in optima.values())) * 1.3
    sizes = [low * (high / low) ** (i / 400) for i in range(401)]

    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, law in LAWS.items():
        best, colour = optima[name], COLOURS[name]
        label = (
            f"{NAMES[name]}: optimum {short(best['parameters'])} parameters, "
            f"{short(best['tokens'])} tokens, loss {best['loss'][name]:.2f}"
        )
        losses = [law.loss(n, budget / 6 / n) for n in sizes]
        axes.plot(sizes, losses, color=colour, label=label)
        if budget != own:
            losses = [law.loss(n, own / 6 / n) for n in sizes]
            axes.plot(sizes, losses, color=colour, linestyle="--", linewidth=0.8)
        axes.plot(best["parameters"], best["loss"][name], "o", color=colour, markersize=8)
        star = {"marker": "*", "markeredgecolor": "black", "linestyle": ""}
        axes.plot(run["parameters"], run["loss"][name], color=colour, markersize=11, **star)
    label = (
        f"this run: {short(run['parameters'])} parameters, {short(run['tokens'])} tokens, "
        f"{own:.3g} FLOPs" + " (dashed)" * (budget != own)
    )
    axes.plot([], [], color="white", markersize=11, label=label, **star)

    marked = [m["loss"][name] for m in (*optima.values(), run) for name in LAWS]
    room = 0.15 * (max(marked) - min(marked)) + 0.1
    axes.set(xscale="log", xlim=(low, high), ylim=(min(marked) - room, max(marked) + 6 * room))
    axes.set_title(f"Loss that {budget:.3g} FLOPs of training buy, by model size")
    axes.set_xlabel("parameters N")
    axes.set_ylabel("predicted loss, nats a token")
    axes.xaxis.set_major_formatter(lambda n, _: short(n))

    def swap(x: Any) -> Any:
        """Turn N into D, or D into N, at this budget; matplotlib tries 0, too."""
        return budget / 6 / np.maximum(x, 1)

    top = axes.secondary_xaxis("top", functions=(swap, swap))
    top.xaxis.set_major_formatter(lambda n, _: short(n))
    top.set_xlabel("tokens D = FLOPs / 6 N")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", framealpha=1)
    figure.savefig(file)


def short(x: float) -> str:
    """Write a number with three digits and a letter: 124M, 2.29B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if x >= unit:
            return f"{x / unit:.3g}{letter}" if x < 1000 * unit else f"{x / unit:,.0f}{letter}"
    return f"{x:.3g}"
