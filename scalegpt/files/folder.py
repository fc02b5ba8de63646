"""A folder on a disk or behind a URL, as checkpoints need one.

Disks and buckets differ: a bucket has no folders, no rename and no half-written objects; a disk has
all three.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes out of one folder
    fcntl = None

CHUNK = 1 << 22


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


@dataclass(frozen=True)
class Folder:
    """path: as the user knows it. All else raises OSError, or what the URL's file system raises."""

    path: str
    fs: Any
    root: str

    def __str__(self) -> str:
        return self.path

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.path}/{name}", self.fs, posixpath.join(self.root, name))

    def names(self) -> list[str]:
        """Of what is directly in it; nothing when it is not there."""
        try:
            found = self.fs.ls(self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {posixpath.basename(name.rstrip("/")) for name in found}
        # A bucket may list the mark of the folder itself.
        return sorted(names - {posixpath.basename(self.root), ""})

    def files(self) -> dict[str, int]:
        """Everything below it: name -> bytes."""
        found = self.fs.find(self.root, detail=True)
        return {
            posixpath.relpath(name, self.root): info["size"]
            for name, info in sorted(found.items())
            if info["type"] == "file" and not name.endswith("/")
        }

    def has(self, name: str) -> bool:
        return self.fs.exists(posixpath.join(self.root, name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(posixpath.join(self.root, name))

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all, and on the disk when this returns."""
        target = posixpath.join(self.root, name)
        if is_url(self.path):
            self.fs.pipe_file(target, data)
            return
        beside = f"{target}.{os.getpid()}.tmp"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        self._sync()

    def _sync(self) -> None:
        """Let the names of files outlive a power cut as their contents do."""
        with contextlib.suppress(OSError):  # some file systems cannot, and Windows
            handle = os.open(self.root, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def make(self, parents: bool = False) -> None:
        if not is_url(self.path):
            Path(self.root).mkdir(parents=parents, exist_ok=True)

    def delete(self, name: str) -> None:
        self.fs.rm_file(posixpath.join(self.root, name))

    def remove(self) -> None:
        """With all that is in it."""
        self.fs.rm(self.root, recursive=True)

    def move(self, to: "Folder") -> None:
        if is_url(self.path):  # one by one: gcsfs would try to move what only looks like a folder
            for name in self.files():
                self.fs.mv(posixpath.join(self.root, name), posixpath.join(to.root, name))
        else:
            os.rename(self.root, to.root)

    def sha256(self, name: str) -> str:
        """Of a file's contents, read piece by piece."""
        digest = hashlib.sha256()
        with self.fs.open(posixpath.join(self.root, name), "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()


def local_path(text: str) -> Path:
    """For argparse, which refuses a URL: Path() would quietly make a local folder "gs:" of it."""
    if is_url(text) or not text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a local folder")
    return Path(text).expanduser()


def open_folder(path: str | Path) -> Folder:
    """Whether it is there or not. Raises ValueError for a URL that nothing here can open."""
    import fsspec

    if not is_url(path):
        path = Path(path).expanduser().absolute().as_posix()
        return Folder(path, fsspec.filesystem("file"), path)
    path = str(path).rstrip("/")
    if not path.startswith(("gs://", "s3://")):  # else Orbax would make a local folder "x:"
        raise Mistake(f"{path}: checkpoints can be in a local folder, gs:// or s3://")
    # It logs each request that fails, with a traceback; we say once what could not be done.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    try:
        # Orbax writes by a client of its own, so that a listing kept from before would be wrong.
        fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = '"scalegpt[tpu]"' if path.startswith("gs:") else "the package it names"
        raise Mistake(f"cannot open {path}: {error}. Fix: pip install {extra}") from error
    return Folder(path, fs, root.rstrip("/"))
