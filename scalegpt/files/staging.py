"""Files behind a URL are copied to the local disk: whole, and once by all processes of a machine.

`stage` copies them all at once, `Copies` each when it is needed, within a limit.
"""

import errno
import hashlib
import math
import os
import posixpath
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from scalegpt.errors import Mistake
from scalegpt.files.cache import cache_folder, name_of_url
from scalegpt.files.folder import open_url, replacing

CHUNK = 1 << 24  # bytes per read: large enough to run at disk speed, small in memory
WAITS = (1, 5, 15, 30, 60, 120, 240)  # seconds before a copy that failed is tried again
_SUM = ".sha256"  # ends the name of the file that holds the hash of a copy beside it


def _no_copy(source: str, folder: Path, error: Exception) -> Mistake:
    return Mistake(
        f"cannot copy {source} to {folder}: {error}; try again, choose another data.cache_dir, or "
        "copy it yourself and give that folder"
    )


def stage(
    url: str, files: Sequence[str], cache_dir: str | None = None, limit: float | None = None
) -> Path:
    """Return a local folder with those of `files` that `url` has, copying what is not up to date.

    cache_dir: default `$XDG_CACHE_HOME/scalegpt`, else `~/.cache/scalegpt`. limit: the bytes that
    the files may have together. Raises Mistake for more, a URL that cannot be read, a full disk, or
    a copy that ended early.
    """
    url = url.rstrip("/")
    fs, root = open_url(url, "read")
    folder = Path(cache_dir or cache_folder(), name_of_url(url))
    room = math.inf if limit is None else limit
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Eight processes of one machine must not fill its disk with eight copies.
        with FileLock(folder / "lock"):
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                size = _stage_file(fs, posixpath.join(root, file), folder / file, room)
                room -= size
    except OSError as error:  # of the network or of the disk
        raise _no_copy(url, folder, error) from error
    return folder


def _stage_file(fs: Any, source: str, target: Path, room: float) -> int:
    """Copy `source` to `target`, unless the stamp beside `target` tells that it is the same.

    Returns its size. Raises Mistake for one of more than `room` bytes.
    """
    stamp_file = target.with_name(target.name + ".stamp")
    try:
        info = fs.info(source)
    except FileNotFoundError:
        target.unlink(missing_ok=True)  # an old meta.json must not describe new bins
        return 0
    keys = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created")
    version = next((info[k] for k in keys if info.get(k) is not None), "")
    size, stamp = info.get("size"), f"{info.get('size')} {version}"
    if (size or 0) > room:
        raise Mistake(
            f"{source} has {size:,} bytes, and data.disk_limit leaves {room:,.0f}; raise it, or "
            "prepare the text in parts"
        )
    if target.is_file() and stamp_file.is_file() and stamp_file.read_text() == stamp:
        if target.stat().st_size == size:
            return size
    bar = tqdm(total=size, desc=source, unit="B", unit_scale=True, disable=(size or 0) < CHUNK)
    with bar:
        _copy(fs, source, target, size, bar.update)
    # The stamp goes last: a kill before it costs a download, never a wrong file.
    stamp_file.write_text(stamp)
    return size or 0


def _copy(
    fs: Any, source: str, target: Path, size: int | None, read: Callable[[int], Any] | None = None
) -> str:
    """Copy a file, of `size` bytes if that is known, and return its hash.

    read: is told of bytes as they come. Raises Mistake, and what the file system raises.
    """
    free = shutil.disk_usage(target.parent).free
    if size and size > free:
        raise Mistake(
            f"{source} has {size:,} bytes, and {target.parent} has room for {free:,}; free some, "
            "or choose another cache folder"
        )
    digest = hashlib.sha256()
    with replacing(target) as partial:
        with fs.open(source, "rb") as reader, open(partial, "wb") as writer:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
                digest.update(chunk)
                if read:
                    read(len(chunk))
        arrived = partial.stat().st_size
        if size is not None and arrived != size:
            raise Mistake(f"{source}: {arrived} of {size} bytes arrived; start again")
    return digest.hexdigest()


def _note_use(target: Path) -> None:
    now = time.time()  # the file system's own clock may be some milliseconds late
    os.utime(target, (now, now))


def warn(text: str) -> None:
    """Say on standard error what goes wrong with a file while the program goes on."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Copies:
    """Files of a URL are copied to `folder` when they are needed, and take `limit` bytes at most.

    Those that were not used for the longest time, by their time of modification, make room for
    others. A file counts where it lies below a folder of `folder`. Processes of one machine share
    the copies: each deletes what another may still read, which then has it copied again.
    """

    def __init__(self, url: str, folder: Path, limit: float) -> None:
        self.fs, self.root = open_url(url, "read", use_listings_cache=False)
        self.folder, self.limit = folder, limit
        with FileLock(folder / "lock"):
            self._room(0)  # there may be more, from a time with a higher limit

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of every file of the URL, by its name from there. Raises Mistake."""
        try:
            listing = self.fs.find(self.root, detail=True)
        except Exception as error:  # each file system has errors of its own
            raise _no_copy(self.root, self.folder, error) from error
        return {posixpath.relpath(name, self.root): info["size"] for name, info in listing.items()}

    def has(self, file: str, size: int, sha256: str) -> bool:
        """Tell whether the copy of a file is whole, and note that it is in use."""
        target = self.folder / file
        try:
            if target.with_name(target.name + _SUM).read_text() != sha256:
                return False
            if target.stat().st_size != size:
                return False
            _note_use(target)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, file: str, size: int, sha256: str, unused_since: float = math.inf) -> bool:
        """Have a whole copy of a file of this size and hash.

        Returns False if that would take room from files that were used at `unused_since` or later,
        in seconds since the epoch. Raises Mistake for what cannot be copied, or is another file.
        """
        target, source = self.folder / file, posixpath.join(self.root, file)
        for wait in (*WAITS, None):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / "lock"):
                    if self.has(file, size, sha256):
                        return True
                    if not self._room(size, unused_since):
                        return False
                    arrived = _copy(self.fs, source, target, size)
                    if arrived != sha256:
                        target.unlink()
                        raise Mistake(
                            f"{source} is not the file that meta.json describes (sha256 "
                            f"{arrived[:8]}..., not {sha256[:8]}...); copy it there again"
                        )
                    target.with_name(target.name + _SUM).write_text(sha256)
                    _note_use(target)
                return True
            except Mistake:
                raise
            except Exception as error:  # each file system has errors of its own
                full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
                if full or wait is None or isinstance(error, FileNotFoundError):
                    raise _no_copy(source, self.folder, error) from error
                warn(f"{source} could not be copied: {error}; trying again in {wait} s")
                time.sleep(wait)
        raise AssertionError(file)

    def _room(self, size: int, unused_since: float = math.inf) -> bool:
        """Delete the files that were used least recently until `size` bytes more may be there."""
        if size > self.limit:
            raise Mistake(
                f"a file of {size:,} bytes is needed, and data.disk_limit allows "
                f"{self.limit:,.0f}; raise it"
            )
        used, files = 0, []
        for path in self.folder.glob("*/**/*"):
            if path.name.startswith("."):  # a copy that was cut short, as this process has the lock
                path.unlink()
            elif path.suffix not in (_SUM, ".stamp") and path.is_file():
                facts = path.stat()
                used += facts.st_size
                files.append((facts.st_mtime, facts.st_size, path))
        for when, freed, path in sorted(files):
            if used + size <= self.limit:
                break
            if when >= unused_since:
                return False
            path.with_name(path.name + _SUM).unlink(missing_ok=True)
            path.unlink()
            used -= freed
        return True
