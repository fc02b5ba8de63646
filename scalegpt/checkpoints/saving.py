"""The saves of a run, one after the other: what has become of them, and what is kept."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from scalegpt.checkpoints import manifest
from scalegpt.checkpoints.writing import Save, retire
from scalegpt.files.folder import Folder
from scalegpt.processes.agreement import Deadline, from_first

_count = itertools.count()


class Failure(NamedTuple):
    """No checkpoint could be written since then (unix seconds); `over`: for too long a time."""

    since: float
    reason: str
    over: bool


class Saver:
    """Writes into `folder`; see `Checkpoints`, which it belongs to.

    damaged: steps known to be, which are moved aside when they are saved again and kept until then.
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        keep_every: int,
        patience: float,
        seconds: float,
        say: Callable[[str], None],
        before_commit: Callable[[], None],
        damaged: set[int],
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._patience, self._seconds, self._say = patience, seconds, say
        self._before, self._damaged = before_commit, damaged
        self._save: Save | None = None
        self.failure: Failure | None = None
        self.latest: int | None = None  # that this process knows to be good

    def begin(
        self, step: int, items: dict[str, Any], meta: dict[str, Any], val_loss: float | None
    ) -> float:
        """Returns for how many seconds it held up the caller."""
        began = time.perf_counter()
        # While the last one hangs in some system call, a second copy of the state is no help.
        if self.settle():
            self._save = Save(
                self._folder,
                step,
                items,
                val_loss,
                meta,
                self._seconds,
                step in self._damaged,
                self._before,
                self._prune,
            )
        return time.perf_counter() - began

    def settle(self) -> bool:
        """See to the outcome of the last save, the same in all processes; False: it goes on.

        It is process 0's that counts, for that has written the manifest, or not.
        """
        if (save := self._save) is None:
            return True
        # Longer than its deadline is not waited for; and that only once.
        over = save.join(0 if save.given_up else None)
        problem = save.problem if over else f"it is not written after {self._seconds:g} s"
        mine = [over, problem, save.note, time.time()]
        try:
            name = f"scalegpt/outcome/{next(_count)}"
            over, problem, note, now = from_first(name, mine, Deadline(self._seconds))
        except TimeoutError as error:
            over, problem, note, now = True, str(error), None, time.time()
        save.given_up = not over
        if over:
            self._save = None
        before = self.failure
        if problem is None:
            self.latest, self.failure = max(save.step, self.latest or 0), None
            self._damaged.discard(save.step)
            if before:
                self._say(
                    f"saving works again: step {save.step} is saved, after "
                    f"{now - before.since:.0f} s without"
                )
            if note:
                self._say(f"warning: {note}")
            return over
        since = before.since if before else save.began
        self.failure = Failure(since, problem, now - since > self._patience)
        if before is None or before.reason != problem:
            self._say(
                f"warning: step {save.step} could not be saved in {self._folder}: {problem}. "
                f"Training goes on, and the next save is tried when it is due; "
                f"{self.last_good()}"
            )
        return over

    def failing(self) -> Failure | None:
        if jax.process_count() == 1:
            if self._save and not self._save.given_up and self._save.join(0):
                self.settle()
            if self.failure and time.time() - self.failure.since > self._patience:
                self.failure = self.failure._replace(over=True)
        return self.failure

    def last_good(self) -> str:
        return (
            f"the last good checkpoint is step {self.latest}"
            if self.latest
            else "there is no checkpoint yet"
        )

    def close(self) -> None:
        if self._save:
            self._save.join(0 if self._save.given_up else None)

    def _prune(self, step: int) -> None:
        """In process 0, after `step` was committed: a kill at any time leaves a good one."""
        found = manifest.steps(self._folder)
        losses = {
            s: m["val_loss"]
            for s, m in found.items()
            if not isinstance(m, str) and (s == step or s not in self._damaged)
        }
        for old in manifest.removable(losses, self._keep, self._keep_every, also=[step]):
            retire(self._folder / str(old))
        for old, state in found.items():
            if state == manifest.NEVER_FINISHED and old < step:  # a killed save, passed again
                (self._folder / str(old)).remove()
