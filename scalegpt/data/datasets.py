"""From a run's configuration to its data sets and to the windows of each update; no device."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scalegpt.config import Config
from scalegpt.config.presets import recipe
from scalegpt.data.batches import TrainBatches
from scalegpt.data.token_files import Dataset, check_tokens, open_dataset
from scalegpt.errors import Mistake


def open_datasets(config: Config, alive: Callable[[], None] = lambda: None) -> list[Dataset]:
    """Open and check every data set, preparing what is missing if the config says so.

    alive: called now and then while data are prepared, which may well take hours.
    """
    datasets = []
    for path in config.data.weights:
        if config.data.prepare and "://" not in path:
            _prepare(Path(path).expanduser(), alive)
        dataset = open_dataset(path, config.data.cache_dir)
        check_tokens(dataset, config.model.block_size)
        if datasets and dataset.tokenizer != datasets[0].tokenizer:
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

    A script that lies in the folder is not run, for data may come from anywhere.
    """
    script = recipe(folder.name)
    interrupted = (folder / "meta.json.partial").exists()
    whole = all((folder / name).is_file() for name in ("train.bin", "val.bin")) and not interrupted
    if script is None or whole:
        return
    if _run([sys.executable, str(script), "--out", str(folder)], alive):
        raise Mistake(f"{script} could not prepare the data, see above")


def _run(argv: list[str], alive: Callable[[], None]) -> int:
    """The command's exit code; it shows its own progress."""
    with subprocess.Popen(argv) as process:
        while True:
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                alive()


def train_batches(
    config: Config, datasets: list[Dataset], accumulation: int, rows: np.ndarray
) -> TrainBatches:
    """The batches of a run by step, of which the `rows` of each microbatch are read."""
    return TrainBatches(
        [d.train for d in datasets],
        list(config.data.weights.values()),
        config.model.block_size,
        config.run.seed,
        config.batch.sequences,
        accumulation,
        rows,
    )


def windows_of(config: Config, datasets: list[Dataset], done: int) -> list[tuple[str, int]]:
    """(data set, first token) of every row of the batch of update `done`, over all hosts."""
    everything = np.arange(config.batch.sequences)
    which, starts = train_batches(config, datasets, 1, everything).windows(done - 1)
    names = [d.name for d in datasets]
    return [(names[d], start) for d, start in zip(which.tolist(), starts.tolist(), strict=True)]
