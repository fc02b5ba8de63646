"""Read the batches of a run's updates and put them on the devices."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from scalegpt.config import Config
from scalegpt.data.batches import train_iterator
from scalegpt.data.datasets import train_batches
from scalegpt.data.token_files import Dataset
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.objective import Batch
from scalegpt.step.update import State

# From the state before an update and its number to its batch, and figures for its row.
Source = Callable[[State, int], tuple[Batch, dict[str, Any]]]


def source(config: Config, datasets: list[Dataset], steps: Steps, start: int) -> Source:
    """Return where the batches of the updates after `start` come from, which are asked in order."""
    batches = batches_from(config, datasets, steps, start)
    return lambda state, step: (next(batches), {})


def batches_from(
    config: Config, datasets: list[Dataset], steps: Steps, start: int
) -> Iterator[jax.Array]:
    """Yield the global batch [A, M, T+1] of each update after `start`, already on the devices.

    A process reads the rows of its own devices only.
    """
    microbatch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, microbatch)
    source = train_batches(config, datasets, microbatch, rows)
    for batch in train_iterator(source, start, config.data.prefetch):
        yield sharding.to_global(batch, rows, steps.batch_sharding, microbatch)
