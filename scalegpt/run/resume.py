"""Find out what run.out_dir holds, whether this run may continue it, and with what state."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from filelock import AcquireReturnProxy, FileLock, Timeout

from scalegpt.checkpoints import manifest
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import Config
from scalegpt.config.architectures import LATER, PRESETS
from scalegpt.config.depth import RATES
from scalegpt.config.differences import curve_diff
from scalegpt.config.loading import load, validate
from scalegpt.config.recipe import MUON_WITH
from scalegpt.data.token_files import Dataset
from scalegpt.errors import Mistake
from scalegpt.files import run_folder
from scalegpt.files.folder import open_folder
from scalegpt.files.run_folder import FOLDER, has_imported_weights
from scalegpt.model.lora import is_adapter, joined, parted
from scalegpt.run.history import read_rows
from scalegpt.step.build import Steps
from scalegpt.step.update import State
from scalegpt.weights import init_from


def lock(config: Config) -> AcquireReturnProxy:
    """Keep other processes out of run.out_dir until a `with` block or this process ends.

    Raises Mistake when another process trains there already.
    """
    folder = run_folder.local(config.run.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise Mistake(
            f"another process is training in {folder}; stop it, or choose another run.out_dir"
        ) from None
    except OSError as error:
        raise Mistake(f"cannot write to run.out_dir={folder}: {error}") from None


def with_model(config: Config) -> Config:
    """Return the run with its model's shape, where that follows from the weights it begins with.

    A run that continues asks its own checkpoint, as run.init_from may be gone; and if its preset
    and depth are still the same, it keeps what these had when it began, of what is not given.
    Raises Mistake.
    """
    preset, muon = config.model.preset or "", config.optim.name == "muon"
    sections = {
        "model": LATER & PRESETS.get(preset, {}).keys(),
        "optim": set(MUON_WITH.get(preset, {}) if muon else {}),
    }
    if config.model.depth and muon:  # AdamW's rates do not follow from the depth
        sections["optim"] |= RATES
    if not (config.run.init_from or any(sections.values())):
        return config
    good = _good_checkpoints(config.run.out_dir)
    stored = validate(good[-1]["config"], config.run.out_dir) if good else None
    if config.run.init_from:
        model = stored.model if stored else init_from.source_model(config)[0]
        config = init_from.shaped_as(model, config)
    asked = config.model
    same = stored and (stored.model.preset, stored.model.depth) == (asked.preset, asked.depth)
    for name, keys in sections.items() if same else ():
        own, begun = getattr(config, name), getattr(stored, name)
        kept = {key: getattr(begun, key) for key in keys - own.model_fields_set}
        config = config.model_copy(update={name: own.model_copy(update=kept)})
    return config


def stored_config(
    config: Config, datasets: Sequence[Dataset] = (), say: Callable[[str], Any] = print
) -> Config | None:
    """Return the configuration that run.out_dir was started with, or None; no file is made.

    A start that came to no update is not held against another; `say` is told. Raises Mistake when
    this run would change the loss curve of the stored one, or cannot start from run.init_from.
    """
    out_dir = config.run.out_dir
    path = run_folder.fetch(out_dir, jax.process_index() == 0) / "config.yaml"
    stored = None
    if not path.exists() or not path.stat().st_size:  # deleted, or empty after a power cut
        good = _good_checkpoints(out_dir)
        stored = validate(good[-1]["config"], out_dir) if good else None
    if stored is None and path.exists():
        stored = validate(load(path), str(path))
    if stored is None:
        if (rows := path.with_name("metrics.jsonl")).is_file() and rows.stat().st_size:
            raise Mistake(f"{rows} is another run's: choose a new run.out_dir, or move it away")
        _check_init_from(config, datasets)
        return None
    if has_imported_weights(out_dir):
        raise Mistake(
            f"{out_dir} holds imported weights, which are no run to continue; to start from them: "
            f"--run.init_from={out_dir} --run.out_dir=another"
        )
    if curve_diff(stored, config):
        left = {str(x) for x in manifest.steps(open_folder(out_dir) / FOLDER).values()}
        updated = any(row["step"] for row in read_rows(open_folder(path.parent)))
        if updated or left - {manifest.EMPTY, manifest.NEVER_FINISHED}:
            refuse_changes(config, differences(stored, config, datasets))
        else:
            say(f"an earlier start in {out_dir} came to no update; this one takes its place")
    if not _good_checkpoints(out_dir):
        _check_init_from(config, datasets)
    return stored


def _check_init_from(config: Config, datasets: Sequence[Dataset]) -> None:
    if config.run.init_from:
        init_from.check(config, datasets[0].tokenizer if datasets else None)


def differences(stored: Config, config: Config, datasets: Sequence[Dataset]) -> list[str]:
    """Return the keys that would change the stored run's curve, and data with other tokens."""
    changes, good = curve_diff(stored, config), _good_checkpoints(config.run.out_dir)
    return changes + (_other_data(good[-1], data_marks(config, datasets)) if good else [])


def _good_checkpoints(out_dir: str) -> list[dict[str, Any]]:
    """Return what the run's checkpoints say about it, in the order of their steps."""
    # Read without Checkpoints, in which processes agree: the first process may have made the folder
    # just now, so that only some find it, and those would wait for the others for ever.
    contents = manifest.steps(open_folder(out_dir) / FOLDER)
    return [x["meta"] for step, x in contents.items() if step and not isinstance(x, str)]


