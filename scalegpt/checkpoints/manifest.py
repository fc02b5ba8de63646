"""The manifest of a checkpoint lists its contents, with a checksum of every file.

`manifest.json` is written last, whole or not at all: a folder without one is no checkpoint. It is
JSON with step, time, val_loss, `meta` (config, tokenizer, marks of the data, best loss, ...),
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
# A file of this name marks a save that has not ended, or never will: its folder may be removed.
UNFINISHED = "unfinished"
EMPTY, NEVER_FINISHED = "it is an empty folder", "its save was never finished"
_PACKAGES = ("scalegpt", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
Manifest = dict[str, Any]


class Damaged(Exception):
    """A checkpoint is damaged; the text says which file, and what is wrong with it."""


def flatten(items: Any) -> dict[str, Any]:
    """Return the arrays of a tree by name, as `params/wte`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_flatten_with_path(items)[0]
    }


def describe_tree(items: Any) -> dict[str, str]:
    """Return the dtype and shape of each array, as `params/wte: float32[65,32]`."""
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in flatten(items).items()}


def checksums(folder: Folder, sizes: dict[str, int], names: Sequence[str]) -> dict[str, list]:
    """Return the size and SHA-256 of files: name -> [bytes, sha256]; memory stays bounded."""
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's lock
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
    """Return the contents of a new manifest file; see the top of this file for its keys."""
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
    """Add a later evaluation's results to a saved checkpoint. Raises Damaged, and OSError."""
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
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # scalegpt itself, run from its source
            continue
    return versions


def read(folder: Folder, step: int) -> Manifest:
    """Return the manifest of the step in `folder`. Raises Damaged unless it is there and whole."""
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
    """Raise Damaged for a name that leads out of the folder: a manifest may come from anybody."""
    inside = name and posixpath.normpath(name) == name and not posixpath.isabs(name)
    if not inside or name.split("/")[0] in (".", "..") or "\\" in name or ":" in name:
        raise Damaged(f"{NAME} names a file outside its folder, {name!r}")


def files_of(manifest: Manifest, items: Iterable[str] | None) -> list[str]:
    """Return the names of a manifest's files: all, or those of some items: params, optimizer."""
    names = list(manifest["files"])
    return names if items is None else [n for n in names if n.split("/")[0] in set(items)]


def problems(folder: Folder, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Read every byte of these files of a step, and return one line for each that is damaged."""
    faults = []
    sizes, stated = folder.files(), manifest["files"]
    for name in names:
        if name not in sizes:
            faults.append(f"{name} is missing")
        elif sizes[name] != stated[name][0]:
            faults.append(f"{name} has {sizes[name]:,} bytes instead of {stated[name][0]:,}")
    readable = [n for n in names if n in sizes and sizes[n] == stated[n][0]]

    def differs(name: str) -> str | None:
        try:
            return None if folder.sha256(name) == stated[name][1] else "its bytes were altered"
        except OSError as error:  # a bad sector
            return str(error.strerror or error)

    with ThreadPoolExecutor(4) as pool:
        results = zip(readable, pool.map(differs, readable), strict=True)
        faults += [f"{name}: {fault}" for name, fault in results if fault]
    return faults


def steps(folder: Folder) -> dict[int, Manifest | str]:
    """Return the manifest of each step of a run, or what is wrong with it, in ascending order."""
    manifests: dict[int, Manifest | str] = {}
    for step in sorted(int(name) for name in folder.names() if name.isdigit()):
        try:
            manifests[step] = read(folder / str(step), step)
        except Damaged as error:
            manifests[step] = str(error)
    return manifests


def measure(meta: dict[str, Any]) -> str:
    """Return what a checkpoint's val_loss is measured on, as text to compare: tokens and windows,
    and whether documents are kept apart.

    meta: of a checkpoint, as `Checkpoints.save` was given it.
    """
    config = meta.get("config", {})
    path = config.get("data", {}).get("path")
    weights = list(path.values()) if isinstance(path, dict) else [1]
    shares = [weight / sum(weights) for weight in weights]
    windows = config.get("eval", {}).get("windows"), config.get("model", {}).get("block_size")
    parts = [list(meta.get("data", {}).values()), shares, windows]
    apart = config.get("eval", {}).get("document_mask")
    if config.get("data", {}).get("document_mask") if apart is None else apart:
        parts += ["document_mask"]
    if reward := config.get("grpo", {}).get("reward"):  # val_loss is the negative of a reward
        parts += [reward, config["grpo"]["max_new_tokens"]]
    return json.dumps(parts)


def losses(contents: dict[int, Manifest]) -> list[dict[int, float]]:
    """Group steps by what their val_loss is measured on; the group of the latest step is last.

    Losses of one group alone compare: step -> val_loss. There is always one group, maybe empty.
    """
    groups: dict[str, dict[int, float]] = {}
    for step, content in sorted(contents.items()):
        if content["val_loss"] is not None:
            key = measure(content["meta"])
            groups[key] = {**groups.pop(key, {}), step: content["val_loss"]}
    return list(groups.values()) or [{}]


def removable(
    contents: dict[int, Manifest], keep: int, keep_every: int, also: Iterable[int] = ()
) -> list[int]:
    """Return those of these good steps that may be removed.

    Kept are the last `keep`, the best of each group of `losses`, those that `keep_every` divides,
    and `also`.
    """
    needed = {*sorted(contents)[-keep:], *also, *map(best, filter(None, losses(contents)))}
    return [s for s in contents if s not in needed and not (keep_every and s % keep_every == 0)]


def best(losses: dict[int, float]) -> int:
    """Return the step with the lowest val_loss; among equals, the latest."""
    return min(losses, key=lambda step: (losses[step], -step))
