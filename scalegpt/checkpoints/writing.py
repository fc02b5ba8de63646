"""Checkpoints are written here: Orbax writes arrays, and a manifest makes a checkpoint of them.

A step is written in place, on a disk and in a bucket alike: first a mark that the save is not over,
then the arrays, then the manifest, then the mark goes. Killed anywhere, the folder tells what it
is. Orbax's own checkpointers are not used: with them, every process waits at a barrier for one that
has failed.
"""

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from etils import epath

from scalegpt.checkpoints import manifest
from scalegpt.files.folder import Folder
from scalegpt.processes.agreement import Deadline, forget, from_first, gather, occasion, to_first

# Training waits so many seconds for a folder to write to: the client of a lost bucket tries for
# minutes.
PATIENCE = 20.0
_KNOWN = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
)


def reason(error: BaseException) -> str:
    """Return why something could not be written, if possible in the operating system's words."""
    text = f"{getattr(error, 'strerror', None) or ''} {error}"
    for number in _KNOWN:
        if os.strerror(number) in text:
            return os.strerror(number)
    first = (str(error).splitlines() or [""])[0][:300]
    # Names of temporary files and sizes differ each time; two such errors are one reason.
    return f"{type(error).__name__}: {re.sub(r'[0-9a-f]{8,}', '...', first)}"


class Failure(NamedTuple):
    """No checkpoint could be written since `since`, in Unix seconds.

    over: this has lasted longer than checkpoint.patience.
    """

    since: float
    reason: str
    over: bool


@dataclass(eq=False)
class Saver:
    """Saves one step after the other into `folder`, and removes old ones; used by `Checkpoints`.

    patience, seconds: those of `Checkpoints`, the latter being its `deadline`. damaged: steps known
    to be damaged; one is moved aside when it is saved again, and kept until then.
    """

    folder: Folder
    keep: int
    keep_every: int
    patience: float
    seconds: float
    say: Callable[[str], None]
    before_commit: Callable[[], None]
    damaged: set[int]
    failure: Failure | None = field(default=None, init=False)
    latest: int | None = field(default=None, init=False)  # step that this process knows to be good
    _save: "Save | None" = field(default=None, init=False)

    def begin(
        self, step: int, items: dict[str, Any], meta: dict[str, Any], val_loss: float | None
    ) -> float:
        """Begin to save `step`; return for how many seconds this held up the caller."""
        began = time.perf_counter()
        # While the last save hangs in a system call, a second copy of the state would not help.
        if self.settle():
            self._save = begin_save(self, step, items, meta, val_loss)
        return time.perf_counter() - began

    def settle(self) -> bool:
        """Take note of how the last save ended, the same in all processes; False: it has not.

        Process 0 decides, because it has written the manifest or not.
        """
        if (save := self._save) is None:
            return True
        # A save that has passed its deadline is not waited for again.
        ended = save.join(0 if save.given_up else None)
        problem = save.problem if ended else f"it is not written after {self.seconds:g} s"
        outcome = [ended, problem, time.time()]
        try:
            ended, problem, seconds = from_first("outcome", outcome, Deadline(self.seconds))
        except TimeoutError as error:
            ended, problem, seconds = True, str(error), time.time()
        save.given_up = not ended
        if ended:
            self._save = None
        earlier = self.failure
        if problem is None:
            self.latest, self.failure = max(save.step, self.latest or 0), None
            self.damaged.discard(save.step)
            if earlier:
                self.say(
                    f"saving works again: step {save.step} is saved, after "
                    f"{seconds - earlier.since:.0f} s without"
                )
            return ended
        since = earlier.since if earlier else save.began
        self.failure = Failure(since, problem, seconds - since > self.patience)
        # Step 0 is imported weights: no training goes on, and `save_weights` raises the reason.
        if save.step and (earlier is None or earlier.reason != problem):
            self.say(
                f"warning: step {save.step} could not be saved in {self.folder}: {problem}. "
                f"Training goes on, and the next save is tried when it is due; "
                f"{self.last_good()}"
            )
        return ended

    def failing(self) -> Failure | None:
        """Return the present failure; a process alone looks at the save in the background first."""
        if jax.process_count() == 1:
            if self._save and not self._save.given_up and self._save.join(0):
                self.settle()
            if self.failure and time.time() - self.failure.since > self.patience:
                self.failure = self.failure._replace(over=True)
        return self.failure

    def last_good(self) -> str:
        """Return a clause for messages that names the last good checkpoint."""
        return (
            f"the last good checkpoint is step {self.latest}"
            if self.latest
            else "there is no checkpoint yet"
        )

    def close(self) -> None:
        """Wait for the save in the background, unless it is past its deadline."""
        if self._save:
            self._save.join(0 if self._save.given_up else None)

    def prune(self, step: int) -> None:
        """Remove old checkpoints, in process 0 after `step` is one: a kill leaves a good one."""
        try:
            stored = manifest.steps(self.folder)
            good = {
                s: m
                for s, m in stored.items()
                if not isinstance(m, str) and (s == step or s not in self.damaged)
            }
            for old in manifest.removable(good, self.keep, self.keep_every, also=[step]):
                retire(self.folder / str(old))
            for old, state in stored.items():
                # An earlier process was killed during this save, and the run is past its step now.
                if state == manifest.NEVER_FINISHED and old < step:
                    (self.folder / str(old)).remove(last=manifest.UNFINISHED)
        except Exception as error:
            self.say(f"warning: old checkpoints could not be removed: {reason(error)}")