def data_marks(config: Config, datasets: Sequence[Dataset]) -> dict[str, dict[str, str]]:
    """Return what a run remembers of its data, by name: the mark of each data set's tokens, and of
    its index where the run treats documents as such."""
    plain = config.data.shuffle == config.data.pack == "windows" and not config.data.document_mask
    return {
        "data": {d.name: d.fingerprint for d in datasets},
        "index": {d.name: d.index for d in datasets if not plain},
    }


def _other_data(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Name the data sets whose tokens are not the stored run's, and those whose tokens are, but in
    other documents, from the marks of both. Runs of before have none of an index."""
    # Compared by position, not by name: a mixture deals its rows out by position.
    tokens, ends = ([*stored.get(key, {}).values()] for key in ("data", "index"))
    changes = []
    for i, (name, mark) in enumerate(given["data"].items()):
        if tokens[i : i + 1] != [mark]:
            changes.append(f"data.path: other tokens in {name}")
        elif ends and given.get("index", {}).get(name, ends[i]) != ends[i]:
            changes.append(f"data.path: the same tokens in other documents in {name}")
    return changes


def open_to_save(config: Config) -> Checkpoints:
    """Open the run's own checkpoints; each save also pushes the small files of its folder."""
    section = config.checkpoint
    return Checkpoints(
        config.run.out_dir,
        section.keep,
        section.keep_every,
        section.patience,
        config.run.deadline_save,
        before_commit=partial(run_folder.push, config.run.out_dir),
    )


def carry_over(
    config: Config,
    meta: dict[str, Any],
    stored: dict[str, Any],
    step: int,
    say: Callable[[str], Any],
) -> list[str]:
    """Take into `meta` what the checkpoint of `step` has stored of the run, where it still holds.

    Returns the keys that have changed since, as `key: old -> new`, which `meta` keeps too. Raises
    Mistake if run.allow_config_change does not allow them.
    """
    other_data = _other_data(stored, meta)
    # config.yaml may have these changes already: a start that was killed has left it.
    changes = other_data + curve_diff(validate(stored["config"], config.run.out_dir), config)
    refuse_changes(config, changes)
    meta["changes"] = stored.get("changes", []) + [[step, change] for change in changes]
    meta["evaluation_due"] = stored.get("evaluation_due", False)
    if changes:
        say("\n  ".join([f"changed after step {step}, as allowed:", *changes]))
    if stored["best_loss"] is not None:
        finished = step >= config.optim.steps  # and nothing will be measured
        if finished or not other_data and manifest.measure(stored) == manifest.measure(meta):
            meta["best_loss"] = stored["best_loss"]
        else:
            say(
                f"the best {config.goal} so far, {config.as_goal(stored['best_loss']):.4f}, was "
                "measured on other text, windows or masks; the best is sought anew"
            )
    return changes


def refuse_changes(config: Config, changes: list[str]) -> None:
    """Raise Mistake unless run.allow_config_change allows the keys of all changes.

    A replay, which writes nothing, may have any.
    """
    keys = list(dict.fromkeys(change.partition(":")[0] for change in changes))
    if not config.run.replay and not all(map(config.run.allows, keys)):
        raise Mistake(
            "\n  ".join([f"{config.run.out_dir} holds a run that differs:", *changes])
            + "\nchoose another --run.out_dir (or remove this one, if it was a trial), or continue "
            "it all the same with "
            f"--run.allow_config_change={','.join(keys)}"
        )


def lasting(config: Config) -> Config:
    """Return the configuration as a run keeps it: leave to change something is for one start."""
    run = config.run.model_copy(update={"allow_config_change": False})
    return config.model_copy(update={"run": run})


def write_config(config: Config) -> None:
    """Write config.yaml, which marks a run that may be continued. Raises Mistake."""
    path = run_folder.local(config.run.out_dir) / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open_folder(path.parent).write(path.name, lasting(config).to_yaml().encode())
    except OSError as error:
        raise Mistake(f"cannot write to run.out_dir={config.run.out_dir}: {error}") from None
    run_folder.push_or_explain(config.run.out_dir)


def rows_to_keep(start: int, total: int, begun_before: bool) -> int | None:
    """Return the step up to which metrics.jsonl keeps the rows that earlier processes have written.

    None: the run is new, and there are none. -1: it was begun before but nothing was saved, so that
    every row goes. `start`, the step of the checkpoint: later rows are done again. `start` + 1: the
    run is finished, and what its end wrote about `start` stays too.
    """
    if start >= total:
        return start + 1
    if start:
        return start
    return -1 if begun_before else None


def initial_state(
    config: Config,
    steps: Steps,
    checkpoints: Checkpoints,
    start: int,
    say: Callable[[str], Any],
    changes: Sequence[str] = (),
) -> State:
    """Restore the run's checkpoint of step `start`; if that is 0, begin with the weights of
    run.init_from, or with random ones. changes: as `carry_over` returns them."""
    if start:
        say(f"continuing from step {start} in {checkpoints.folder}")
        state = checkpoints.restore(start, steps.abstract).swapped()
        if any(change.startswith(("model.", "batch.", "data.")) for change in changes):
            say("spikes are measured against the losses from here on")
            state = state.replace(health=state.health.without_losses())
        return state
    state = steps.init()
    if config.run.init_from is None:
        return state
    adapters = parted(state.params, is_adapter)[0]
    state = state.replace(params=None)  # else there would be two copies of the model
    params, name = init_from.weights(config, steps.abstract.params)
    say(f"weights from {name}")
    state = state.replace(params=joined(params, adapters))
    if config.optim.average:  # the mean of one set of weights is that set
        state = state.swapped().replace(params=jax.tree.map(jnp.copy, params))
    return state
