"""Files of a URL, brought to the local disk once: whole, and by one process of each machine."""

import hashlib
import os
import posixpath
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from scalegpt.errors import Mistake
from scalegpt.files.cache import cache_folder
from scalegpt.files.lock import hold

CHUNK = 1 << 24  # bytes per read: large enough to run at disk speed, small in memory


def stage(url: str, files: Sequence[str], cache_dir: str | None = None) -> Path:
    """The local folder with those of `files` that `url` has, copied where it is not up to date.

    cache_dir: default `$XDG_CACHE_HOME/scalegpt`, else `~/.cache/scalegpt`. Raises ValueError for a
    URL that cannot be read, a full disk, or a copy that ended early.
    """
    import fsspec

    url = url.rstrip("/")
    protocol = url.split("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except OSError as error:  # some connect at once
        raise Mistake(f"cannot read {url}: {error}; is the network up?") from error
    except (ImportError, ValueError) as error:
        extra = '"scalegpt[tpu]"' if protocol in ("gs", "gcs") else "the package it names"
        raise Mistake(f"cannot read {url}: {error}. Fix: pip install {extra}") from error
    name = f"{posixpath.basename(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder = Path(cache_dir or cache_folder(), name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Eight processes of one machine must not fill its disk with eight copies.
        with hold(folder / "lock"):
            for file in files:
                _stage_file(fs, posixpath.join(root, file), folder / file)
    except OSError as error:  # of the network or of the disk
        raise Mistake(
            f"cannot copy {url} to {folder}: {error}; try again, choose another data.cache_dir, or "
            "copy it yourself and give that folder"
        ) from error
    return folder


def _stage_file(fs, source: str, target: Path) -> None:
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
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    bar = tqdm(total=size, desc=source, unit="B", unit_scale=True, disable=(size or 0) < CHUNK)
    try:
        with fs.open(source, "rb") as reader, open(partial, "wb") as writer, bar:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
                bar.update(len(chunk))
        if size is not None and partial.stat().st_size != size:
            raise Mistake(
                f"{source}: {partial.stat().st_size} of {size} bytes arrived; start again"
            )
        # The stamp goes last and the file appears whole: a kill in between costs a download.
        os.replace(partial, target)
        stamp_file.write_text(stamp)
    finally:
        partial.unlink(missing_ok=True)
