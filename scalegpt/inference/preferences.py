"""Held-out pairs of answers say whether a model has learned which is better, as it trains."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from scalegpt.config import Config
from scalegpt.data.batches import EvalBatches
from scalegpt.data.packing import PackedRows
from scalegpt.data.token_files import Split
from scalegpt.inference.results import Figures, mean
from scalegpt.inference.text_loss import weighted, window_sums
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.objective import pair_figures


def batches_of(
    steps: Steps, rows: PackedRows, pairs: int | None = None, spread: bool = False
) -> EvalBatches:
    """Return the pairs of a split, or so many of them, as batches for `Steps.evaluate`."""
    microbatch = steps.layout[1]
    local = sharding.local_rows(steps.mesh, microbatch)
    return EvalBatches(rows, rows.width - 1, microbatch, local, pairs, spread)


def log_probabilities(steps: Steps, params: Any, rows: PackedRows, what: str = "") -> np.ndarray:
    """Return the log-probability of each row's answer, float32, the same in every process.

    what: the progress bar's label, "" for none.
    """
    return -window_sums(steps, params, batches_of(steps, rows), what)[0].astype(np.float32)


def pair_evaluator(
    config: Config,
    steps: Steps,
    splits: Sequence[Split],
    pairs: int | None,
    check_stop: Callable[[], None] = lambda: None,
    spread: bool = False,
) -> Callable[[Any], Figures]:
    """Return a function from parameters to loss, accuracy and margin over pairs.

    The figures of several splits are means by the weights of data.path, and NAME/loss is that of
    one. pairs: how many of each split, None for all. check_stop: called before each batch. spread:
    as of EvalBatches. The reference must be there when the function is called.
    """
    weights = list(config.data.weights.values())
    batches = [batches_of(steps, split.tokens, pairs, spread) for split in splits]
    figures_of = jax.jit(partial(pair_figures, config.dpo))

    def evaluate(params: Any) -> Figures:
        parts = []
        for split, part in zip(splits, batches, strict=True):
            sums, counts = window_sums(steps, params, part, check_stop=check_stop)
            reference = split.tokens.reference[[part.start(i) for i in range(part.windows)]]
            parts.append(figures_of(sums.astype(np.float32), reference, counts))
        figures = {
            name: weighted(weights, np.array([mean(part[name]) for part in parts]))
            for name in ("loss", "accuracy", "margin")
        }
        if len(splits) > 1:
            named = zip(splits, parts, strict=True)
            figures |= {f"{split.name}/loss": mean(part["loss"]) for split, part in named}
        return figures

    return evaluate
