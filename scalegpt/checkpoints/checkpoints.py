"""Checkpoints hold what a run needs to continue bitwise; everybody else reads the weights alone.

A step's folder holds two items of Orbax, `params` and `optimizer` (its state and the step), and the
manifest with the rest: config, tokenizer, the data's fingerprint, the best loss so far, and
checksums of every file. A position in the data is not stored: the batch of a step follows from seed
and step. Step 0 holds imported weights and has no `optimizer`.
"""

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from scalegpt.checkpoints import manifest
from scalegpt.checkpoints.writing import Failure, Saver, reason
from scalegpt.errors import Mistake
from scalegpt.files.folder import open_folder
from scalegpt.files.run_folder import FOLDER, is_run
from scalegpt.processes.agreement import Deadline, from_first, gather

PARAMS, WHOLE = ("params",), ("params", "optimizer")


def warn(text: str) -> None:
    """Print `text` to standard error, in process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of a run are saved, verified and read through this object.

    It keeps the last `keep`, the best by validation loss, and those of steps that `keep_every`
    divides. `save` returns as soon as the state is copied; the rest happens while training goes on.
    A save that fails raises nothing: `say` is told once, and `failing` is set. deadline: seconds
    for one save. patience: seconds without a checkpoint after which `failing.over` is true.
    before_commit: called in process 0 before a checkpoint counts. With several processes, each
    makes every call, and all get the same answers.
    """

    def __init__(
        self,
        out_dir: str | Path,
        keep: int = 1,
        keep_every: int = 0,
        patience: float = math.inf,
        deadline: float = 1800.0,
        say: Callable[[str], None] = warn,
        before_commit: Callable[[], None] = lambda: None,
        read_only: bool = False,
    ) -> None:
        # Orbax would report each phase of each save to the user, through the root logger.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.say, self._seconds = say, deadline
        self._folder = open_folder(out_dir) / FOLDER
        self.folder = self._folder.path
        self._damaged: set[int] = set()  # steps that the user has been told of
        self._verified: set[tuple[int, str]] = set()
        self._saver = Saver(
            self._folder,
            keep,
            keep_every,
            patience,
            deadline,
            lambda text: self.say(text),
            before_commit,
            self._damaged,
        )
        if not read_only:
            try:
                self._folder.make(parents=True)
            except OSError as error:
                raise Mistake(f"cannot write to run.out_dir={out_dir}: {error}") from None

    # --- saving

    def save(self, state: Any, step: int, meta: dict[str, Any], val_loss: float | None) -> float:
        """Save `step`, unless it is saved; return for how many seconds this held training up.

        val_loss: the loss of an evaluation at this very step, which may make it the best, or None.
        Raises nothing: see `failing`.
        """
        items = {"params": state.params, "optimizer": _rest(state)}
        self._verified -= {(step, item) for item in items}
        return self._saver.begin(step, items, meta, val_loss)

    def save_weights(self, params: Any, meta: dict[str, Any]) -> None:
        """Save weights alone, to start from but not to continue, as step 0, which no run has.

        Raises Mistake when they could not be written.
        """
        self._saver.begin(0, {"params": params}, meta, None)
        if failure := self.wait():
            raise Mistake(f"cannot write to {self.folder}: {failure.reason}")

    def evaluated(self, step: int, meta: dict[str, Any], val_loss: float) -> None:
        """Add the loss of a later evaluation to the saved `step`, which may make it the best."""
        if jax.process_index() == 0:
            try:
                manifest.amend(self._folder / str(step), step, meta, val_loss)
            except Exception as error:  # as with a save: no reason to stop training
                self.say(f"warning: step {step} is saved without its loss: {reason(error)}")

    @property
    def failing(self) -> Failure | None:
        """The failure of the last save, until one succeeds; cheap enough to read at every update.

        With several processes it changes within `save` and `wait` only, so that all of them see
        the same at the same update.
        """
        return self._saver.failing()

    def wait(self) -> Failure | None:
        """Wait until the last save has ended; return why it failed, or None."""
        self._saver.settle()
        return self._saver.failure

    def close(self) -> None:
        """Wait for the save in the background, unless it is past its deadline."""
        self._saver.close()

    def last_good(self) -> str:
        """Return a clause for messages that names the last good checkpoint."""
        return self._saver.last_good()

    # --- finding

    def find(self, which: str | None, items: Iterable[str] = ()) -> int:
        """Return the step that `which` names: best, latest or a number.

        None is the best, or the latest, with a note, while no checkpoint was evaluated. items: what
        will be read. Its files are verified, and best and latest then skip damaged checkpoints with
        a warning. Step 0, imported weights, has no loss; where it is the only step, it is the best.
        Raises Mistake, naming the steps that there are.
        """
        good, broken = self._list()
        if which is None and any(good) and not any(loss is not None for loss in good.values()):
            self.say(f"note: no checkpoint in {self.folder} was evaluated yet; the latest is taken")
            which = "latest"
        which = which or "best"
        number = int(which) if re.fullmatch("[0-9]{1,10}", which) else None
        if number in broken:
            raise Mistake(f"step {which} in {self.folder} is damaged: {broken[number]}")
        losses = {step: loss for step, loss in good.items() if loss is not None}
        candidates = {
            "latest": sorted(good, reverse=True),
            "best": sorted(losses, key=lambda s: (losses[s], -s)) if set(good) != {0} else [0],
        }.get(which, [number] if number in good else [])
        if not candidates:
            self._report(broken)
            listed = ", ".join(map(str, good))
            listed += ", none of them evaluated yet" if which == "best" else ""
            raise Mistake(
                f"no checkpoint {which!r} in {self.folder}; there are steps {listed}"
                if good
                else f"there is no checkpoint in {self.folder}"
            )
        if items and which == "latest":
            self._report({s: why for s, why in broken.items() if s > candidates[0]})
        for step in candidates:
            if not items or not (faults := self.verify(step, items)):
                return step
            if number is not None:
                raise Mistake(f"step {which} in {self.folder} is damaged: {'; '.join(faults)}")
            self._report({step: "; ".join(faults[:3] + ["..."] * (len(faults) > 3))})
        raise Mistake(
            f"no checkpoint in {self.folder} is whole, see above; to start anew, move it away"
        )

    def _list(self) -> tuple[dict[int, float | None], dict[int, str]]:
        """Return the steps with a manifest, and the others with their fault.

        The value of a step is its val_loss, or None if that does not compare with the latest one.
        """
        listing: list[Any] = [[], [], None]  # steps with a manifest, the others, why unreadable
        if jax.process_index() == 0:
            try:
                contents = manifest.steps(self._folder)
                good = {s: x for s, x in contents.items() if not isinstance(x, str)}
                losses = manifest.losses(good)[-1]
                listing[0] = [[step, losses.get(step)] for step in good]
                listing[1] = [[s, x] for s, x in contents.items() if isinstance(x, str)]
            except Exception as error:
                listing[2] = reason(error)
        good, broken, problem = from_first("list", listing, Deadline(self._seconds))
        if problem:
            raise Mistake(f"cannot read {self.folder}: {problem}")
        return dict(good), {s: why for s, why in broken if why != manifest.NEVER_FINISHED}

    def _report(self, broken: dict[int, str]) -> None:
        for step, why in broken.items():
            if step not in self._damaged:
                self._damaged.add(step)
                self.say(f"warning: checkpoint {self.folder}/{step} is damaged and left out: {why}")

    def verify(self, step: int, items: Iterable[str] | None = None) -> list[str]:
        """Return what is wrong with the files of a step, or of some of its items; [] means whole.

        Every byte is read, each process reading its share. Raises Mistake when it cannot.
        """
        faults, unreadable, folder = list[str](), None, self._folder / str(step)
        try:
            content = manifest.read(folder, step)
            names = manifest.files_of(content, items)
            faults += [
                f"it has no {item}"
                for item in items or ()
                if not manifest.files_of(content, [item])
            ]
            share = names[jax.process_index() :: jax.process_count()]
            faults += manifest.problems(folder, content, share)
        except manifest.Damaged as error:
            faults.append(str(error))
        except Exception as error:  # not damage, but a network that is down, for example
            unreadable = reason(error)
        shares = gather("verify", [faults, unreadable], Deadline(self._seconds))
        if failed := [why for _, why in shares if why]:
            raise Mistake(f"cannot read {folder}: {failed[0]}")
        faults = list(dict.fromkeys(line for lines, _ in shares for line in lines))
        if not faults:
            self._verified |= {(step, item) for item in items or WHOLE}
        return faults

    def continue_from(self) -> int | None:
        """Return the last good step, verified, warning of damaged later ones; None for a new run.

        Raises Mistake when there are checkpoints and none is good.
        """
        good, broken = self._list()
        if not set(good) - {0} and all(why == manifest.EMPTY for why in broken.values()):
            self._report(broken)
            return None
        self._report(broken if not good else {s: w for s, w in broken.items() if s > max(good)})
        if not good:
            raise Mistake(
                f"no checkpoint in {self.folder} is whole, see above; to start anew, move it away"
            )
        self._saver.latest = self.find("latest", WHOLE)
        return self._saver.latest

    @property
    def steps(self) -> list[int]:
        """The steps that have a manifest, in order."""
        return sorted(self._list()[0])

    # --- reading

    def meta(self, step: int) -> dict[str, Any]:
        """Return what `save` was given as `meta`. Raises Mistake for a damaged manifest."""
        return self._manifest(step)["meta"]

    def _manifest(self, step: int) -> manifest.Manifest:  # raises Mistake where it is damaged
        try:
            return manifest.read(self._folder / str(step), step)
        except manifest.Damaged as error:
            raise Mistake(f"step {step} in {self.folder} is damaged: {error}") from None

    def restore(self, step: int, abstract: Any) -> Any:
        """Return the whole state in the shardings of `abstract`, whatever mesh has written it.

        Raises Mistake where a file is damaged, or the stored arrays differ from `abstract`.
        """
        items = {"params": abstract.params, "optimizer": _rest(abstract)}
        params, rest = self._read(step, items)
        return abstract.replace(
            step=rest["step"], params=params, opt_state=rest["opt"], health=rest["health"]
        )

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Return the weights alone; the optimizer, 2/3 of the bytes, is not read.

        Raises Mistake as `restore`.
        """
        return self._read(step, {"params": abstract_params})[0]

    def read_item(self, step: int, item: str) -> Any:
        """Return an item as it is stored, in NumPy arrays; nothing is verified."""
        import orbax.checkpoint as ocp  # as in `writing`

        folder = epath.Path(f"{self.folder}/{step}/{item}")
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(folder).tree
        numpy = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=numpy))

    def _read(self, step: int, items: dict[str, Any]) -> Sequence[Any]:
        import orbax.checkpoint as ocp  # as in `writing`

        if not self._verified >= {(step, item) for item in items}:
            self.find(str(step), items)
        stored = self._manifest(step)["tree"]
        stored = {name: x for name, x in stored.items() if name.split("/")[0] in items}
        expected = manifest.describe_tree(items)
        # Orbax would silently cast another dtype, and explain another shape at length.
        if differ := [n for n in {**stored, **expected} if stored.get(n) != expected.get(n)]:
            name, more = differ[0], f" (and {len(differ) - 1} more)" if differ[1:] else ""
            raise Mistake(
                f"step {step} in {self.folder} holds other arrays: {name} is {stored.get(name)}, "
                f"not {expected.get(name)}{more}; a run goes on with the arrays that it has: leave "
                "the keys that decide them, of model and optim, as they were, or choose another "
                "--run.out_dir"
            )
        return [
            ocp.StandardCheckpointHandler().restore(
                epath.Path(f"{self.folder}/{step}/{item}"), args=ocp.args.StandardRestore(tree)
            )
            for item, tree in items.items()
        ]


def _rest(state: Any) -> dict[str, Any]:
    """Return the part of the state that only a run that continues needs."""
    return {"opt": state.opt_state, "step": state.step, "health": state.health}


def open_checkpoints(out_dir: str | Path) -> Checkpoints:
    """Open a run's checkpoints to read, finished or not. Raises Mistake when there is no run."""
    if not is_run(out_dir):
        raise Mistake(
            f"{out_dir} is not the folder of a run: it has no {FOLDER}/; "
            "give the run.out_dir of a training run"
        )
    return Checkpoints(out_dir, read_only=True)
