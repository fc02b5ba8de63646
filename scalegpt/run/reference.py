"""The reference of a run that learns from pairs: what its first weights thought of each answer.

Only its log-probabilities are needed, one number for each answer. They are computed once, by a pass
over the data before the first update, and kept in the run's folder, so that no second model is in
memory while the run trains.
"""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scalegpt.config import Config
from scalegpt.data.packing import PackedRows
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake, counted
from scalegpt.files import run_folder
from scalegpt.files.folder import replace_file
from scalegpt.inference.preferences import log_probabilities
from scalegpt.processes.agreement import Deadline, gather
from scalegpt.step.build import Steps
from scalegpt.step.update import State
from scalegpt.weights import init_from


def set_reference(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    state: State,
    start: int,
    weights: str | None,
    say: Callable[[str], Any],
) -> str:
    """Give each pair its reference, and return the fingerprint of the weights that it is of.

    It is read from the run's folder, or computed and, unless this is a replay, written there.
    start: the update that the run continues from, with weights of this fingerprint at its begin; at
    0 these are those of `state`. Every process must call this together. Raises Mistake where the
    folder has the reference of other data or weights, and run.init_from other weights now.
    """
    params = None if start else state.params
    if start and weights is None:
        params = init_from.first_weights(config, steps.abstract.params, None)
    weights = weights or init_from.fingerprint(params)
    data = [d.fingerprint for d in datasets]
    facts = {"data": data, "weights": weights, "dtype": str(steps.model.dtype)}
    facts |= {"width": config.row_width, "block_size": config.model.block_size}
    splits = [rows for d in datasets for rows in (d.train, d.val)]
    file = run_folder.local(config.run.out_dir) / run_folder.REFERENCE
    stored, problem = None, None
    try:
        stored = _read(file, facts, splits, replaced=not start or config.run.allows("data.path"))
    except Mistake as error:
        problem = str(error)
    here = problem, None if stored is None else hashlib.sha256(stored.tobytes()).hexdigest()
    everywhere = gather("reference", here, Deadline(config.run.deadline_restore))
    if problem := next((text for text, _ in everywhere if text), None):
        raise Mistake(problem)
    if stored is None or any(digest != here[1] for _, digest in everywhere):
        if params is None:
            params = init_from.first_weights(config, steps.abstract.params, weights)
        rows = counted(sum(map(len, splits)), "answer")
        say(f"reference: what the weights of {config.run.init_from} think of {rows}")
        parts = [log_probabilities(steps, params, x, f"reference of {x.name}") for x in splits]
        stored = np.concatenate(parts)
        if jax.process_index() == 0 and not config.run.replay:
            _write(config, facts, stored)
    ends = np.cumsum([len(rows) for rows in splits])
    for rows, values in zip(splits, np.split(stored, ends[:-1]), strict=True):
        rows.reference[:] = values
    return weights


def _read(file: Any, facts: dict, splits: list[PackedRows], replaced: bool) -> np.ndarray | None:
    """Return what a run's folder has, or None if that is nothing or, where it may be replaced, of
    other data, weights or numbers than `facts` says. Raises Mistake."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            stored, values = json.loads(str(arrays["facts"])), arrays["log_probabilities"]
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib, NumPy and json have their own
        raise Mistake(
            f"{file} is damaged ({type(error).__name__}): remove it, and it is computed again"
        ) from None
    if stored == facts and values.shape == (sum(map(len, splits)),):
        return values
    same = all(stored.get(key) == facts[key] for key in ("data", "weights"))
    if replaced or same:
        return None
    raise Mistake(
        f"{file} is the reference of other data or weights than this run's: put its own back, or "
        "remove it, and it is computed again from run.init_from"
    )


def _write(config: Config, facts: dict, values: np.ndarray) -> None:
    folder, buffer = run_folder.local(config.run.out_dir), io.BytesIO()
    np.savez(buffer, facts=json.dumps(facts), log_probabilities=values)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / run_folder.REFERENCE, buffer.getvalue())
    except OSError as error:
        raise Mistake(f"cannot write to run.out_dir={config.run.out_dir}: {error}") from None
