"""What run.out_dir already holds, whether this run may continue it, and with what state."""

from pathlib import Path
from typing import Any, TextIO

from scalegpt.checkpoint import Checkpoints, open_checkpoints
from scalegpt.command_line import load, validate
from scalegpt.config import Config, curve_diff
from scalegpt.step import State, Steps

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes out of one folder
    fcntl = None


def lock(config: Config) -> TextIO:
    """Keep a second process out of run.out_dir until the file is closed, or this process ends.

    Raises ValueError when another process trains there already.
    """
    folder = Path(config.run.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise ValueError(f"cannot write to run.out_dir={folder}: {error}") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is training in {folder}; stop it, or choose another run.out_dir"
        ) from None
    return file


def stored_config(config: Config) -> Config | None:
    """The configuration that run.out_dir was started with, if it was.

    Raises ValueError when this one would change the loss curve.
    """
    path = config_path(config)
    if not path.exists():
        return None
    stored = validate(load(path), str(path))
    refuse_changes(config, curve_diff(stored, config))
    return stored


def check_same_run(config: Config, meta: dict[str, Any], stored: dict[str, Any]) -> float:
    """Raises ValueError when the checkpoint was trained on other data; gives its best loss."""
    # In order: a mixture deals its rows out by position, whatever the folders are called now.
    then = list(stored["data"].values())
    changes = [f"data {name}: other tokens" for i, (name, now) in enumerate(meta["data"].items())
               if then[i : i + 1] != [now]]  # fmt: skip
    refuse_changes(config, changes)
    return stored["best_loss"]


def refuse_changes(config: Config, changes: list[str]) -> None:
    if changes and not config.run.allow_config_change:
        raise ValueError(
            "\n  ".join([f"{config.run.out_dir} holds a run that differs:", *changes])
            + "\nchoose another --run.out_dir, or continue it all the same with "
            "--run.allow_config_change=true"
        )


def config_path(config: Config) -> Path:
    return Path(config.run.out_dir, "config.yaml")


def write_config(config: Config) -> None:
    path = config_path(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name("config.yaml.tmp")
        beside.write_text(config.to_yaml(), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write to run.out_dir={config.run.out_dir}: {error}") from None


def initial_state(
    config: Config,
    steps: Steps,
    checkpoints: Checkpoints,
    start: int,
    say: Any,
) -> State:
    """Of this run's own checkpoint, else of another run's weights, else random."""
    if start:
        say(f"continuing from step {start} in {checkpoints.folder}")
        return checkpoints.restore(start, steps.abstract)
    state = steps.init()
    if config.run.init_from is None:
        return state
    source = open_checkpoints(config.run.init_from)
    at = source.find(config.run.init_checkpoint)
    theirs = Config.model_validate(source.meta(at)["config"]).model.model_dump()
    ours = config.model.model_dump()
    shaping = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple",
               "bias", "tie_word_embeddings", "position", "rope_base", "activation")  # fmt: skip
    if differ := [f"model.{k}: {theirs[k]} -> {ours[k]}" for k in shaping if theirs[k] != ours[k]]:
        raise ValueError(
            f"run.init_from={config.run.init_from} holds another model: {'; '.join(differ)}"
        )
    say(f"weights from {config.run.init_from}, step {at}")
    return state.replace(params=source.restore_params(at, steps.abstract.params))
