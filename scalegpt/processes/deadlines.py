"""A thread that ends a run whose phase takes longer than its deadline."""

import threading
import time

from scalegpt.processes.exits import Exit
from scalegpt.processes.group import Alone, Group
from scalegpt.processes.phases import PHASES, Phase, Phases, key_of

_TICK = 0.5  # seconds between two looks at the clock
_STOPPED = 10.0  # seconds: after such a tick the process was stopped, or its machine asleep


class Watch:
    """Ends all processes when this one's phase has passed its deadline, and says where each is.

    Now and then it says which phase takes long. The deadline counts anew after a time in which this
    process was stopped, or its machine asleep.
    """

    def __init__(self, phases: Phases, group: Group | Alone) -> None:
        self._phases, self._group = phases, group
        self._over = threading.Event()
        # The time now, for this process may be stopped before the thread has begun.
        arguments = [time.monotonic()]
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)  # a deadline that passes now still ends this run, and no later one

    def _run(self, last_tick: float) -> None:
        awake = 0.0  # since when this process has not been stopped
        announced, announce_after = 0.0, 0.0  # a phase, by its begin; the seconds of the next word
        while not self._over.wait(_TICK):
            now, phase = time.monotonic(), self._phases.current
            if now - last_tick > _STOPPED:
                awake = now
            last_tick = now
            seconds = now - max(phase.since, awake)
            if seconds > phase.deadline:
                return self._end(phase, seconds)
            if announced != phase.since:
                # Updates, evaluations and saves come again and again, and may well take a while.
                once = PHASES[phase.name][0] in ("startup", "restore", "compile")
                announced = phase.since
                announce_after = 5.0 if once else max(5.0, phase.deadline / 20)
            elif seconds > announce_after and self._group.index == 0:
                limit = f"; {key_of(phase.name)}={phase.deadline:g} ends the run"
                near = seconds > phase.deadline / 4
                self._group.say(f"{phase.name}: {seconds:.0f} s so far{limit if near else ''}")
                announce_after *= 4

    def _end(self, phase: Phase, seconds: float) -> None:
        what = f"{phase.name} after update {phase.step}" if phase.step else phase.name
        text = (
            f"{what} takes {seconds:.0f} s, longer than {key_of(phase.name)}="
            f"{phase.deadline:g}; raise that if it is slow and does not hang"
        )
        if others := self._group.others():
            text += f"\n{others}"
        self._group.leave(Exit.FAILED, text, with_stacks=True)
