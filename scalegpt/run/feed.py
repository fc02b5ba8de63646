"""Read the batches of a run's updates and put them on the devices."""

from collections.abc import Iterator

import jax

from scalegpt.config import Config
from scalegpt.data.batches import train_iterator
from scalegpt.data.datasets import train_batches
from scalegpt.data.token_files import Dataset
from scalegpt.step import sharding
from scalegpt.step.build import Steps


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
