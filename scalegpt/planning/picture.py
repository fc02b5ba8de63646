"""Draw a plan beside others: memory by term, and time by what bounds it."""

from collections.abc import Sequence
from pathlib import Path

from scalegpt.errors import Mistake
from scalegpt.planning.plans import Plan
from scalegpt.planning.tables import GIB, layout, where

FORMATS = (".png", ".pdf", ".svg")


def check_file(file: str) -> None:
    """Raise Mistake for a file that cannot be drawn to."""
    if Path(file).suffix not in FORMATS:
        raise Mistake(f"--plot={file} must end in {', '.join(FORMATS)}")
    if not Path(file).resolve().parent.is_dir():
        raise Mistake(f"--plot={file}: there is no folder {Path(file).parent}")


def draw(plans: Sequence[Plan], file: str) -> None:
    """Draw plans for one machine to a file, the first at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.9 * len(plans)), dpi=144, layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [layout(plan).replace("; ", "\n") for plan in plans]
    _stack(memory, names, [plan.bytes for plan in plans], GIB)
    memory.axvline(plans[0].topology.memory / GIB, color="black", linestyle="--")
    memory.set(title="memory of a device", xlabel="GiB; dashed: what there is")
    _stack(time, names, [plan.seconds for plan in plans], 1)
    for name, plan in zip(names, plans, strict=True):
        if plan.step:
            least, likely, most = plan.step
            time.errorbar(
                likely, name, xerr=[[likely - least], [most - likely]], fmt="ko", capsize=4
            )
    time.set(title="time of an update", xlabel="seconds if nothing overlapped; black: expected")
    memory.invert_yaxis()
    for panel in (memory, time):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=8)
    figure.suptitle(where(plans[0]))
    figure.savefig(file)


def _stack(panel, names: list[str], rows: list[dict[str, float]], unit: float) -> None:
    terms = [term for term in rows[0] if any(row.get(term) for row in rows)]
    left = [0.0] * len(rows)
    for term in terms:
        widths = [row.get(term, 0) / unit for row in rows]
        panel.barh(names, widths, left=left, height=0.6, label=term)
        left = [a + b for a, b in zip(left, widths, strict=True)]
