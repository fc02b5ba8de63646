"""The small files of a run, which grow: config, metrics, TensorBoard's; checkpoints are elsewhere.

They are in run.out_dir. Where that is a URL, whose objects cannot grow, they are in a folder of the
user's cache; each checkpoint takes them along to the URL, and a machine that has not got them, or
older ones, fetches them from there.
"""

import hashlib
import os
import posixpath
from pathlib import Path

from scalegpt.errors import Mistake
from scalegpt.files.cache import cache_folder
from scalegpt.files.folder import Folder, is_url, open_folder

FOLDER = "checkpoints"
BAD_UPDATES = "bad_updates.jsonl"
_FILES = ("config.yaml", "metrics.jsonl", BAD_UPDATES, "wandb_id.txt")
_LOGS = "tensorboard"


def is_run(folder: str | Path) -> bool:
    """Whether it is the folder of a run, or of imported weights, and not of Hugging Face's kind."""
    if is_url(folder):
        return bool((open_folder(folder) / FOLDER).names())
    return Path(folder, FOLDER).expanduser().is_dir()


def has_imported_weights(out_dir: str | Path) -> bool:
    """Whether it has a step 0, which no run saves."""
    return bool((open_folder(out_dir) / FOLDER / "0").names())


def local(out_dir: str) -> Path:
    """Where the files are on this machine, whether they are there or not."""
    if not is_url(out_dir):
        return Path(out_dir).expanduser()
    url = out_dir.rstrip("/")
    name = f"{posixpath.basename(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return cache_folder("runs", name)


def fetch(out_dir: str, is_main: bool = True) -> Path:
    """Bring what the URL has to `local`, which is returned; a local run's are there anyway.

    The main process takes all, any other the config. The URL decides what the run is, as others may
    have gone on with it; a local file counts only where it continues the URL's. Raises ValueError.
    """
    here = local(out_dir)
    if not is_url(out_dir):
        return here
    remote = open_folder(out_dir)
    try:
        here.mkdir(parents=True, exist_ok=True)
        names = [name for name in _FILES if remote.has(name)]
        if _FILES[0] not in names:  # there is no such run, or no more
            (here / _FILES[0]).unlink(missing_ok=True)
            if is_main:
                _set_aside(here)
            return here
        logs = [f"{_LOGS}/{name}" for name in (remote / _LOGS).names()]
        for name in [*names, *logs] if is_main else _FILES[:1]:
            _fetch_file(remote, here, name)
    except Exception as error:  # each file system has its own
        raise Mistake(f"cannot read run.out_dir={out_dir}: {_said(error)}") from error
    return here


def _fetch_file(remote: Folder, here: Path, name: str) -> None:
    data, target = remote.read(name), here / name
    if name != _FILES[0] and target.exists():
        with target.open("rb") as file:
            if file.read(len(data)) == data:
                return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    beside.write_bytes(data)
    beside.replace(target)


def _set_aside(here: Path) -> None:
    """What a run of the same URL left that is no more."""
    for name in (*_FILES[1:], _LOGS):
        if (here / name).exists():
            taken = {path.name for path in here.iterdir()}
            number = next(n for n in range(1, len(taken) + 2) if f"{name}.old{n}" not in taken)
            (here / name).replace(here / f"{name}.old{number}")


def push(out_dir: str) -> None:
    """Copy the files to the URL, as they are now; by the main process. Raises what goes wrong."""
    if not is_url(out_dir):
        return
    here, remote = local(out_dir), open_folder(out_dir)
    for name in _FILES:
        if (here / name).exists():
            data = (here / name).read_bytes()
            # A row may be half-written at this moment.
            remote.write(name, data[: data.rfind(b"\n") + 1] if name.endswith(".jsonl") else data)
    if (here / _LOGS).is_dir():
        sizes = (remote / _LOGS).files()
        for path in (here / _LOGS).iterdir():
            if path.is_file() and path.stat().st_size != sizes.get(path.name):
                (remote / _LOGS).write(path.name, path.read_bytes())


def push_or_explain(out_dir: str) -> None:
    """`push` for a user who has just named that URL. Raises ValueError."""
    try:
        push(out_dir)
    except Exception as error:
        raise Mistake(f"cannot write to run.out_dir={out_dir}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