@dataclass(eq=False)
class Save:
    """A save under way: `begin_save` begins it, and a thread goes on with it until `join`.

    tree: what the manifest says of the arrays. name: begins those of its collectives. Nothing
    raises: `problem` says why there is no checkpoint, and process 0's holds for all of them.
    """

    saver: Saver
    step: int
    tree: dict[str, str]
    meta: dict[str, Any]
    val_loss: float | None
    name: str
    deadline: Deadline
    began: float = field(default_factory=time.time)
    problem: str | None = None
    given_up: bool = False  # its deadline has passed and its thread goes on
    _handlers: dict[str, Any] = field(default_factory=dict)
    _futures: list[Any] = field(default_factory=list)
    _thread: threading.Thread | None = None

    @property
    def folder(self) -> Folder:
        return self.saver.folder / str(self.step)

    def start(self, items: dict[str, Any]) -> None:
        """Copy the arrays of `items`, which may change on return, and write them by a thread."""
        import orbax.checkpoint as ocp  # not at the top: it would hold up the first update

        try:
            for name, tree in items.items():
                self._handlers[name] = ocp.StandardCheckpointHandler()
                self._futures += self._copy(name, tree)
        except Exception as error:
            self.problem = reason(error)
        self._thread = threading.Thread(target=self._run, name=f"save {self.step}", daemon=True)
        self._thread.start()

    def _copy(self, name: str, tree: Any) -> list[Any]:
        """Copy the arrays of `tree` and begin to write them; the futures end with the writing."""
        import orbax.checkpoint as ocp

        target = epath.Path((self.folder / name).path)
        saving = self._handlers[name].async_save(target, args=ocp.args.StandardSave(tree))
        return asyncio.run_coroutine_threadsafe(saving, _event_loop()).result() or []

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end, by default until the deadline; tell whether the save has ended."""
        if self._thread is None:
            return True
        self._thread.join(self.deadline.left + 10 if seconds is None else seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.problem = self._commit()
        except Exception as error:
            self.problem = reason(error)
        if jax.process_index() != 0:
            return
        if self.problem:
            # A full disk needs the room. What is still being written may come after this: with the
            # mark, it goes with a later save.
            with contextlib.suppress(Exception):
                self.folder.remove()
            with contextlib.suppress(Exception):
                self.folder.make()
                self.folder.write(manifest.UNFINISHED, b"")
        else:
            self.saver.prune(self.step)

    def _commit(self) -> str | None:
        """Make a checkpoint of what is written, or return why not.

        Every process takes part, and hashes its share of the files.
        """
        if not self.problem:
            try:
                for future in self._futures:
                    future.result(timeout=self.deadline.left)
            except Exception as error:
                self.problem = reason(error)
        problems = gather(f"{self.name}/written", self.problem, self.deadline)
        if failed := [problem for problem in problems if problem]:
            return failed[0]
        is_first = jax.process_index() == 0
        sizes, problem = {}, None
        if is_first:
            try:
                for name, handler in self._handlers.items():
                    handler.finalize(epath.Path((self.folder / name).path))
                sizes = self.folder.files()
                if sizes.pop(manifest.UNFINISHED, None) is None:
                    problem = f"{self.folder.path} has vanished while it was written"
            except Exception as error:
                problem = reason(error)
        sizes, problem = from_first(f"{self.name}/files", [sizes, problem], self.deadline)
        if problem:
            return problem
        sums: dict[str, list] = {}
        try:
            share = sorted(sizes)[jax.process_index() :: jax.process_count()]
            sums = manifest.checksums(self.folder, sizes, share)
        except Exception as error:
            problem = reason(error)
        shares = to_first(f"{self.name}/sums", [sums, problem], self.deadline)
        forget(self.name)  # whoever has given its sums has read all that was said before
        if not is_first:
            return problem
        if failed := [problem for _, problem in shares if problem]:
            return failed[0]
        self.saver.before_commit()
        files = {name: entry for sums, _ in shares for name, entry in sums.items()}
        content = manifest.encode(self.step, self.val_loss, self.meta, self.tree, files)
        self.folder.write(manifest.NAME, content)
        self.folder.delete(manifest.UNFINISHED)
        return None


def begin_save(
    saver: Saver,
    step: int,
    items: dict[str, Any],
    meta: dict[str, Any],
    val_loss: float | None,
) -> Save:
    """Begin to save `step` in the main thread of every process; `Save` does the rest.

    items: name -> arrays, which may change once this returns. Raises nothing, see `Save.problem`.
    """
    save = Save(
        saver,
        step,
        manifest.describe_tree(items),
        json.loads(json.dumps(meta)),  # a copy: training goes on changing it
        val_loss,
        occasion("save"),
        Deadline(saver.seconds),
    )
    is_saved: list[Any] = [False, None]
    if jax.process_index() == 0:
        is_damaged = step in saver.damaged
        is_saved = _within(
            PATIENCE, lambda: _is_there_or_make_room(saver.folder, step, items, is_damaged)
        )
    try:
        is_there, save.problem = from_first(f"{save.name}/begin", is_saved, save.deadline)
    except TimeoutError as error:
        is_there, save.problem = False, str(error)
    # Where process 0 could make no folder, all know it and there is nothing to wait for.
    if not (is_there or save.problem):
        save.start(items)
    return save


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a thread of its own until the process ends.

    It is never closed: writes that end after a failed one still call it back.
    """
    loop = asyncio.new_event_loop()
    # The save itself says what was wrong with it.
    loop.set_exception_handler(lambda loop, context: None)
    logging.getLogger("asyncio").addFilter(_is_no_write)
    threading.Thread(target=loop.run_forever, daemon=True, name="event loop of saves").start()
    # Orbax has other loops, which are closed when writes to a full disk fail: Python would print
    # hundreds of tracebacks.
    default_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            default_hook(unraisable)

    sys.unraisablehook = hook
    return loop


