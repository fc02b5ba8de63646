"""One save of one step: Orbax writes arrays, the manifest makes a checkpoint of them.

Written in place, on a disk and in a bucket alike: first a mark that the save is not over, then the
arrays, then the manifest, then the mark goes. Killed anywhere, the folder tells what it is. Orbax's
own checkpointers are not used: their barriers wait in every process for one that failed.
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from scalegpt.checkpoints import manifest
from scalegpt.files.folder import Folder
from scalegpt.processes.agreement import Deadline, forget, from_first, gather

_count = itertools.count()
# Seconds that training waits for a folder: the client of a lost bucket tries for minutes.
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
    """Why something could not be written: the system's words, if anything in the error has them."""
    text = f"{getattr(error, 'strerror', None) or ''} {error}"
    for number in _KNOWN:
        if os.strerror(number) in text:
            return os.strerror(number)
    first = (str(error).splitlines() or [""])[0][:300]
    # Names of temporary files and sizes differ each time; two such errors are one reason.
    return f"{type(error).__name__}: {re.sub(r'[0-9a-f]{8,}', '...', first)}"


class Save:
    """Begins in the main thread, in every process; the rest is in the background until `join`.

    checkpoints: of the run. items: name -> arrays. before: called in process 0 when all is written,
    before the manifest is; after: when the checkpoint is there. Nothing raises: `problem` says, in
    process 0 for all of them, why there is no checkpoint, `note` what went wrong besides.
    """

    def __init__(
        self,
        checkpoints: Folder,
        step: int,
        items: dict[str, Any],
        val_loss: float | None,
        meta: dict[str, Any],
        seconds: float,
        is_damaged: bool = False,
        before: Callable[[], None] = lambda: None,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.step, self.began = step, time.time()
        self.problem: str | None = None
        self.note: str | None = None
        self.given_up = False
        self._folder, self._handlers = checkpoints / str(step), {}
        self._tree, self._before, self._after = manifest.describe_tree(items), before, after
        self._val_loss, self._meta = val_loss, json.loads(json.dumps(meta))  # as it is now
        number, self._deadline = next(_count), Deadline(seconds)
        self._name = f"scalegpt/save/{number}"
        if number > 1:
            forget(f"scalegpt/save/{number - 2}")
        self._first = jax.process_index() == 0
        answer: list[Any] = [False, None]
        if self._first:
            answer = _within(
                PATIENCE, lambda: _is_there_or_make_room(checkpoints, step, items, is_damaged)
            )
        try:
            self.is_there, self.problem = from_first(f"{self._name}/begin", answer, self._deadline)
        except TimeoutError as error:
            self.is_there, self.problem = False, str(error)
        self._thread = threading.Thread(target=self._run, name=f"save {step}", daemon=True)
        # Where process 0 could make no folder, all know it and there is nothing to wait for.
        if self.is_there or self.problem:
            return
        futures: list[Any] = []
        try:
            for name, tree in items.items():
                self._handlers[name] = ocp.StandardCheckpointHandler()
                futures += self._copy(name, tree)
        except Exception as error:
            self.problem = reason(error)
        self._futures: Sequence[Any] = futures
        self._thread.start()

    def _copy(self, name: str, tree: Any) -> list[Any]:
        """When it returns, the arrays may change: they are copied, and being written."""
        target = epath.Path((self._folder / name).path)
        saving = self._handlers[name].async_save(target, args=ocp.args.StandardSave(tree))
        return asyncio.run_coroutine_threadsafe(saving, _event_loop()).result() or []

    def join(self, seconds: float | None = None) -> bool:
        """Whether it is over, after waiting at most so long; default: as long as it may take."""
        if self._thread.ident is not None:
            self._thread.join(self._deadline.left + 10 if seconds is None else seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.problem = self._commit()
        except Exception as error:
            self.problem = reason(error)
        if self.problem and self._first:
            # A full disk needs the room. What is still being written may come after this: with the
            # mark, it goes with a later save.
            with contextlib.suppress(Exception):
                self._folder.remove()
            with contextlib.suppress(Exception):
                self._folder.make()
                self._folder.write(manifest.UNFINISHED, b"")
        elif self._first:
            try:
                self._after(self.step)
            except Exception as error:
                self.note = f"old checkpoints could not be removed: {reason(error)}"

    def _commit(self) -> str | None:
        """Returns why not. Every process takes part, each hashing its share of the files."""
        if not self.problem:
            try:
                for future in self._futures:
                    future.result(timeout=self._deadline.left)
            except Exception as error:
                self.problem = reason(error)
        written = gather(f"{self._name}/written", self.problem, self._deadline)
        if failed := [problem for problem in written if problem]:
            return failed[0]
        sizes, problem = {}, None
        if self._first:
            try:
                for name, handler in self._handlers.items():
                    handler.finalize(epath.Path((self._folder / name).path))
                sizes = self._folder.files()
                sizes.pop(manifest.UNFINISHED)
            except Exception as error:
                problem = reason(error)
        sizes, problem = from_first(f"{self._name}/files", [sizes, problem], self._deadline)
        if problem:
            return problem
        sums: dict[str, list] = {}
        try:
            mine = sorted(sizes)[jax.process_index() :: jax.process_count()]
            sums = manifest.checksums(self._folder, sizes, mine)
        except Exception as error:
            problem = reason(error)
        shares = gather(f"{self._name}/sums", [sums, problem], self._deadline)
        if failed := [problem for _, problem in shares if problem]:
            return failed[0]
        if self._first:
            self._before()
            files = {name: entry for share, _ in shares for name, entry in share.items()}
            content = manifest.encode(self.step, self._val_loss, self._meta, self._tree, files)
            self._folder.write(manifest.NAME, content)
            self._folder.delete(manifest.UNFINISHED)
        return None


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Of a thread of its own, for good: writes that end after a failed one still call it back."""
    loop = asyncio.new_event_loop()
    # What was wrong with a save is said by the save.
    loop.set_exception_handler(lambda loop, context: None)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.Thread(target=loop.run_forever, daemon=True, name="event loop of saves").start()
    # Orbax has loops besides, which are closed by then: a full disk would be told by the hundred.
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook
    return loop


def _within(seconds: float, function: Callable[[], Any]) -> list[Any]:
    """[result, why there is none]; what takes longer is left to itself."""
    answer = [None, f"nothing was answered within {seconds:g} s"]

    def call() -> None:
        try:
            answer[:] = [function(), None]
        except Exception as error:
            answer[:] = [None, reason(error)]

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return list(answer)


def _is_there_or_make_room(
    checkpoints: Folder, step: int, items: Sequence[str], is_damaged: bool
) -> bool:
    """Whether the step is saved already; if not, it has a folder that only this save is in."""
    folder = checkpoints / str(step)
    if names := folder.names():
        if manifest.NAME in names and not is_damaged:
            return True
        if manifest.UNFINISHED in names and manifest.NAME not in names:
            folder.remove()
        else:
            taken, name = set(checkpoints.names()), f"damaged-{step}"
            if name in taken:
                name = next(f"{name}-{i}" for i in itertools.count(1) if f"{name}-{i}" not in taken)
            folder.move(checkpoints / name)
    folder.make()  # not its parents: where a disk has gone, its place is on another
    folder.write(manifest.UNFINISHED, b"")
    for name in items:
        (folder / name).make()
        # For this folder Orbax's other processes wait long, where process 0 has failed before it.
        (folder / name / "array_metadatas").make()
    return False


def retire(folder: Folder) -> None:
    """Remove a step; killed half-way, it is an unfinished save and not a damaged checkpoint."""
    folder.write(manifest.UNFINISHED, b"")
    folder.delete(manifest.NAME)
    folder.remove()
