"""Phases: what this process is doing, how long it may take, and where its time has gone.

A phase of a run has a name, a deadline (`run.deadline_*`), a place in the time ledger and, at
start-up, a word in the line that the terminal shows. Other threads, as those of `deadlines.Watch`
and the link, read `Phases.current`, which is replaced as a whole and never changed.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from scalegpt.config import RunConfig

# Phase -> (its place in the ledger, the run.deadline_* that limits it).
PHASES = {
    "processes": ("startup", "start"),
    "devices": ("startup", "start"),
    "self-check": ("startup", "data"),
    "data": ("startup", "data"),
    "mesh": ("startup", "start"),
    "weights": ("startup", "restore"),
    "reference": ("startup", "evaluation"),
    "imports": ("startup", "start"),
    "restore": ("restore", "restore"),
    "compile": ("compile", "compile"),
    "step": ("step", "step"),
    "wait for data": ("data", "step"),
    "rollout": ("rollout", "rollout"),
    "evaluation": ("evaluation", "evaluation"),
    "sample": ("evaluation", "evaluation"),
    "save": ("save", "save"),
}
LEDGER = ("startup", "restore", "compile", "data", "rollout", "step", "evaluation", "save")


class Phase(NamedTuple):
    """What a process does now.

    since: `time.monotonic()` of its begin, or of the last sign of progress within it; deadline:
    seconds from then.
    """

    name: str
    step: int
    since: float
    deadline: float


def key_of(phase: str) -> str:
    """Return the key of the configuration that limits a phase."""
    return f"run.deadline_{PHASES[phase][1]}"


def _age() -> float:
    """Return the seconds since this process began."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        # Linux counts ticks from its own start. psutil adds the date of that start, which Linux
        # tells in whole seconds, and other ones when the clock is set.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


class Phases:
    """The phases of this process, one after the other or, by `with phases("restore"):`, nested.

    Time in an inner phase is not charged to the outer one. The first phase, "imports", begins with
    the process itself, before Python has read a line of ours; age: seconds since then, where the
    run did not begin with its process.
    """

    def __init__(self, run: RunConfig, age: float | None = None) -> None:
        self._limits = {name: getattr(run, f"deadline_{key}") for name, (_, key) in PHASES.items()}
        self._spent: dict[str, float] = {}  # by phase
        self._entered = self._born = time.monotonic() - (_age() if age is None else age)
        self.current = self._phase("imports", 0)

    def _phase(self, name: str, step: int) -> Phase:
        return Phase(name, step, time.monotonic(), self._limits[name])

    def _charge(self) -> None:
        now = time.monotonic()
        name = self.current.name
        self._spent[name] = self._spent.get(name, 0.0) + now - self._entered
        self._entered = now

    def _switch(self, phase: Phase) -> None:
        self._charge()
        self.current = phase

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self.current
        self._switch(self._phase(name, outer.step))
        try:
            yield
        finally:
            # The outer phase has only waited for the inner one: its deadline counts anew.
            self._switch(self._phase(outer.name, self.current.step))

    def begin(self, name: str, step: int = 0) -> None:
        """Make `name` the outermost phase from here on."""
        self._switch(self._phase(name, step))

    def progress(self, step: int | None = None) -> None:
        """Take note of progress, as a finished update: the phase's deadline counts anew."""
        phase = self.current
        self.current = self._phase(phase.name, phase.step if step is None else step)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far at each place of LEDGER; their sum is the age of the run's process."""
        self._charge()
        places = dict.fromkeys(LEDGER, 0.0)
        for name, seconds in self._spent.items():
            places[PHASES[name][0]] += seconds
        return places

    def training(self) -> float:
        """Seconds of updates, and of waiting for their data or writing it."""
        places = self.seconds
        return places["step"] + places["data"] + places["rollout"]

    @property
    def lifetime(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self._born

    def __str__(self) -> str:
        """Return the phases so far, the longest first: "2.3 s: imports 2.1, data 0.2"."""
        shown = sorted(self._spent.items(), key=lambda phase: -phase[1])
        parts = [f"{name} {seconds:.1f}" for name, seconds in shown if seconds >= 0.05]
        return f"{sum(self._spent.values()):.1f} s: {', '.join(parts)}"
