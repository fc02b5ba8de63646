"""What run.out_dir already holds, whether this run may continue it, and with what state."""

import math
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from scalegpt import hf, manifest, run_folder, storage, tokenizer
from scalegpt.checkpoint import PARAMS, Checkpoints, open_checkpoints
from scalegpt.command_line import load, validate
from scalegpt.config import Config
from scalegpt.run_folder import FOLDER, has_imported_weights, is_run
from scalegpt.step import State, Steps


def lock(config: Config) -> TextIO:
    """Keep a second process out of run.out_dir until the file is closed, or this process ends.

    Raises ValueError when another process trains there already.
    """
    folder = run_folder.local(config.run.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return storage.hold(folder / ".lock", wait=False)
    except BlockingIOError:
        raise ValueError(
            f"another process is training in {folder}; stop it, or choose another run.out_dir"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write to run.out_dir={folder}: {error}") from None


def stored_config(config: Config, tokenizer_spec: Any = None) -> Config | None:
    """The configuration that run.out_dir was started with, if it was; it makes nothing.

    tokenizer_spec: the data's. Raises ValueError when this run would change the loss curve of the
    stored one, or cannot start from run.init_from.
    """
    out_dir = config.run.out_dir
    path = run_folder.fetch(out_dir, jax.process_index() == 0) / "config.yaml"
    stored = None
    if not path.exists() or not path.stat().st_size:  # gone, or as a power cut may leave it
        stored = _from_checkpoints(out_dir)
    if stored is None and path.exists():
        stored = validate(load(path), str(path))
    if stored is None:
        if (rows := path.with_name("metrics.jsonl")).is_file() and rows.stat().st_size:
            raise ValueError(f"{rows} is another run's: choose a new run.out_dir, or move it away")
        if config.run.init_from:
            _check_init_from(config, tokenizer_spec)
        return None
    if has_imported_weights(out_dir):
        raise ValueError(
            f"{out_dir} holds imported weights, which are no run to continue; to start from them: "
            f"--run.init_from={out_dir} --run.out_dir=another"
        )
    refuse_changes(config, curve_diff(stored, config))
    return stored


def _from_checkpoints(out_dir: str) -> Config | None:
    # Not through Checkpoints, where processes agree: only some may find the folder there already,
    # which the first has just made, and would ask for an answer that nobody gives.
    found = manifest.steps(storage.folder(out_dir) / FOLDER)
    good = [content for step, content in found.items() if step and not isinstance(content, str)]
    return validate(good[-1]["meta"]["config"], out_dir) if good else None


# Keys of the compared sections that change speed or memory, never the loss curve.
_NEUTRAL = {
    *("model.preset", "model.depth", "model.attention", "model.scan_layers", "model.remat"),
    "model.loss_chunk",
    *("batch.microbatch", "data.path", "data.prepare", "data.prefetch", "data.cache_dir"),
}


def curve_diff(stored: Config, asked: Config) -> list[str]:
    """Keys that would change the loss curve, as `key: stored -> asked`.

    Of the data's path only a mixture's weights are among them: checkpoints carry a fingerprint
    of the files themselves.
    """
    old, new = stored.model_dump(), asked.model_dump()
    lines = [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section in ("model", "batch", "data", "optim")
        for key, value in new[section].items()
        if f"{section}.{key}" not in _NEUTRAL and old[section][key] != value
    ]
    shares = [list(c.data.weights.values()) for c in (stored, asked)]
    if shares[0] != shares[1]:
        lines.append(f"data.path: {stored.data.path} -> {asked.data.path}")
    if stored.run.seed != asked.run.seed:
        lines.append(f"run.seed: {stored.run.seed} -> {asked.run.seed}")
    return lines


# Keys of a model that may differ where weights are taken over, besides those of its speed.
NOT_SHAPING = {
    *(key.partition(".")[2] for key in _NEUTRAL if key.startswith("model.")),
    *("dtype", "dropout", "init", "block_size", "vocab_multiple"),
}


def open_to_save(config: Config) -> Checkpoints:
    """The run's own checkpoints; the small files of its folder go along with each."""
    section = config.checkpoint
    return Checkpoints(
        config.run.out_dir, section.keep, section.keep_every, section.patience,
        config.run.deadline_save, before_commit=partial(run_folder.push, config.run.out_dir),
    )  # fmt: skip


def check_same_run(config: Config, meta: dict[str, Any], stored: dict[str, Any]) -> float:
    """Raises ValueError when the checkpoint was trained on other data; gives its best loss."""
    # In order: a mixture deals its rows out by position, whatever the folders are called now.
    then = list(stored["data"].values())
    changes = [f"data {name}: other tokens" for i, (name, now) in enumerate(meta["data"].items())
               if then[i : i + 1] != [now]]  # fmt: skip
    refuse_changes(config, changes)
    return math.inf if stored["best_loss"] is None else stored["best_loss"]


def refuse_changes(config: Config, changes: list[str]) -> None:
    if changes and not config.run.allow_config_change:
        raise ValueError(
            "\n  ".join([f"{config.run.out_dir} holds a run that differs:", *changes])
            + "\nchoose another --run.out_dir, or continue it all the same with "
            "--run.allow_config_change=true"
        )


def config_path(config: Config) -> Path:
    return run_folder.local(config.run.out_dir) / "config.yaml"


def write_config(config: Config) -> None:
    path = config_path(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.folder(path.parent).write(path.name, config.to_yaml().encode())
    except OSError as error:
        raise ValueError(f"cannot write to run.out_dir={config.run.out_dir}: {error}") from None
    run_folder.push_or_explain(config.run.out_dir)


def initial_state(
    config: Config,
    steps: Steps,
    checkpoints: Checkpoints,
    start: int,
    say: Any,
) -> State:
    """Of this run's own checkpoint, else with the weights of run.init_from, else random."""
    if start:
        say(f"continuing from step {start} in {checkpoints.folder}")
        return checkpoints.restore(start, steps.abstract).swapped()
    state = steps.init()
    if config.run.init_from is None:
        return state
    state = state.replace(params=None)  # else there would be two copies of the model
    if is_run(config.run.init_from):
        source = open_checkpoints(config.run.init_from)
        at = source.find(config.run.init_checkpoint, PARAMS)
        params = _restore_cropped(source, at, config, steps.abstract.params)
        source.close()
        name = f"{config.run.init_from}, step {at}"
    else:
        folder = hf.locate(config.run.init_from)
        params = hf.load_params(folder, config.model, steps.abstract.params)
        name = config.run.init_from
    say(f"weights from {name}")
    state = state.replace(params=params)
    if config.optim.average:  # of one set of weights so far, these
        state = state.swapped().replace(params=jax.tree.map(jnp.copy, params))
    return state


def _restore_cropped(source: Checkpoints, at: int, config: Config, abstract: Any) -> Any:
    """A run's weights, of its positions only as many as this run has."""
    theirs = validate(source.meta(at)["config"], f"step {at} of {source.folder}").model
    if config.model.position != "learned" or theirs.block_size == config.model.block_size:
        return source.restore_params(at, abstract)
    wpe = abstract["wpe"]
    all_of_it = jax.ShapeDtypeStruct(
        (theirs.block_size, wpe.shape[1]), wpe.dtype, sharding=wpe.sharding
    )
    params = source.restore_params(at, {**abstract, "wpe": all_of_it})
    crop = jax.jit(lambda x: x[: config.model.block_size], out_shardings=wpe.sharding)
    return {**params, "wpe": crop(params["wpe"])}


def _check_init_from(config: Config, tokenizer_spec: Any) -> None:
    """That run.init_from is there and holds a model of this shape, for the same tokens.

    It may have more positions than this one and, of Hugging Face's format, other padding.
    Raises ValueError naming the keys to set.
    """
    source = config.run.init_from
    shaping = [key for key in type(config.model).model_fields if key not in NOT_SHAPING]
    if is_run(source):
        checkpoints = open_checkpoints(source)
        meta = checkpoints.meta(checkpoints.find(config.run.init_checkpoint))
        checkpoints.close()
        theirs, spec = validate(meta["config"], source).model, meta["tokenizer"]
        shaping += ["vocab_multiple"]
    else:
        try:
            theirs, spec = hf.describe(hf.locate(source))
        except ValueError as error:
            raise ValueError(
                f"{source} is not the folder of a run: it has no {FOLDER}/; nor can it be read as "
                f"a model of Hugging Face: {error}"
            ) from None
    if theirs.block_size < config.model.block_size:
        shaping += ["block_size"]
    then, now = theirs.model_dump(), config.model.model_dump()
    if differ := [key for key in shaping if then[key] != now[key]]:
        changes = "; ".join(f"model.{key}: {then[key]} -> {now[key]}" for key in differ)
        keys = " ".join(f"--model.{key}={_shown(then[key])}" for key in differ)
        raise ValueError(
            f"run.init_from={source} holds another model: {changes}\nto start from it set {keys}"
        )
    known = spec is not None and tokenizer_spec is not None
    if known and not tokenizer.same(spec, tokenizer_spec) and not config.run.allow_config_change:
        raise ValueError(
            f"run.init_from={source} was trained on tokens of {tokenizer.kind(spec)}, the data has "
            f"those of another tokenizer, {tokenizer.kind(tokenizer_spec)}; prepare it again, or "
            "start all the same with --run.allow_config_change=true"
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
