"""Documents fill rows whole where they fit, by best fit, instead of windows cut anywhere.

Letters: T block size. A row has T + 1 tokens, of which the first of each piece is not predicted.
"""

import math
from bisect import bisect_right, insort
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from scalegpt.config.limits import BEGINS
from scalegpt.data.documents import DocumentText, Parts

# Rows that are filled together. More leave fewer documents cut, and take longer to fill (0.2 ms of
# 600 documents), which a row costs whose group is not one of the last `CACHED`.
ROWS = 128
CACHED = 512  # of some 10 KiB each


def group_tokens(block_size: int) -> int:
    """Return the most tokens of the text that a group of rows is filled from."""
    return ROWS * (block_size + 1)


class Group(NamedTuple):
    """A group is the rows that some text fills, each a list of (place in the file, length), and the
    parts of documents which that text is, with their end-of-text marks."""

    rows: list[list[tuple[int, int]]]
    parts: Parts


class FittedText(DocumentText):
    """A token file whose documents fill rows, whole where they fit.

    The rows of an epoch are as many as its windows, and are known by where these begin. `ROWS`
    windows that follow each other are a group, whose text fills its rows by `filled`: so each row
    is a pure function of the file, the key and the place of its window. A document comes with the
    mark before it and with the one that ends it. As a mark counts twice so, the rows have no room
    for the end of a group's text, which is left out. It is elsewhere in each epoch, as groups begin
    with other windows, but for the end of the file.

    Nothing is predicted from another piece: its first token is there as its complement. With
    `marked`, BEGINS is added to that token besides.
    """

    def __init__(self, *text: Any, block_size: int, **options: Any):
        super().__init__(*text, **options)
        self.block_size, self.ended = block_size, self.mark or self.ends is None
        self._cached = lru_cache(CACHED)(self.group)

    @property
    def reach(self) -> int:
        """As of DocumentText: a row holds what lies anywhere in its group."""
        return super().reach + group_tokens(self.block_size)

    def window(self, start: int, width: int) -> np.ndarray:
        """Return the row whose window begins at `start`, int32 [T + 1]."""
        assert width == self.block_size + 1, width
        row = self._row(start)
        pieces = [self.tokens[place : place + length] for place, length in row]
        ids = np.concatenate(pieces).astype(np.int32)
        firsts = np.cumsum([0, *(length for _, length in row[:-1])])
        if self.marked:
            ids[firsts] += BEGINS
        ids[firsts[1:]] = ~ids[firsts[1:]]
        # Text without marks may not fill the last row of an epoch.
        return np.pad(ids, (0, width - len(ids)), constant_values=-1)

    def first_token(self, start: int) -> int:
        """Return where in the file the row begins whose window begins at `start`."""
        return self._row(start)[0][0]

    def _row(self, start: int) -> list[tuple[int, int]]:
        index, place = self._in_group(start)
        row = min(index, place)  # of the first group, which may lack rows
        return self._cached(start - row * self.block_size).rows[row]

    def _in_group(self, start: int) -> tuple[int, int]:
        """Return the number of a window in its epoch, and in its group as if that lacked none."""
        # An epoch's windows begin at a random phase, which serves to move its groups, too.
        index, phase = divmod(start % len(self), self.block_size)
        return index, (index + phase) % ROWS

    def group(self, start: int) -> Group:
        """Return the group whose first window begins at `start`."""
        index, place = self._in_group(start)
        count = min(ROWS - place, max(1, len(self) // self.block_size - 1) - index)
        # Each row takes T tokens, and another one for each of its pieces: without end-of-text
        # marks, which give one to each document, these come from the next group.
        parts = self.parts(start, count * (self.block_size + (not self.ended)))
        lengths = np.minimum(parts.lengths + self.ended, len(self) - parts.places)
        parts = parts._replace(lengths=lengths)
        # Text without marks may have too little for the last rows of an epoch, which then come
        # again, and nothing that can be predicted where each document is one token.
        rows = filled(parts, self.block_size, count) or [[(int(parts.places[0]), 1)]]
        return Group([rows[i % len(rows)] for i in range(count)], parts)

    def shares(self) -> tuple[float, float]:
        """Return, from a sample of an epoch's groups, which share of the documents that fit into a
        row are not whole in one, and which share of the text is left out."""
        size = ROWS * self.block_size
        groups = max(1, len(self) // size)
        fit = cut = predicted = read = 0
        for i in range(0, groups, math.ceil(groups / 16)):
            rows, parts = self.group(i * size)
            pieces = {piece for row in rows for piece in row}
            # The last one may go on in another group.
            for place, length, whole in list(zip(*map(np.ndarray.tolist, parts), strict=True))[:-1]:
                if whole and length <= self.block_size + 1:
                    fit, cut = fit + 1, cut + ((place, length) not in pieces)
            # Without marks, what the next group begins with is left out by that one, if at all.
            stops = np.minimum(parts.lengths.cumsum(), len(rows) * self.block_size)
            lengths = parts.lengths if self.ended else np.diff(stops, prepend=0)
            own = int(np.maximum(lengths - 1, 0).sum())
            predicted += min(own, sum(length - 1 for _, length in pieces))
            read += own
        return cut / max(1, fit), 1 - predicted / max(1, read)


def filled(parts: Parts, block_size: int, count: int) -> list[list[tuple[int, int]]]:
    """Fill `count` rows of block_size + 1 tokens with parts of documents.

    A part that is longer than a row fills rows from its begin, and its rest is a piece as others
    are. Then each row takes the longest piece that fits, again and again (best fit decreasing).
    Where none fits, the row is filled with the begin of a longer one: of the longest that does not
    begin a document, as that is cut already, or else of the longest. Pieces of a cut document share
    a token, so that each token is predicted once. In a row, documents that begin come first.

    The last parts are kept back until all others are in rows, and then come in the order of the
    text: so what is left out is the end of the text, whatever the lengths of its documents.
    """
    width, rows, rest = block_size + 1, [], list[tuple[int, bool, int]]()
    last, taken = list[tuple[int, bool, int]](), 0
    for place, length, begins in zip(*map(np.ndarray.tolist, parts), strict=True):
        # One token of each row is for a document that is cut there, whose pieces share a token.
        taken += length - 1 + math.ceil((length - 1) / block_size)
        while taken <= count * block_size and length >= width:
            rows.append([(place, width)])
            place, length, begins = place + block_size, length - block_size, False
        if length > 1:
            (rest if taken <= count * block_size else last).append((length, begins, place))
    rest.sort()
    last.reverse()
    while (rest or last) and len(rows) < count:
        row, room = list[tuple[int, bool, int]](), width
        while (rest or last) and room:
            rest = rest or [last.pop()]
            if i := bisect_right(rest, (room, True, math.inf)):
                piece = rest.pop(i - 1)
            else:
                cut = (i for i in range(len(rest) - 1, -1, -1) if not rest[i][1])
                length, begins, place = rest.pop(next(cut, -1))
                piece, left = (room, begins, place), room - 1
                insort(rest, (length - left, begins and not left, place + left))
            row.append(piece)
            room -= piece[0]
        row.sort(key=lambda piece: not piece[1])
        rows.append([(place, length) for length, _, place in row])
    return rows[:count]
