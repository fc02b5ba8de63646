"""Every evaluation fetches results from the device, shows progress and returns Figures."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

# Name of a figure -> (value, standard error).
Figures = dict[str, tuple[float, float]]
# What was measured, its figures, and over how many of what, such as {"examples": 200}.
Result = tuple[str, Figures, dict[str, int]]


def fetch(results: Iterable[tuple[Array, ...]]) -> Iterator[list[np.ndarray]]:
    """Copy each batch's result to the host after the next batch has been dispatched.

    The device therefore never waits for the copy, and at most two batches are in memory.
    """
    dispatched: tuple[Array, ...] = ()
    for result in results:
        if dispatched:
            yield [np.asarray(x) for x in dispatched]
        dispatched = result
    if dispatched:
        yield [np.asarray(x) for x in dispatched]


def mean(samples: Any) -> tuple[float, float]:
    """Return the mean and its standard error, which is 0 for a single sample."""
    x = np.asarray(samples, np.float64)
    spread = x.std(ddof=1) if len(x) > 1 else 0.0
    return float(x.mean()), float(spread / math.sqrt(len(x)))


def progress(what: str, total: int, unit: str) -> tqdm:
    """Make a progress bar, which process 0 shows on stderr if that is a terminal.

    what: the bar's label; no bar is shown when it is "".
    """
    # None lets tqdm ask whether stderr is a terminal.
    disable = None if what and jax.process_index() == 0 else True
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=disable)
