"""Account for the time of a run, over all its processes, one after the other.

`Ledger.row` returns as `time/*` the seconds spent on each of `phases.LEDGER` since the run first
began; as `time/lost` what killed processes did after the checkpoint that the next one continued
from; as `time/down` the time between processes; as `perf/goodput` the share of updates in all but
`time/down`; and as `perf/others_cpu` the share of this machine's cores that other programs have
used since this process began: seconds of a busy machine do not compare with those of another.
"""

import textwrap
import time
from typing import Any

import psutil

from scalegpt.processes.phases import LEDGER, Phases

TIMES = (*LEDGER, "lost", "down")
# What a person reads for them; "down" has words of its own.
_WORDS = {
    "startup": "starting",
    "restore": "reading checkpoints",
    "compile": "compiling",
    "data": "waiting for data",
    "rollout": "writing answers",
    "step": "updates",
    "evaluation": "evaluations",
    "save": "saving",
    "lost": "done again after a kill",
}
Row = dict[str, Any]


class Ledger:
    """A ledger adds this process's time to that of earlier processes. earlier: their rows of
    metrics.jsonl. start: the update that this process continues from, None for a new run."""

    def __init__(self, phases: Phases, earlier: list[Row], start: int | None) -> None:
        self._phases, self._earlier = phases, dict.fromkeys(TIMES, 0.0)
        self._cpu = cpu_seconds()
        ledger_rows = [row for row in earlier if {"time", "time/step"} <= row.keys()]
        if start is None or not ledger_rows:
            return
        ended = max(row.get("time", 0.0) for row in earlier)
        saved_rows = [row for row in ledger_rows if row["step"] <= start]
        last = saved_rows[-1] if saved_rows else ledger_rows[0]
        # Rows of earlier versions have no rollouts.
        seconds = {name: last.get(f"time/{name}", 0.0) for name in TIMES}
        if not saved_rows:  # the run begins anew, so that all its work was lost
            lost = sum(seconds.values()) - seconds["down"]
            seconds = dict.fromkeys(TIMES, 0.0) | {"lost": lost, "down": seconds["down"]}
        # What the killed process did after that row is repeated by this one: it counts as lost.
        seconds["lost"] += ended - last["time"]
        seconds["down"] += max(0.0, time.time() - phases.lifetime - ended)
        self._earlier = seconds

    def row(self) -> Row:
        """Return "time/NAME" for each of TIMES, and "perf/goodput", up to now."""
        spent = self._phases.seconds
        total = {name: self._earlier[name] + spent.get(name, 0.0) for name in TIMES}
        lived = sum(total.values()) - total["down"]
        row = {f"time/{name}": round(seconds, 3) for name, seconds in total.items()}
        cores, others = (now - then for now, then in zip(cpu_seconds(), self._cpu, strict=True))
        useful = total["step"] + total["rollout"]
        row["perf/others_cpu"] = round(max(0.0, others) / max(cores, 1e-9), 3)
        return {**row, "perf/goodput": round(useful / max(lived, 1e-9), 4)}

    def summary(self) -> str:
        """Return a line for the person at the terminal: the share of each, largest first."""
        row = self.row()
        down = row["time/down"]
        spent = {words: row[f"time/{name}"] for name, words in _WORDS.items()}
        lived = max(sum(spent.values()), 1e-9)
        shares = [
            f"{words} {seconds / lived:.1%}"
            for words, seconds in sorted(spent.items(), key=lambda x: -x[1])
            if seconds >= 0.001 * lived
        ]
        down = f"; and {down:.0f} s in which it did not run" if down >= 1 else ""
        line = f"time     {lived:.0f} s: {', '.join(shares)}{down}"
        return textwrap.fill(line, 79, subsequent_indent=" " * 9)


def cpu_seconds(*children: int) -> tuple[float, float]:
    """Return the seconds that this machine's cores have run or idled, and other programs' part.

    children: ids of processes that are no other programs either.
    """
    seconds = psutil.cpu_times()._asdict()
    guests = seconds.get("guest", 0.0) + seconds.get("guest_nice", 0.0)  # are in user and nice, too
    cores = sum(seconds.values()) - guests
    own = [psutil.Process(pid).cpu_times() for pid in (None, *children)]
    idle = seconds["idle"] + seconds.get("iowait", 0.0)
    return cores, cores - idle - sum(x.user + x.system for x in own)
