"""A run's configuration decides its data sets and the windows of each update; no device."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scalegpt.config import Config
from scalegpt.config.presets import recipe
from scalegpt.data import tokenizer
from scalegpt.data.batches import TrainBatches
from scalegpt.data.token_files import Dataset, check_tokens, open_dataset
from scalegpt.errors import Mistake
from scalegpt.files.folder import expanded


def open_datasets(config: Config, alive: Callable[[], None] = lambda: None) -> list[Dataset]:
    """Open and check every data set, preparing those that are missing if data.prepare says so.

    alive: called every ten seconds while data are prepared, which can take hours; it keeps the
    deadline of this phase away. Raises Mistake.
    """
    datasets = []
    for path in config.data.weights:
        if config.data.prepare and "://" not in path:
            _prepare(expanded(path), alive)
        dataset = open_dataset(path, config.data.cache_dir)
        check_tokens(dataset, config.model.block_size)
        if datasets and not tokenizer.same(dataset.tokenizer, datasets[0].tokenizer):
            raise Mistake(
                f"{dataset.name} and {datasets[0].name} have different tokenizers; "
                "prepare the data sets of a mixture with the same one"
            )
        if any(dataset.name == other.name for other in datasets):
            raise Mistake(
                f"two data sets of the mixture are both named {dataset.name}, as their folders "
                f"are; rename one, for val/{dataset.name}/loss is of one"
            )
        datasets.append(dataset)
    return datasets


def _prepare(folder: Path, alive: Callable[[], None]) -> None:
    """Make the data set by scalegpt's own recipe of the folder's name, unless it is there.

    A script that lies in the folder is not run, because data may come from anywhere.
    """
    script = recipe(folder.name)
    interrupted = (folder / "meta.json.partial").exists()
    whole = all((folder / name).is_file() for name in ("train.bin", "val.bin")) and not interrupted
    if script is None or whole:
        return
    if _run([sys.executable, str(script), "--out", str(folder)], alive):
        raise Mistake(f"{script} could not prepare the data, see above")


def _run(argv: list[str], alive: Callable[[], None]) -> int:
    """Run a command, which shows its own progress, and return its exit code."""
    with subprocess.Popen(argv) as process:
        while True:
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                alive()


def train_batches(
    config: Config, datasets: list[Dataset], microbatch: int, rows: np.ndarray
) -> TrainBatches:
    """Return the batches of a run by step; of each microbatch only `rows` are read.

    microbatch: its sequences over all devices.
    """
    return TrainBatches(
        [d.train for d in datasets],
        list(config.data.weights.values()),
        config.model.block_size,
        config.run.seed,
        config.batch,
        microbatch,
        rows,
    )


def windows_of(config: Config, datasets: list[Dataset], update: int) -> list[tuple[str, int]]:
    """Return (data set, first token) of every row of an update's batch; updates count from 1."""
    indices, starts = train_batches(config, datasets, 1, np.zeros(1, int)).windows(update - 1)
    names = [d.name for d in datasets]
    return [(names[d], start) for d, start in zip(indices.tolist(), starts.tolist(), strict=True)]