def _is_no_write(record: logging.LogRecord) -> bool:
    """Tell whether a message of asyncio is of something else than a write of Orbax that failed."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
    return not any("orbax" in frame.filename for frame in frames)


def _within(seconds: float, function: Callable[[], Any]) -> list[Any]:
    """Return [result of `function`, why there is none]; after `seconds`, leave it running."""
    outcome = [None, f"nothing was answered within {seconds:g} s"]

    def call() -> None:
        try:
            outcome[:] = [function(), None]
        except Exception as error:
            outcome[:] = [None, reason(error)]

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return list(outcome)


def _is_there_or_make_room(
    checkpoints: Folder, step: int, items: Sequence[str], is_damaged: bool
) -> bool:
    """Tell whether the step is saved already; if not, make it a folder that only this save uses."""
    folder = checkpoints / str(step)
    if names := folder.names():
        if manifest.NAME in names and not is_damaged:
            return True
        if manifest.UNFINISHED in names and manifest.NAME not in names:
            folder.remove(last=manifest.UNFINISHED)  # else a kill here would leave a damaged one
        else:
            taken, name = set(checkpoints.names()), f"damaged-{step}"
            if name in taken:
                name = next(f"{name}-{i}" for i in itertools.count(1) if f"{name}-{i}" not in taken)
            folder.move(checkpoints / name)
    folder.make()  # not its parents: where a disk has gone, its place is on another
    folder.write(manifest.UNFINISHED, b"")
    for name in items:
        (folder / name).make()
        # Orbax's other processes wait long for this folder when process 0 fails before making it.
        (folder / name / "array_metadatas").make()
    return False


def retire(folder: Folder) -> None:
    """Remove a step's folder; a kill leaves an unfinished save and not a damaged checkpoint."""
    folder.write(manifest.UNFINISHED, b"")
    folder.delete(manifest.NAME)
    folder.remove(last=manifest.UNFINISHED)
