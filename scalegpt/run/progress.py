"""Judge, report and time the updates of a run as they are done; name the ways it ends early."""

import math
from collections.abc import Callable
from typing import Any

from scalegpt.config import Config
from scalegpt.data.token_files import Dataset
from scalegpt.processes.exits import Exit
from scalegpt.processes.phases import Phases
from scalegpt.run import reports
from scalegpt.run.metrics import Metrics

_ENOUGH = 5.0  # seconds of updates that tell how long the run takes


class Ended(Exception):
    """A run ends before its last update. `step`: the last update; `code`: the exit code."""

    code: Exit

    def __init__(self, step: int) -> None:
        super().__init__(f"ended after update {step}")
        self.step = step


class Stopped(Ended):
    """Somebody asked the run to stop, and it has saved its state."""

    code = Exit.STOPPED


class NotFinite(Ended):
    """A loss or a gradient is NaN or infinite, once more often than the run allows.

    evaluated: not that of an update, but the loss of the evaluation after it.
    """

    code = Exit.NOT_FINITE

    def __init__(self, step: int, evaluated: bool = False) -> None:
        super().__init__(step)
        self.evaluated = evaluated


class Unread(Ended):
    """A process could not read what comes after update `step`, which is saved.

    why: what has happened, None in other processes.
    """

    code = Exit.MISTAKE

    def __init__(self, step: int, why: Exception | None) -> None:
        super().__init__(step)
        self.why = why


class NotSaved(Ended):
    """No checkpoint could be written for longer than checkpoint.patience."""

    code = Exit.FAILED


class Progress:
    """Progress reads the metrics of updates one update behind the device, judges and reports them.

    start: updates done before this process began. mfu: tokens/s -> MFU, or None where the peak of
    the device is not known (`flops.mfu_meter`).
    """

    def __init__(
        self,
        config: Config,
        datasets: list[Dataset],
        metrics: Metrics,
        phases: Phases,
        start: int,
        mfu: Callable[[float], float | None],
    ) -> None:
        self._config, self._datasets = config, datasets
        self._metrics, self._phases, self._first = metrics, phases, start + 1
        self._throughput = Throughput(phases.training, mfu)
        self._unread: tuple[int, dict[str, Any]] | None = None
        self._paced_from: float | None = None  # seconds of training before the second update

    def dispatched(self, step: int, values: dict[str, Any]) -> None:
        """Take the metrics of update `step`, which the device has just been given.

        Only the update before it is waited for and read. Raises as `read`, for that one.
        """
        self.read()
        self._unread = step, values

    def read(self) -> None:
        """Wait for the update dispatched last, judge and report it. Raises NotFinite, or Unread
        where it was void: all processes learn of it here, from what they have computed together.
        """
        if self._unread is None:
            return
        (step, values), self._unread = self._unread, None
        if values["void"]:
            raise Unread(step - 1, values.get("unread"))
        config, total = self._config, self._config.optim.steps
        row = {"step": step} | {k: float(v) for k, v in values.items() if "/" in k}
        row["train/skipped"] = int(row["train/skipped"])
        finite = math.isfinite(row["train/loss"]) and math.isfinite(row["train/grad_norm"])
        # With rewards the loss hovers around 0 and says nothing.
        spike = config.goal == "loss" and row["train/spike"] > config.run.spike
        bad = not finite or spike
        if bad:
            reports.bad_update(config, self._datasets, step, values, self._metrics)
        if step == self._first or step in config.batch.growth:  # that one was compiled
            self._throughput.start(step)
        with_norms = config.log.norms_every and step % config.log.norms_every == 0
        if with_norms:
            norms = reports.by_layer(values["norms"])
            row |= {f"norm/{name}": norm for name, norm in norms.items()}
        if bad or with_norms or step % config.log.every == 0 or step in (self._first, total):
            length = config.row_width
            row["train/tokens"] = config.batch.rows_after(step) * length
            if len(self._datasets) == 1:
                (row["train/epoch"],) = reports.epochs(config, self._datasets, step).values()
            speed = self._throughput.read(step, config.batch.sequences_at(step) * length)
            self._metrics.train(row | speed)
        self._phases.progress(step)
        self._say_pace(step)
        if not finite and int(values["nonfinite"]) > config.run.skip_nonfinite:
            raise NotFinite(step)

    def _say_pace(self, step: int) -> None:
        """Say once how long the run takes, as soon as a few seconds of updates can tell."""
        if step == self._first:
            self._paced_from = self._phases.training()
        if self._paced_from is None:
            return
        seconds = self._phases.training() - self._paced_from
        if seconds >= _ENOUGH:
            self._paced_from = None
            rows = self._config.batch.rows_after
            done, to_come = (
                rows(step) - rows(self._first),
                rows(self._config.optim.steps) - rows(step),
            )
            if (left := seconds / done * to_come) >= 60:
                self._metrics.say(reports.pace(self._config, step, left))


class Throughput:
    """Throughput measures the speed since its last reading, without evaluations and saves.

    A step is over when its loss is on the host, not when it is dispatched: call each method right
    after that. `clock` counts the seconds of training alone. Call `start` after a process's first
    step, which compiles, so that it does not count. `mfu` maps tokens/s to MFU (`flops.mfu_meter`).
    """

    def __init__(
        self, clock: Callable[[], float], mfu: Callable[[float], float | None] = lambda rate: None
    ) -> None:
        self._mfu, self._clock = mfu, clock
        self._step: int | None = None
        self._since = 0.0

    def start(self, step: int) -> None:
        """Count from here; `step` has just finished."""
        self._step, self._since = step, self._clock()

    def read(self, step: int, tokens_per_step: int) -> dict[str, float]:
        """Return the perf/* keys of the steps since `start` or the last reading, {} without any.

        `tokens_per_step` is the global batch of an *update*, all its microbatches and devices.
        """
        last_step, since = self._step, self._since
        self.start(step)
        if last_step is None or step <= last_step:
            return {}
        seconds = (self._since - since) / (step - last_step)
        rate = tokens_per_step / seconds
        speed = {"perf/tokens_per_second": rate, "perf/step_seconds": seconds}
        if (mfu := self._mfu(rate)) is not None:
            speed["perf/mfu"] = mfu
        return speed
