"""A thread that ends what hangs, and says now and then what takes long."""

import threading
import time

from scalegpt.processes import group
from scalegpt.processes.exits import Exit, key_of, say
from scalegpt.processes.phases import PHASES, Phase, Phases

_TICK = 0.5
_STOPPED = 10.0  # a tick that took so long: the process was stopped, or its machine asleep


class Watch:
    """Past a phase's deadline it prints where this and the other processes are, and ends all.

    Stopped processes and sleeping machines are no hangs: all clocks start anew after them.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._over = threading.Event()
        group.introduce(phases=phases)
        # From now: this process may be stopped before the thread has begun.
        threading.Thread(
            target=self._run, args=[time.monotonic()], daemon=True, name="watch"
        ).start()

    def close(self) -> None:
        self._over.set()

    def _run(self, last: float) -> None:
        fresh = 0.0
        told: tuple[float, float] = (0.0, 0.0)  # begin of the phase, seconds at which to tell next
        while not self._over.wait(_TICK):
            now, phase = time.monotonic(), self._phases.current
            if now - last > _STOPPED:
                fresh = now
            last = now
            seconds = now - max(phase.since, fresh)
            if seconds > phase.deadline:
                self._end(phase, seconds)
            if told[0] != phase.since:
                # Updates, evaluations and saves come again and again, and may well take a while.
                once = PHASES[phase.name][0] in ("startup", "restore", "compile")
                told = (phase.since, 5.0 if once else max(5.0, phase.deadline / 20))
            elif seconds > told[1] and (group.line is None or group.line.index == 0):
                say(f"still in {phase.name} after {seconds:.0f} s, deadline {phase.deadline:.0f} s")
                told = (phase.since, told[1] * 4)

    def _end(self, phase: Phase, seconds: float) -> None:
        what = f"{phase.name} of step {phase.step}" if phase.step else phase.name
        text = (
            f"{what} takes {seconds:.0f} s, longer than {key_of(phase.name)}="
            f"{phase.deadline:g}; raise that if it is slow and does not hang"
        )
        if group.line:
            text += f"\n{group.line.others()}"
        group.leave(Exit.FAILED, text, dump=True)
