"""Files behind a URL are copied to the local disk once: whole, by one process of each machine."""

import posixpath
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from scalegpt.errors import Mistake
from scalegpt.files.cache import cache_folder, name_of_url
from scalegpt.files.folder import open_url, replacing

CHUNK = 1 << 24  # bytes per read: large enough to run at disk speed, small in memory


def stage(url: str, files: Sequence[str], cache_dir: str | None = None) -> Path:
    """Return a local folder with those of `files` that `url` has, copying what is not up to date.

    cache_dir: default `$XDG_CACHE_HOME/scalegpt`, else `~/.cache/scalegpt`. Raises Mistake for a
    URL that cannot be read, a full disk, or a copy that ended early.
    """
    url = url.rstrip("/")
    fs, root = open_url(url, "read")
    folder = Path(cache_dir or cache_folder(), name_of_url(url))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Eight processes of one machine must not fill its disk with eight copies.
        with FileLock(folder / "lock"):
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                _stage_file(fs, posixpath.join(root, file), folder / file)
    except OSError as error:  # of the network or of the disk
        raise Mistake(
            f"cannot copy {url} to {folder}: {error}; try again, choose another data.cache_dir, or "
            "copy it yourself and give that folder"
        ) from error
    return folder


def _stage_file(fs: Any, source: str, target: Path) -> None:
    """Copy `source` to `target`, unless the stamp beside `target` tells that it is the same."""
    stamp_file = target.with_name(target.name + ".stamp")
    try:
        info = fs.info(source)
    except FileNotFoundError:
        target.unlink(missing_ok=True)  # an old meta.json must not describe new bins
        return
    keys = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created")
    version = next((info[k] for k in keys if info.get(k) is not None), "")
    size, stamp = info.get("size"), f"{info.get('size')} {version}"
    if target.is_file() and stamp_file.is_file() and stamp_file.read_text() == stamp:
        if target.stat().st_size == size:
            return
    free = shutil.disk_usage(target.parent).free
    if size and size > free:
        raise Mistake(
            f"{source} has {size:,} bytes, and {target.parent} has room for {free:,}; free some, "
            "or choose another cache folder"
        )
    bar = tqdm(total=size, desc=source, unit="B", unit_scale=True, disable=(size or 0) < CHUNK)
    with replacing(target) as partial:
        with fs.open(source, "rb") as reader, open(partial, "wb") as writer, bar:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
                bar.update(len(chunk))
        arrived = partial.stat().st_size
        if size is not None and arrived != size:
            raise Mistake(f"{source}: {arrived} of {size} bytes arrived; start again")
    # The stamp goes last: a kill before it costs a download, never a wrong file.
    stamp_file.write_text(stamp)
