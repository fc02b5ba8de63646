"""A text knows its documents: an epoch may shuffle them, and a window may say where each begins.

Document i of a file begins where document i - 1 ends, or with the end-of-text mark before that end,
where there is one: the mark ends one document and is what the next one is predicted from, as a
prompt of nothing is. Letters: T block size.
"""

import hashlib
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from scalegpt.config.limits import BEGINS
from scalegpt.data.joined import Joined
from scalegpt.errors import Mistake

# Documents that are shuffled among themselves, a power of 2. A window costs one search in the index
# for its bucket, and sorting so many keys (0.2 ms) where that is not one of the last `CACHED`.
BUCKET = 4096
CACHED = 128  # of 64 KiB each


class Parts(NamedTuple):
    """Parts are consecutive pieces of documents: where each begins in the file, how many tokens it
    has, and whether its document begins with it."""

    places: np.ndarray
    lengths: np.ndarray
    whole: np.ndarray


def reach(tokens: int, documents: int) -> int:
    """Return about how many tokens of the file a shuffled document may move."""
    return tokens if documents <= BUCKET else BUCKET * tokens // documents


class DocumentText:
    """A token file with its documents, which windows are read from.

    tokens: the file's ids. ends: the index, where each document ends; it is read where it is
    needed, and may be longer than memory. None: wherever there is a mark. eot: the tokenizer's
    end-of-text mark, or None. key: of the orders in which epochs have the documents; None: all have
    that of the file. marked: windows say where documents begin. BEGINS is added to the first id of
    each, and where that is no end-of-text mark, it is not predicted, as what comes before it is
    another document: it is there as its complement, like padding.

    With a key, an epoch's text is a permutation of the file's documents, each whole. Buckets of
    `BUCKET` consecutive documents follow each other as in the file, and within each the documents
    are shuffled anew, by (key, epoch, bucket); the borders of buckets are other ones in each epoch.
    A file of at most `BUCKET` documents is one bucket. As a bucket takes the same tokens of the
    epoch as of the file, no position needs a sum over all documents. `TrainOrder` cuts the epoch
    into windows and shuffles these over all of it, so that a batch comes from everywhere. Thus what
    is not shuffled is only that documents which share a window were less than `BUCKET` documents
    apart in the file.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        ends: np.ndarray | None,
        eot: int | None,
        key: str | None = None,
        marked: bool = False,
    ):
        # Plain views: an element of a memmap object costs more than its page.
        self.tokens, self.ends = (
            np.asarray(x) if isinstance(x, np.ndarray) else x for x in (tokens, ends)
        )
        self.eot, self.key, self.marked = eot, key, marked
        self.documents = 0 if ends is None else len(ends)
        last = {int(tokens[int(ends[i]) - 1]) for i in (0, -1) if self.documents and ends[i]}
        self.mark = int(last == {eot})  # tokens by which a document begins before the last one ends
        self._bucket = lru_cache(CACHED)(self._shuffled)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def masks(self) -> bool:
        """Whether windows may have targets that are not predicted."""
        return self.marked and self.documents > 0 and not self.mark

    @property
    def reach(self) -> int:
        """About how many tokens of the file lie between a window's place and what it holds."""
        return 0 if self.key is None else reach(len(self), self.documents)

    def window(self, start: int, width: int) -> np.ndarray:
        """Return the `width` tokens from `start` on, fewer at the end, int32: of epoch e from e
        times the length on."""
        parts = self.parts(start, width)
        read = [self.tokens[a : a + n] for a, n in zip(parts.places, parts.lengths, strict=True)]
        ids = np.concatenate(read).astype(np.int32)
        if self.marked:
            begins = (np.cumsum(parts.lengths) - parts.lengths)[parts.whole]
            cut = begins[ids[begins] != (-1 if self.eot is None else self.eot)]
            ids[begins] += BEGINS
            ids[cut] = ~ids[cut]
        return ids

    def first_token(self, start: int) -> int:
        """Return where in the file the token at `start` is."""
        return int(self.parts(start, 1).places[0])

    def parts(self, start: int, width: int) -> Parts:
        """Return the parts of documents that are the `width` tokens from `start` on."""
        epoch, position = divmod(start, len(self))
        stop, found = min(position + width, len(self)), []
        if self.ends is None:
            marks = position + np.flatnonzero(self.tokens[position:stop] == self.eot)
            places = np.union1d([position], marks)
            return Parts(places, np.diff(places, append=stop), np.isin(places, marks))
        while position < stop:
            borders, places = self._bucket(epoch, self._bucket_at(epoch, position))
            if (np.diff(borders) < 0).any() or not borders[0] <= position < borders[-1]:
                raise Mistake("an index of documents (.idx) is damaged: copy or prepare it again")
            first = int(borders.searchsorted(position, "right")) - 1
            last = int(borders.searchsorted(stop, "left"))
            begins = borders[first : min(last, len(places))]
            inside = np.maximum(begins, position)
            ends = np.minimum(borders[first + 1 : first + 1 + len(begins)], stop)
            some = ends > inside  # a document may be empty
            places = places[first : first + len(begins)] + (inside - begins)
            found.append((places[some], (ends - inside)[some], (inside == begins)[some]))
            position = int(ends[-1])
        return Parts(*map(np.concatenate, zip(*found, strict=True)))

    def begin(self, document: int) -> int:
        """Return where a document begins, and the length of the file for one after the last."""
        if document == self.documents:
            return len(self)
        return int(self.ends[document - 1]) - self.mark if document else 0

    def _shift(self, epoch: int) -> int:
        """Return how many documents the first bucket of an epoch lacks."""
        if self.key is None or self.documents <= BUCKET:
            return 0
        name = f"{self.key}/{epoch}/buckets"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % BUCKET

    def _bucket_at(self, epoch: int, position: int) -> int:
        """Return the bucket that a position of an epoch lies in."""
        value = position + self.mark
        # In parts, one is searched, as others may have to be copied to this machine first.
        within = self.ends.around(value) if isinstance(self.ends, Joined) else (0, self.documents)
        document = min(bisect_right(self.ends, value, *within), self.documents - 1)
        return (document + self._shift(epoch)) // BUCKET

    def _shuffled(self, epoch: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of a bucket in the order of an epoch: the positions between them
        [n + 1], and where each begins in the file [n]."""
        first = bucket * BUCKET - self._shift(epoch)
        first, last = max(first, 0), min(first + BUCKET, self.documents)
        inner = np.asarray(self.ends[first : last - 1]).astype(np.int64) - self.mark
        begins = np.concatenate([[self.begin(first)], inner, [self.begin(last)]])
        if self.key is None:
            return begins, begins[:-1]
        # A hash, not np.random: the order must not change with NumPy's version.
        name = f"{self.key}/{epoch}/{bucket}"
        keys = np.frombuffer(hashlib.shake_128(name.encode()).digest(8 * (last - first)), "<u8")
        # Its number is part of a key: sorting pairs, or stably, takes several times as long.
        low = np.uint64(BUCKET - 1)
        keys = np.sort(keys & ~low | np.arange(last - first, dtype=np.uint64))
        order = (keys & low).astype(np.int64)
        lengths = np.diff(begins)[order]
        return begins[0] + np.concatenate([[0], np.cumsum(lengths)]), begins[:-1][order]
