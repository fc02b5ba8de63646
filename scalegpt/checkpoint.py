"""Checkpoints by Orbax: what a run needs to continue bitwise, and weights alone for everybody else.

A step's folder holds three items: `params`; `optimizer` (its state and the step); and `meta`, JSON
with the resolved config, the tokenizer, the data's fingerprint and the best loss so far. There is
no position in the data: the batch of a step follows from seed and step. Step 0, weights that were
imported, has no `optimizer`.
"""

import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from scalegpt.step import State

FOLDER = "checkpoints"
_VAL_LOSS = "val_loss"


class Checkpoints:
    """The checkpoints of a run: the last `keep`, and the one with the lowest validation loss.

    Saving returns as soon as the state is copied; the rest happens while training goes on.
    """

    def __init__(self, out_dir: str | Path, keep: int = 1, read_only: bool = False) -> None:
        # Orbax reports each phase of each save to the root logger; a user has asked for none.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(out_dir).absolute() / FOLDER
        # best_fn with max_to_keep would delete the latest checkpoint when it is not the best.
        policy = managers.AnyPreservationPolicy(
            [
                managers.LatestN(keep),
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics[_VAL_LOSS],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[_VAL_LOSS],
            best_mode="min",
            read_only=read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("params", "optimizer", "meta")
            )
        except OSError as error:
            raise ValueError(f"cannot write to run.out_dir={out_dir}: {error}") from None

    def save(self, state: State, step: int, meta: dict[str, Any], val_loss: float | None) -> None:
        """Save once `step`; val_loss: of an evaluation at just this step, makes it a candidate."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_rest(state)),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if val_loss is None else {_VAL_LOSS: val_loss},
            force=True,
        )

    def save_weights(self, params: Any, meta: dict[str, Any]) -> None:
        """Weights alone, as step 0, which no run has: something to start from, not to continue."""
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        self._manager.save(0, args=ocp.args.Composite(**items), force=True)
        self.wait()

    def find(self, which: str) -> int:
        """best, latest or a number -> the step. Raises ValueError naming those that there are.

        Of weights that were imported, which nobody has evaluated, the best are those.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ValueError(f"there is no checkpoint in {self.folder}")
        step = steps[-1] if which == "latest" else None
        if which == "best":
            step = 0 if steps == [0] else self._manager.best_step()
        elif which.isdigit() and int(which) in steps:
            step = int(which)
        if step is None:
            listed = ", ".join(map(str, steps))
            raise ValueError(f"no checkpoint {which!r} in {self.folder}; there are steps {listed}")
        return step

    @property
    def steps(self) -> list[int]:
        """Of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step to continue from, None for a new run."""
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def restore(self, step: int, abstract: State) -> State:
        """The whole state, in the shardings of `abstract`, whatever mesh has written it."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(_rest(abstract)),
            ),
        )
        rest = items["optimizer"]
        return State(rest["step"], items["params"], rest["opt"], rest["health"])

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Weights only; the optimizer's two thirds of the bytes are not read."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=args)["params"]

    def wait(self) -> None:
        """Until everything asked for is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()


def _rest(state: State) -> dict[str, Any]:
    """What only a run that continues needs."""
    return {"opt": state.opt_state, "step": state.step, "health": state.health}


def is_run(folder: str | Path) -> bool:
    """Whether it is the folder of a run, or of imported weights, and not of Hugging Face's kind."""
    return Path(folder, FOLDER).is_dir()


def open_checkpoints(out_dir: str | Path) -> Checkpoints:
    """To read from a run, finished or not. Raises ValueError when there is none."""
    if not is_run(out_dir):
        raise ValueError(
            f"{out_dir} is not the folder of a run: it has no {FOLDER}/; "
            "give the run.out_dir of a training run"
        )
    return Checkpoints(out_dir, read_only=True)
