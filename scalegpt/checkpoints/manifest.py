"""The manifest of a checkpoint: what is in it, and by which one can tell that it is whole.

`manifest.json` is written last, whole or not at all: a folder without one is no checkpoint. It is
JSON with step, time, val_loss, `meta` (config, tokenizer, fingerprints of the data, best loss),
`tree` (array -> dtype[shape]), `files` (name -> [bytes, sha256]), versions of packages, and the
sha256 of all that.
"""

import hashlib
import json
import math
import platform
import posixpath
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax

from scalegpt.files.folder import Folder

NAME = "manifest.json"
# In the folder of a save that is not over, or will never be: what is there may be removed.
UNFINISHED = "unfinished"
EMPTY, NEVER_FINISHED = "it is an empty folder", "its save was never finished"
_PACKAGES = ("scalegpt", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
Manifest = dict[str, Any]


class Damaged(Exception):
    """The text says which file, and what is wrong with it."""


def flatten(items: Any) -> dict[str, Any]:
    """Arrays by name, as params/wte."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_flatten_with_path(items)[0]
    }


def describe_tree(items: Any) -> dict[str, str]:
    """Array -> dtype[shape], as `params/wte: float32[65,32]`."""
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in flatten(items).items()}


def checksums(folder: Folder, sizes: dict[str, int], names: Sequence[str]) -> dict[str, list]:
    """name -> [bytes, sha256], in a bounded part of memory."""
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        return {
            name: [sizes[name], digest]
            for name, digest in zip(names, pool.map(folder.sha256, names), strict=True)
        }


def encode(
    step: int,
    val_loss: float | None,
    meta: dict[str, Any],
    tree: dict[str, str],
    files: dict[str, list],
) -> bytes:
    content = {
        "format": 1,
        "step": step,
        "time": time.time(),
        "val_loss": val_loss,
        "meta": meta,
        "tree": tree,
        "files": files,
        "versions": _versions(),
    }
    return _sealed(content)


def amend(folder: Folder, step: int, meta: dict[str, Any], val_loss: float) -> None:
    """Add to a checkpoint what an evaluation found only later. Raises Damaged, and OSError."""
    folder.write(NAME, _sealed({**read(folder, step), "meta": meta, "val_loss": val_loss}))


def _sealed(content: Manifest) -> bytes:
    # JSON has no infinity: before the first evaluation there is no best loss.
    meta = {k: None if v == math.inf else v for k, v in content["meta"].items()}
    content = {**content, "meta": meta}
    return json.dumps({**content, "sha256": _digest(content)}, allow_nan=False, indent=1).encode()


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # scalegpt itself, run from its source
            continue
    return found


def read(folder: Folder, step: int) -> Manifest:
    """Of the step in `folder`. Raises Damaged when there is none that can be relied on."""
    try:
        text = folder.read(NAME)
    except FileNotFoundError:
        if not (names := folder.names()):
            raise Damaged(EMPTY) from None
        if UNFINISHED in names:
            raise Damaged(NEVER_FINISHED) from None
        raise Damaged(f"{NAME} is missing") from None
    except NotADirectoryError:
        raise Damaged("it is no folder") from None
    try:
        content = json.loads(text)
        stated = content.pop("sha256")
        whole = stated == _digest(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{NAME} is torn or altered")
    if content.get("format") != 1:
        raise Damaged(f"{NAME} has format {content.get('format')}, this scalegpt knows format 1")
    if content["step"] != step:
        raise Damaged(f"{NAME} is of step {content['step']}")
    for name in content["files"]:
        _refuse_outside(name)
    return content


def _refuse_outside(name: str) -> None:
    """A manifest from elsewhere shall not have us read, or tell about, other files."""
    inside = name and posixpath.normpath(name) == name and not posixpath.isabs(name)
    if not inside or name.split("/")[0] in (".", "..") or "\\" in name or ":" in name:
        raise Damaged(f"{NAME} names a file outside its folder, {name!r}")


def files_of(manifest: Manifest, items: Iterable[str] | None) -> list[str]:
    """The names of all files, or of those of some items: params, optimizer."""
    names = list(manifest["files"])
    return names if items is None else [n for n in names if n.split("/")[0] in set(items)]


def problems(folder: Folder, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """What is wrong with these files of a step, one line for each; reads every byte of them."""
    found = []
    sizes, stated = folder.files(), manifest["files"]
    for name in names:
        if name not in sizes:
            found.append(f"{name} is missing")
        elif sizes[name] != stated[name][0]:
            found.append(f"{name} has {sizes[name]:,} bytes instead of {stated[name][0]:,}")
    readable = [n for n in names if n in sizes and sizes[n] == stated[n][0]]

    def differs(name: str) -> str | None:
        try:
            return None if folder.sha256(name) == stated[name][1] else "its bytes were altered"
        except OSError as error:  # a bad sector
            return str(error.strerror or error)

    with ThreadPoolExecutor(4) as pool:
        results = zip(readable, pool.map(differs, readable), strict=True)
        found += [f"{name}: {wrong}" for name, wrong in results if wrong]
    return found


def steps(folder: Folder) -> dict[int, Manifest | str]:
    """Of a run's checkpoints: each step's manifest, or what is wrong, in ascending order."""
    found: dict[int, Manifest | str] = {}
    for step in sorted(int(name) for name in folder.names() if name.isdigit()):
        try:
            found[step] = read(folder / str(step), step)
        except Damaged as error:
            found[step] = str(error)
    return found


def removable(
    losses: dict[int, float | None], keep: int, keep_every: int, also: Iterable[int] = ()
) -> list[int]:
    """Which of the good steps may go: all but the last `keep`, the best, each keep_every-th.

    losses: step -> val_loss. also: others that are kept.
    """
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    kept = {*sorted(losses)[-keep:], *also}
    if evaluated:
        kept.add(best(evaluated))
    return [s for s in losses if s not in kept and not (keep_every and s % keep_every == 0)]


def best(losses: dict[int, float]) -> int:
    """The step with the lowest val_loss; of equals the later."""
    return min(losses, key=lambda step: (losses[step], -step))
