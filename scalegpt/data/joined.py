"""The parts of a data set are read as one stream of tokens, without copying them together.

N parts, numbered from 0, lie in `parts-N` of the data set's folder, each a folder with the files of
a data set. The data set's meta.json has the size and hash of every file in "parts", and describes
the stream in "train" and "val", as for the one file that the parts would be.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.errors import Mistake
from scalegpt.files.staging import Copies

OPEN = 1024  # files mapped at a time: a process may have 65,530 maps
COLUMNS = {"tokens": int, "documents": int, "sha256": str, "index": str}


def part_folder(folder: Path, part: int, n: int) -> Path:
    """Return the folder of part `part` of the n parts of a data set."""
    return folder / f"parts-{n}/{part:0{len(str(n - 1))}d}"


def parts_in(meta: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return the size and hashes of each part of a split, in order, as meta.json states them.

    An empty list is a data set without parts. Raises Mistake for other than `write_columns` makes.
    """
    if "parts" not in meta:
        return []
    try:
        columns = [meta["parts"][split][name] for name in COLUMNS]
        parts = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
        of_type = all(type(p[k]) is COLUMNS[k] for p in parts for k in COLUMNS)
        counts = [p[k] for p in parts for k in ("tokens", "documents")] if of_type else [-1]
        sums = [sum(p[k] for p in parts) - meta[split][k] for k in ("tokens", "documents")]
    except (KeyError, TypeError, ValueError):
        parts, counts, sums = [], [-1], []
    if not parts or min(counts) < 0 or any(sums):
        raise Mistake(f"meta.json: its parts of {split} are damaged; run prepare.py --merge again")
    return parts


def columns_of(parts: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Return what meta.json says of the parts of a split, of which each is described as there."""
    return {name: [part[name] for part in parts] for name in COLUMNS}


class CopiedFile:
    """A file behind a URL is read in slices like an array; it is copied when it is not there.

    It is opened for each slice, as space on a disk is not free while a deleted file is open.
    """

    def __init__(self, copies: Copies, name: str, dtype: np.dtype, length: int, sha256: str):
        self._copies, self._name, self._dtype, self._length = copies, name, dtype, length
        self._sha256, self._used = sha256, -math.inf
        self._path = os.path.join(copies.folder, name)

    def has(self) -> bool:
        """Tell whether the copy is there, and note that it is in use."""
        self._used = time.monotonic()
        return self._copies.has(self._name, self._length * self._dtype.itemsize, self._sha256)

    def fetch(self, unused_since: float = math.inf) -> bool:
        """Have a copy, as `Copies.fetch` does."""
        size = self._length * self._dtype.itemsize
        return self._copies.fetch(self._name, size, self._sha256, unused_since)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._length)
        while True:
            if time.monotonic() - self._used > 1 and not self.has():
                self.fetch()
            try:
                with open(self._path, "rb") as file:
                    file.seek(start * self._dtype.itemsize)
                    content = file.read((stop - start) * self._dtype.itemsize)
                return np.frombuffer(content, self._dtype)  # np.fromfile takes twice as long
            except FileNotFoundError:  # another process has made room
                self._used = -math.inf


class Joined:
    """Joined files are read like one array [sum of lengths], a file being opened when it is needed.

    opened: returns the array of file k. lengths: their numbers of elements. added: what is added to
    the elements of each. copied: whether `opened` returns a `CopiedFile`. At most `OPEN` files are
    open. An element is found by a search among the lengths, so a window costs the same wherever it
    lies. `numpy.asarray` reads all into memory.
    """

    def __init__(
        self,
        opened: Callable[[int], np.ndarray | CopiedFile],
        lengths: Sequence[int],
        dtype: np.dtype,
        added: Sequence[int] | None = None,
        copied: bool = False,
    ):
        self.dtype, self.ndim, self.copied, self.lengths = dtype, 1, copied, lengths
        self.stops = np.fromiter(accumulate(lengths), np.int64, len(lengths))
        self.added = None if added is None else np.asarray(added, dtype)
        self._opened = lru_cache(OPEN)(opened)

    def __len__(self) -> int:
        return int(self.stops[-1])

    @property
    def nbytes(self) -> int:
        return len(self) * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def files(self, start: int, stop: int) -> range:
        """Return the numbers of the files that elements `start` to `stop` - 1 lie in."""
        first, last = (int(self.stops.searchsorted(i, "right")) for i in (start, stop - 1))
        return range(first, last + 1)

    def file(self, k: int) -> np.ndarray | CopiedFile:
        return self._opened(k)

    def around(self, value: int) -> tuple[int, int]:
        """Return the first element, and the one after the last, of the file in which elements that
        ascend, and of which those of file k lie above added[k], come to exceed a value."""
        # Signed, as what `cut` takes from them may leave those of the first files below 0.
        k = max(0, int(self.added.view(np.int64).searchsorted(value, "right")) - 1)
        return int(self.stops[k - 1]) if k else 0, int(self.stops[k])

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            at = range(len(self))[index]  # from the end, if below 0; IndexError outside
            return self[at : at + 1][0]
        start, stop, step = index.indices(len(self))
        found, k = [np.empty(0, self.dtype)], int(self.stops.searchsorted(start, "right"))
        while start < stop:
            first = int(self.stops[k - 1]) if k else 0
            if first < self.stops[k]:
                part = self._opened(k)[start - first : stop - first]
                found.append(part if self.added is None else part + self.added[k])
                start = int(self.stops[k])
            k += 1
        found = found[-1] if len(found) < 3 else np.concatenate(found)
        return found if step == 1 else found[::step]

    def cut(self, start: int, stop: int, less: int = 0) -> "Joined":
        """Return the elements from `start` to `stop`, each of them less `less`; none is read."""
        before = np.concatenate([[0], self.stops[:-1]])
        first = np.clip(before, start, stop)
        lengths, inside = np.clip(self.stops, start, stop) - first, first - before

        def opened(k: int) -> np.ndarray:
            return self._opened(k)[inside[k] : inside[k] + lengths[k]]

        # Below 0 for a file that is cut: unsigned, it wraps, and so does the sum, back again.
        added = None if self.added is None else self.added - self.dtype.type(less)
        return Joined(opened, lengths, self.dtype, added)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)
