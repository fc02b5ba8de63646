"""A run's folder holds small files that grow (config, metrics, TensorBoard) beside checkpoints.

The small files are in run.out_dir. Where that is a URL, whose objects cannot grow, they are in a
folder of the user's cache. Each checkpoint copies them to the URL, and a machine that has none of
them, or older ones, fetches them from there.
"""

from pathlib import Path

from scalegpt.errors import Mistake
from scalegpt.files.cache import cache_folder, name_of_url
from scalegpt.files.folder import Folder, expanded, is_url, open_folder, replace_file

FOLDER = "checkpoints"
BAD_UPDATES = "bad_updates.jsonl"
SAMPLES = "samples.jsonl"
_IDS = ("wandb_id.txt", "trackio_id.txt")  # what those call the run
REFERENCE = "reference.npz"
_FILES = ("config.yaml", REFERENCE, "metrics.jsonl", SAMPLES, BAD_UPDATES, *_IDS)
_ALL_PROCESSES = _FILES[:2]  # which need them
_LOGS = "tensorboard"


def is_run(folder: str | Path) -> bool:
    """Tell whether `folder` is a run's, or of imported weights, and not one of Hugging Face's."""
    if is_url(folder):
        return bool((open_folder(folder) / FOLDER).names())
    return expanded(Path(folder, FOLDER)).is_dir()


def has_imported_weights(out_dir: str | Path) -> bool:
    """Tell whether `out_dir` has a checkpoint of step 0, which imports write and no run saves."""
    return bool((open_folder(out_dir) / FOLDER / "0").names())


def local(out_dir: str) -> Path:
    """Return the folder of this machine that the small files are in; it may not exist yet."""
    if is_url(out_dir):
        return cache_folder("runs", name_of_url(out_dir))
    return expanded(out_dir)


def fetch(out_dir: str, is_main: bool = True) -> Path:
    """Copy the small files from the URL to `local`, which is returned; nothing for a local run.

    The main process takes all of them, any other those that it needs. The URL decides what the run
    is, because other machines may have gone on with it; a local file is kept only where it begins
    with the URL's. Raises Mistake.
    """
    here = local(out_dir)
    if not is_url(out_dir):
        return here
    remote = open_folder(out_dir)
    try:
        here.mkdir(parents=True, exist_ok=True)
        names = [name for name in _FILES if remote.has(name)]
        if _FILES[0] not in names:  # the URL has no run, or no longer
            (here / _FILES[0]).unlink(missing_ok=True)
            if is_main:
                _set_aside(here)
            return here
        logs = [f"{_LOGS}/{name}" for name in (remote / _LOGS).names()]
        for name in [*names, *logs]:
            if is_main or name in _ALL_PROCESSES:
                _fetch_file(remote, here, name)
    except Exception as error:  # each file system has its own
        raise Mistake(f"cannot read run.out_dir={out_dir}: {first_line(error)}") from error
    return here


def _fetch_file(remote: Folder, here: Path, name: str) -> None:
    data, target = remote.read(name), here / name
    if name != _FILES[0] and target.exists():
        with target.open("rb") as file:
            if file.read(len(data)) == data:
                return
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, data)


def _set_aside(here: Path) -> None:
    """Rename the files of an earlier run with the same URL, which has been removed there."""
    for name in (*_FILES[1:], _LOGS):
        if (here / name).exists():
            taken = {path.name for path in here.iterdir()}
            number = next(n for n in range(1, len(taken) + 2) if f"{name}.old{n}" not in taken)
            (here / name).replace(here / f"{name}.old{number}")


def push(out_dir: str) -> None:
    """Copy the small files to the URL, in the main process; nothing for a local run.

    Raises whatever the URL's file system raises.
    """
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
    """Do as `push`, for a user who has just named that URL. Raises Mistake."""
    try:
        push(out_dir)
    except Exception as error:
        raise Mistake(f"cannot write to run.out_dir={out_dir}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the kind of an error, which may be of any file system, and its text's first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
