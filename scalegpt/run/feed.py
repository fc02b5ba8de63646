"""Read the batches of a run's updates and put them on the devices."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from scalegpt.config import Config
from scalegpt.config.limits import VOID
from scalegpt.data.batches import train_iterator
from scalegpt.data.datasets import train_batches
from scalegpt.data.token_files import Dataset
from scalegpt.processes.phases import Phases
from scalegpt.run.rewarded import rewarded_source
from scalegpt.step import sharding
from scalegpt.step.build import Steps
from scalegpt.step.objective import Batch
from scalegpt.step.update import State

# From the state before an update and its number to its batch, and figures for its row.
Source = Callable[[State, int], tuple[Batch, dict[str, Any]]]


def source(
    config: Config,
    datasets: list[Dataset],
    steps: Steps,
    start: int,
    phases: Phases,
    check_stop: Callable[[], None] = lambda: None,
    reference: Any = None,
) -> Source:
    """Return where the batches of the updates after `start` come from, which are asked in order.

    check_stop, reference: as of `rewarded_source`.
    """
    if config.objective.name == "grpo":
        return rewarded_source(config, datasets, steps, phases, check_stop, reference)
    batches = batches_from(config, datasets, steps, start)

    def read(state: State, step: int) -> tuple[Batch, dict[str, Any]]:
        # Meanwhile the device computes the update before, so that it need not wait for this batch.
        with phases("wait for data"):
            return next(batches), {}

    return read


def void_batch(config: Config, steps: Steps, step: int) -> Batch:
    """Return what a process gives to update `step` if it cannot read its rows of it.

    The others may be computing that update already, and can only learn from it that it is void.
    """
    microbatch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, microbatch)
    size = config.batch.sequences_at(step) // microbatch, len(rows)

    def void(one: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.full((*size, *one.shape), VOID, one.dtype)
        return sharding.to_global(values, rows, steps.batch_sharding, microbatch)

    return jax.tree.map(void, steps.objective.row)


def batches_from(
    config: Config, datasets: list[Dataset], steps: Steps, start: int
) -> Iterator[Batch]:
    """Yield the global batch [A, M, ...] of each update after `start`, already on the devices.

    A process reads the rows of its own devices only.
    """
    microbatch = steps.layout[1]
    rows = sharding.local_rows(steps.mesh, microbatch)
    source = train_batches(config, datasets, microbatch, rows)
    put = partial(sharding.to_global, rows=rows, sharding=steps.batch_sharding, total=microbatch)
    for batch in train_iterator(source, start, config.data.prefetch):
        yield jax.tree.map(put, batch)
