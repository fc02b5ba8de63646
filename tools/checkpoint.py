"""This tool lists, verifies, compares and removes the checkpoints of a run.

python tools/checkpoint.py list out/NAME [--verify]
python tools/checkpoint.py verify out/NAME [--step N]
python tools/checkpoint.py diff out/NAME:1000 out/NAME:2000
python tools/checkpoint.py prune out/NAME --keep 2 [--keep-every 10000] [--dry-run]

A run is named by its out_dir, a folder or a URL. Exit codes: 0 done, and all is whole or equal; 1
something is damaged, or differs; 2 the user's mistake, as to compare a damaged checkpoint.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np

from scalegpt.checkpoints import manifest
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.checkpoints.writing import retire
from scalegpt.config import command_line, loading
from scalegpt.errors import Mistake, counted
from scalegpt.files.folder import Folder, open_folder
from scalegpt.files.run_folder import FOLDER, is_run
from scalegpt.processes.command import run_command
from scalegpt.run.resume import lock


def main(argv: list[str]) -> int:
    flags = parser().parse_args(argv)
    # A look at files needs no accelerator, and a TPU would be taken from whatever trains on it.
    jax.config.update("jax_platforms", "cpu")
    return flags.function(flags)


def parser() -> command_line.Parser:
    whole = command_line.Parser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="list|verify|diff|prune")

    def command(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    sub = command("list", list_, "step, date, size, val loss and state of each checkpoint")
    sub.add_argument("run", metavar="RUN", help="out_dir of a run")
    sub.add_argument("--verify", action="store_true", help="read every file to tell the state")
    sub = command("verify", verify, "read every file and name what is broken; 1 if anything is")
    sub.add_argument("run", metavar="RUN", help="out_dir of a run")
    sub.add_argument("--step", type=int, help="only this one (default: all)")
    sub = command("diff", diff, "config, arrays and largest differences of two; 1 if they differ")
    for name in ("A", "B"):
        sub.add_argument(
            name.lower(),
            metavar=name,
            help="RUN or RUN:WHICH, WHICH being latest (default), best or a step",
        )
    sub = command("prune", prune, "remove all but the last, the best and what is damaged")
    sub.add_argument("run", metavar="RUN", help="out_dir of a run that nobody trains")
    sub.add_argument("--keep", type=int, required=True, help="how many of the latest stay")
    sub.add_argument("--keep-every", type=int, default=0, help="those of every so many steps stay")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return whole


def folder_of(run: str) -> Folder:
    if not is_run(run):
        raise Mistake(f"{run} is not the folder of a run: it has no {FOLDER}/")
    return open_folder(run) / FOLDER


def good_of(contents: dict[int, Any]) -> dict[int, manifest.Manifest]:
    """Return the manifest of each step that has one; others have a text, what is wrong."""
    return {step: x for step, x in contents.items() if not isinstance(x, str)}


def marks(good: dict[int, manifest.Manifest]) -> dict[int, str]:
    """Return the names, best and latest, of the steps that have them."""
    evaluated = manifest.losses(good)[-1]
    pairs = [(manifest.best(evaluated), "best")] if evaluated else []
    pairs += [(max(good), "latest")] if good else []
    return {step: ", ".join(name for s, name in pairs if s == step) for step, _ in pairs}


def list_(flags: argparse.Namespace) -> int:
    folder = folder_of(flags.run)
    contents = manifest.steps(folder)
    good = good_of(contents)
    names = marks(good)
    code = 0
    print(f"{'step':>9}  {'date':16}  {'size':>10}  {'val loss':>8}  state")
    for step, content in contents.items():
        step_folder = folder / str(step)
        size = f"{sum(step_folder.files().values()) / 1e6:,.1f} MB"
        if isinstance(content, str):
            code = code or int(content != manifest.NEVER_FINISHED)
            print(f"{step:>9}  {'':16}  {size:>10}  {'':8}  {state_of(content)}")
            continue
        loss = "" if content["val_loss"] is None else f"{content['val_loss']:.4f}"
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(content["time"]))
        faults = problems(step_folder, content) if flags.verify else []
        code = code or int(bool(faults))
        state = f"damaged: {faults[0]}" if faults else "good" if flags.verify else "has a manifest"
        state += f" ({names[step]})" if step in names else ""
        print(f"{step:>9}  {date:16}  {size:>10}  {loss:>8}  {state}")
    for name in folder.names():
        if not name.isdigit():
            print(f"{name}: no checkpoint")
    for step, change in good[max(good)]["meta"].get("changes", []) if good else ():
        print(f"changed after step {step}: {change}")
    return code


def state_of(problem: str) -> str:
    return "unfinished" if problem == manifest.NEVER_FINISHED else f"damaged: {problem}"


def problems(folder: Folder, content: manifest.Manifest) -> list[str]:
    return manifest.problems(folder, content, manifest.files_of(content, None))


def verify(flags: argparse.Namespace) -> int:
    folder = folder_of(flags.run)
    contents = manifest.steps(folder)
    if flags.step is not None:
        if flags.step not in contents:
            steps = ", ".join(map(str, contents)) or "none"
            raise Mistake(f"there is no step {flags.step} in {folder}; there are {steps}")
        contents = {flags.step: contents[flags.step]}
    if not contents:
        raise Mistake(f"there is no checkpoint in {folder}")
    code = 0
    for step, content in contents.items():
        faults = [content] if isinstance(content, str) else problems(folder / str(step), content)
        if faults == [manifest.NEVER_FINISHED]:
            print(f"step {step}: {faults[0]}; it is no checkpoint")
        elif faults and not (folder / str(step)).names():
            print(f"step {step}: removed meanwhile")
        elif faults:
            code = 1
            print("\n".join(f"step {step}: DAMAGED: {line}" for line in faults))
        else:
            count = len(content["files"])
            print(f"step {step}: good, {count} files, {sum_of(content) / 1e6:,.1f} MB")
    return code


def sum_of(content: manifest.Manifest) -> int:
    return sum(size for size, _ in content["files"].values())


def diff(flags: argparse.Namespace) -> int:
    (a, tree_a, config_a), (b, tree_b, config_b) = map(look_up, (flags.a, flags.b))
    changes = config_changes(config_a, config_b)
    if changes:
        print("\n".join(["config:", *(f"  {line}" for line in changes)]))
    else:
        print("config: the same")
    both = [name for name in tree_a if tree_a[name] == tree_b.get(name)]
    unlike = [name for name in {**tree_a, **tree_b} if name not in both]
    for name in unlike:
        print(f"{name}: {tree_a.get(name, 'absent')} -> {tree_b.get(name, 'absent')}")
    width, differ = max(map(len, both), default=0), 0
    for name in both:
        # float64 copies of one array at a time, as all of them may not fit into memory.
        x, y = (np.asarray(arrays[name], np.float64) for arrays in (a, b))
        if not np.array_equal(x, y, equal_nan=True):
            differ += 1
            print(f"{name:{width}}  {difference(x, y)}")
    print(f"{len(both) - differ} of {len(both)} arrays are equal")
    return int(bool(changes or unlike or differ))


def config_changes(a: dict[str, dict], b: dict[str, dict]) -> list[str]:
    old, new = (
        {f"{section}.{key}": x for section, keys in config.items() for key, x in keys.items()}
        for config in (a, b)
    )
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def difference(x: np.ndarray, y: np.ndarray) -> str:
    """Describe how two arrays differ; a history that is not yet full has NaN in both."""
    numbers = ~np.isnan(x) & ~np.isnan(y)
    gap, size = (np.max(np.abs(z), initial=0.0, where=numbers) for z in (x - y, x))
    unpaired = np.sum(np.isnan(x) != np.isnan(y))
    nans = f", and {unpaired} NaN in one alone" if unpaired else ""
    return f"largest difference {gap:.3e}, of values up to {size:.3e}{nans}"


def look_up(source: str) -> tuple[dict[str, Any], dict[str, str], dict[str, dict]]:
    """Read RUN or RUN:WHICH: arrays by name, dtype[shape] by name, and the config's sections."""
    run, which = source, "latest"
    if not is_run(run) and ":" in run:
        run, _, which = source.rpartition(":")
    folder = folder_of(run)
    checkpoints = open_checkpoints(run)
    step = checkpoints.find(which)
    content = manifest.read(folder / str(step), step)
    items = sorted({name.split("/")[0] for name in content["tree"]})
    checkpoints.find(str(step), items)  # raises Mistake unless all items are whole
    arrays = manifest.flatten({name: checkpoints.read_item(step, name) for name in items})
    return arrays, content["tree"], content["meta"].get("config", {})


