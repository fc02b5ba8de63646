"""A folder lies on a disk or behind a URL; `Folder` offers what checkpoints need of either.

Disks and buckets differ: a bucket has no folders, no rename and no half-written objects; a disk has
all three.
"""

import argparse
import hashlib
import logging
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake

CHUNK = 1 << 22  # bytes hashed at once


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there replaces `target` when the block ends.

    When the block raises, `target` stays as it was. Killed or cut from power at any moment, the
    disk has the old or the new file, whole. Raises OSError.
    """
    target = Path(target)
    # The name ends as the target's does: plots are drawn in the format that the ending names.
    beside = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    # The name of a file outlives a power cut only when its folder is on the disk, too.
    with suppress(OSError):  # some file systems cannot, and Windows
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(target: str | Path, data: bytes) -> None:
    """Write `data` to the file `target`, whole or not at all. Raises OSError."""
    with replacing(target) as beside:
        beside.write_bytes(data)


@dataclass(frozen=True)
class Folder:
    """A folder by the user's name for it, `path`, and by `root`, its name in fsspec's system `fs`.

    Methods raise OSError, or what the file system of a URL raises.
    """

    path: str
    fs: Any
    root: str

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.path}/{name}", self.fs, posixpath.join(self.root, name))

    def names(self) -> list[str]:
        """Return the names of files and folders directly in it; none if it does not exist."""
        try:
            listing = self.fs.ls(self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {posixpath.basename(name.rstrip("/")) for name in listing}
        # A bucket may list an empty object that stands for the folder itself.
        return sorted(names - {posixpath.basename(self.root), ""})

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file at any depth, by its name relative to here."""
        listing = self.fs.find(self.root, detail=True)
        return {
            posixpath.relpath(name, self.root): info["size"]
            for name, info in sorted(listing.items())
            if info["type"] == "file" and not name.endswith("/")
        }

    def has(self, name: str) -> bool:
        return self.fs.exists(posixpath.join(self.root, name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(posixpath.join(self.root, name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; it is on the disk or in the bucket on return."""
        target = posixpath.join(self.root, name)
        if is_url(self.path):
            self.fs.pipe_file(target, data)
        else:
            replace_file(target, data)

    def make(self, parents: bool = False) -> None:
        """Create the folder on a disk; a bucket needs none."""
        if not is_url(self.path):
            Path(self.root).mkdir(parents=parents, exist_ok=True)

    def delete(self, name: str) -> None:
        """Remove one file."""
        self.fs.rm_file(posixpath.join(self.root, name))

    def remove(self, last: str = "") -> None:
        """Remove the folder with everything in it; `last`, a name in it, goes after all others."""
        for name in self.names():
            if last and name != last:
                self.fs.rm(posixpath.join(self.root, name), recursive=True)
        self.fs.rm(self.root, recursive=True)

    def move(self, to: "Folder") -> None:
        """Rename the folder to `to`, which does not exist; in a bucket, file by file."""
        if is_url(self.path):  # gcsfs would try to move what only looks like a folder
            for name in self.files():
                self.fs.mv(posixpath.join(self.root, name), posixpath.join(to.root, name))
        else:
            os.rename(self.root, to.root)

    def sha256(self, name: str) -> str:
        """Return the hexadecimal SHA-256 of a file, which is read piece by piece."""
        digest = hashlib.sha256()
        with self.fs.open(posixpath.join(self.root, name), "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()


def expanded(path: str | Path) -> Path:
    """Return the path with "~" replaced by a home folder. Raises Mistake where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Mistake(f"{path}: that home folder is not known here; write the whole path") from None


def local_path(text: str) -> Path:
    """Parse a flag that names a local folder, for argparse.

    A URL is refused, because Path() would quietly make a local folder "gs:" of it.
    """
    if is_url(text) or not text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a local folder")
    return expanded(text)


def open_url(url: str, verb: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system for `url`, and the path of `url` in that file system.

    verb: what cannot be done, for messages, as "read". options: for the file system. Raises
    Mistake when a package for it is missing, or when it connects at once and cannot.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except OSError as error:
        raise Mistake(f"cannot {verb} {url}: {error}; is the network up?") from error
    except (ImportError, ValueError) as error:
        is_google = url.startswith(("gs:", "gcs:"))
        extra = '"scalegpt[tpu]"' if is_google else "the package it names"
        raise Mistake(f"cannot {verb} {url}: {error}. Fix: pip install {extra}") from error


def open_folder(path: str | Path) -> Folder:
    """Return the folder, whether it exists or not. Raises Mistake for a URL that cannot be used."""
    import fsspec

    if not is_url(path):
        path = expanded(path).absolute().as_posix()
        return Folder(path, fsspec.filesystem("file"), path)
    path = str(path).rstrip("/")
    if not path.startswith(("gs://", "s3://")):  # else Orbax would make a local folder "x:"
        raise Mistake(f"{path}: checkpoints can be in a local folder, gs:// or s3://")
    # gcsfs logs each request that fails, with a traceback; we say once what could not be done.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    # Orbax writes by a client of its own, so that a listing kept from before would be wrong.
    fs, root = open_url(path, "open", use_listings_cache=False)
    return Folder(path, fs, root.rstrip("/"))
