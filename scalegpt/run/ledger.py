"""Where the time of a run went, over all its processes, one after the other.

`Ledger.row` gives the places of `phases.LEDGER` as `time/*`, in seconds since the run first began;
and `time/lost`, what killed processes did after the checkpoint that the next one continued from;
`time/down`, between them; and `perf/goodput`, the share of updates in all but `time/down`.
"""

import time
from typing import Any

from scalegpt.processes.phases import LEDGER, Phases

TIMES = (*LEDGER, "lost", "down")
Row = dict[str, Any]


class Ledger:
    """`earlier`: the rows that metrics.jsonl had when this process began; `start`: the update
    that it continues from, None for a new run."""

    def __init__(self, phases: Phases, earlier: list[Row], start: int | None) -> None:
        self._phases, self._before = phases, dict.fromkeys(TIMES, 0.0)
        written = [row for row in earlier if {"time", "time/step"} <= row.keys()]
        if start is None or not written:
            return
        ended = max(row.get("time", 0.0) for row in earlier)
        kept = [row for row in written if row["step"] <= start]
        last = kept[-1] if kept else written[0]
        then = {name: last[f"time/{name}"] for name in TIMES}
        if not kept:  # the run begins anew: nothing of what it did counts
            lost = sum(then.values()) - then["down"]
            then = dict.fromkeys(TIMES, 0.0) | {"lost": lost, "down": then["down"]}
        # All that was done after that row is done again, or was start-up for nothing.
        then["lost"] += ended - last["time"]
        then["down"] += max(0.0, time.time() - phases.lifetime - ended)
        self._before = then

    def row(self) -> Row:
        """Of the moment: "time/NAME" for each of TIMES, "perf/goodput"."""
        spent = self._phases.seconds
        total = {name: self._before[name] + spent.get(name, 0.0) for name in TIMES}
        lived = sum(total.values()) - total["down"]
        row = {f"time/{name}": round(seconds, 3) for name, seconds in total.items()}
        return {**row, "perf/goodput": round(total["step"] / max(lived, 1e-9), 4)}

    def summary(self) -> str:
        """A line for the person at the terminal: the share of each place, largest first."""
        row = self.row()
        down = row["time/down"]
        shares = {n: row[f"time/{n}"] for n in TIMES if n != "down"}
        lived = max(sum(shares.values()), 1e-9)
        parts = [
            f"{name} {seconds / lived:.1%}"
            for name, seconds in sorted(shares.items(), key=lambda x: -x[1])
            if seconds >= 0.001 * lived
        ]
        down = f"; and {down:.0f} s between processes" if down >= 1 else ""
        return f"time     {lived:.0f} s: {', '.join(parts)}{down}"