def prune(flags: argparse.Namespace) -> int:
    if flags.keep < 1 or flags.keep_every < 0:
        raise Mistake(
            f"--keep={flags.keep} must be at least 1, --keep-every={flags.keep_every} at least 0"
        )
    folder = folder_of(flags.run)
    run = {"data": {"path": ""}, "run": {"out_dir": flags.run}}
    with lock(loading.validate(run, "this command line")):
        contents = manifest.steps(folder)
        good = good_of(contents)
        damaged = set(contents) - set(good)
        candidates = manifest.removable(good, flags.keep, flags.keep_every)
        if candidates:
            damaged |= {s for s, x in good.items() if problems(folder / str(s), x)}
            whole = {s: x for s, x in good.items() if s not in damaged}
            candidates = manifest.removable(whole, flags.keep, flags.keep_every)
        for step in sorted(damaged):
            content = contents[step]
            reason = content if isinstance(content, str) else "a file of it is damaged"
            print(f"stays   step {step}: {reason}")
        for step in candidates:
            print(
                f"{'would remove' if flags.dry_run else 'removed'} step {step}, "
                f"{sum_of(contents[step]) / 1e6:,.1f} MB"
            )
            if not flags.dry_run:
                retire(folder / str(step))
        stay = len(good) - len(candidates)
        print(f"{counted(stay, 'checkpoint')} left")
    return 0


if __name__ == "__main__":
    run_command(main)
