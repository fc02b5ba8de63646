"""What all evaluations share: figures, results read one batch behind, a progress bar."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax import Array
from tqdm import tqdm


def fetch(results: Iterable[tuple[Array, ...]]) -> Iterator[list[np.ndarray]]:
    """Each result on the host, read when the next is under way: no device waits for the reading,
    and no more than two batches are held."""
    before: tuple[Array, ...] = ()
    for result in results:
        if before:
            yield [np.asarray(x) for x in before]
        before = result
    if before:
        yield [np.asarray(x) for x in before]


def progress(what: str, total: int, unit: str) -> tqdm:
    """A bar on stderr where that is a terminal and there is something to say; else nothing."""
    shown = None if what and jax.process_index() == 0 else True
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=shown)


# Name -> (value, standard error).
Figures = dict[str, tuple[float, float]]
