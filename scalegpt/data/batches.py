"""The tokens that a step sees are a pure function of (seed, step), read ahead by Grain.

Nothing here keeps state, so a run resumes at any step, on any number of hosts, with the batches
it would have had. Letters: A accumulation, B sequences of a step, R rows of a batch, T block size.
"""

import functools
import hashlib
import math
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from scalegpt.config import BatchConfig
from scalegpt.data.documents import DocumentText
from scalegpt.data.joined import CopiedFile, Joined
from scalegpt.data.packing import PackedRows
from scalegpt.data.prompts import Prompts
from scalegpt.data.token_files import Dataset, check_tokens, open_dataset
from scalegpt.errors import Mistake, counted
from scalegpt.files.staging import warn

__all__ = [
    "Dataset",
    "EvalBatches",
    "TrainBatches",
    "TrainOrder",
    "check_tokens",
    "mixture_index",
    "open_dataset",
    "train_iterator",
]

# Rounds of Grain's index_shuffle. With the customary 4, neighbours stay correlated at some sizes
# (by 0.45 among 1.0M windows), so a batch clusters in the file; 8 leave up to 0.05, 12 nothing.
ROUNDS = 12
TABLE = 4096  # up to so many windows, an epoch's whole permutation is kept in memory
PIECES = 16  # more mix the text better, and touch more of its files at a time
STEPS = 1 << 40  # the length of a source that never ends; STEPS * B still fits int64


class TrainOrder:
    """The order in which training visits the windows of one token file, by random access.

    It never ends. Each epoch is a new random permutation of all `n_windows` windows (Grain's global
    shuffle). An epoch also shifts the grid of windows by a random phase, so that epochs cut the
    text at other places. `stream` numbers the datasets of a mixture, for orders that differ.

    span: so many tokens are shuffled among themselves before the next ones come, so that an hour
    reads few parts of a large file. An epoch then permutes pieces of span / `PIECES` tokens, of
    which `PIECES` that follow each other are a span; what is left at the end of the file, less than
    a piece, is in the epoch's last span.
    """

    def __init__(
        self, length: int, block_size: int, seed: int, stream: int = 0, span: float | None = None
    ):
        if length < block_size + 1:
            raise Mistake(
                f"{counted(length, 'token')} cannot hold a window of block_size {block_size} + 1"
            )
        self.block_size, self.seed, self.stream = block_size, seed, stream
        self.n_windows = max(1, (length - block_size) // block_size)
        self.phases = min(block_size, length - self.n_windows * block_size)
        self.piece = math.ceil(span / block_size / PIECES) if span else 0
        if self.piece * PIECES >= self.n_windows:
            self.piece = 0  # there are no spans
        self.spans = -(-self.n_windows // (self.piece * PIECES)) if self.piece else 1

    def window(self, rows: np.ndarray) -> np.ndarray:
        """Return the first tokens, int64 [n], of the windows numbered `rows`, int64 [n].

        Numbers count from 0 over all epochs. The window that begins at token s is tokens s to s + T
        inclusive, all within the file.
        """
        epochs, index = np.divmod(np.asarray(rows, np.int64), self.n_windows)
        starts = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            phase, seed = self._drawn(epoch)
            if self.piece:
                shuffled = self._in_spans(index[in_epoch], epoch, seed)
            else:
                shuffled = _shuffle(index[in_epoch], self.n_windows, seed)
            starts[in_epoch] = phase + shuffled * self.block_size
        return starts

    def span(self, row: int) -> int:
        """Return the number of the span that a row is in, counted over all epochs."""
        epoch, index = divmod(row, self.n_windows)
        return epoch * self.spans + (index // (self.piece * PIECES) if self.piece else 0)

    def stretches(self, span: int) -> list[tuple[int, int]]:
        """Return the pieces of a span: the first token of each, and the one after its last."""
        epoch, number = divmod(span, self.spans)
        if not self.piece:
            return [(0, self.phases + self.n_windows * self.block_size)]
        phase, seed = self._drawn(epoch)
        last = -(-self.n_windows // self.piece)
        slots = np.arange(number * PIECES, min(last, (number + 1) * PIECES))
        begins = self._pieces(slots, seed) * self.piece
        stops = np.minimum(begins + self.piece, self.n_windows)
        return [
            (phase + a * self.block_size, phase + b * self.block_size + 1)
            for a, b in zip(begins.tolist(), stops.tolist(), strict=True)
        ]

    def _drawn(self, *names: int) -> tuple[int, int]:
        """Return a phase and a seed, uint32, for an epoch, or for a span of one."""
        # A hash, not np.random: the order must not change with NumPy's version.
        name = "/".join(map(str, ("scalegpt", self.seed, self.stream, *names)))
        digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
        phase, seed = struct.unpack("<QI", digest)
        return phase % self.phases, seed

    def _in_spans(self, index: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        """Return the windows at these indices of an epoch that shuffles within spans."""
        index, width = index.copy(), self.piece * PIECES
        spans = index // width
        for span in np.unique(spans).tolist():
            inside, first = spans == span, span * width
            n = min(width, self.n_windows - first)
            within = _shuffle(index[inside] - first, n, self._drawn(epoch, span)[1])
            index[inside] = first + within
        slots, within = np.divmod(index, self.piece)
        return self._pieces(slots, seed) * self.piece + within

    def _pieces(self, slots: np.ndarray, seed: int) -> np.ndarray:
        """Return which pieces of the file are the numbered ones of an epoch."""
        pieces, n = slots.copy(), self.n_windows // self.piece
        whole = slots < n
        pieces[whole] = _shuffle(slots[whole], n, seed)
        return pieces


def train_order(
    tokens: np.ndarray | DocumentText | PackedRows | Prompts,
    block_size: int,
    seed: int,
    stream: int = 0,
    span: float | None = None,
) -> TrainOrder:
    """Return the order of a file's windows, rows, pairs of rows or prompts, as `TrainOrder`."""
    if isinstance(tokens, PackedRows | Prompts):
        # A row is one step wide, so that no phase shifts it.
        return TrainOrder(len(tokens) // rows_together(tokens) + 1, 1, seed, stream)
    return TrainOrder(len(tokens), block_size, seed, stream, span)


def rows_together(tokens: Any) -> int:
    """Return how many rows that follow each other in a file do so in a batch, 2 of pairs."""
    return tokens.together if isinstance(tokens, PackedRows) else 1


def _shuffle(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Permute [0, n) by this uint32 seed; return where each index goes, int64."""
    if n <= TABLE:
        return _table(n, seed)[index]
    shuffled = [index_shuffle(i, max_index=n - 1, seed=seed, rounds=ROUNDS) for i in index.tolist()]
    return np.array(shuffled, np.int64)


@functools.lru_cache(maxsize=64)  # of 32 KiB at most: an epoch or two of each small dataset
def _table(n: int, seed: int) -> np.ndarray:
    """Return the whole permutation of a small n: the ranks of n shuffled numbers out of 65,536.

    index_shuffle(max_index=n - 1) would draw from as many until one is below n, which takes 5 ms an
    index at n = 10.
    """
    keys = [index_shuffle(i, max_index=0xFFFF, seed=seed, rounds=ROUNDS) for i in range(n)]
    return np.argsort(keys)


def mixture_index(rows: np.ndarray, parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Deal `rows` out to datasets; return (dataset, row within that dataset), both int64 [n].

    Of every sum(parts) consecutive rows, dataset d gets exactly parts[d], spread evenly. So the
    counts of any prefix are right to within a few rows, and each dataset's rows are 0, 1, 2...
    """
    rows = np.asarray(rows, np.int64)
    dataset, within = np.zeros_like(rows), np.zeros_like(rows)
    left, this, after = sum(parts), rows, rows + 1  # rows of the datasets not yet served
    open_ = np.ones(len(rows), bool)
    for d, part in enumerate(parts):
        # floor(k * (left - part) / left) of the first k rows go on to the later datasets; in two
        # parts, since the product would overflow int64 late in a long run.
        onward = [
            k // left * (left - part) + k % left * (left - part) // left for k in (this, after)
        ]
        served = open_ & (onward[0] == onward[1])
        dataset[served], within[served] = d, (this - onward[0])[served]
        open_ &= ~served
        (this, after), left = onward, max(1, left - part)
    return dataset, within


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers: [0.7, 0.3] becomes [7, 3], and [1/3, 2/3] becomes [1, 2].

    Shares that are no ratio of numbers up to a million are kept to nine digits.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise Mistake(f"data weight {weight} must be above 0; leave that dataset out instead")
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    ratios = [share.limit_denominator(10**6) for share in shares]
    scale = math.lcm(*(ratio.denominator for ratio in ratios))
    if scale > 10**9 or any(abs(r - s) > 1e-9 for r, s in zip(ratios, shares, strict=True)):
        ratios, scale = shares, 10**9
    parts = [max(1, round(ratio * scale)) for ratio in ratios]
    return [part // math.gcd(*parts) for part in parts]


class TrainBatches:
    """Training batches by step, as Grain reads them: self[step] is int32 [A, len(rows), T + 1].
    Of pairs it is a dict with these "tokens", and with the "reference" of each row, float32.

    A microbatch has M of the step's B rows: row m of microbatch a is row a * M + m. Only this
    host's m, those in `rows`, are read. Neither M nor the split over hosts changes which B windows
    a step has. Where B grows, so does A = B // M.

    datasets: token arrays, 1-D, texts of documents, or packed conversations. weights: each
    dataset's share of the rows, of any sum. span: of texts, as of `TrainOrder`.
    """

    def __init__(
        self,
        datasets: Sequence[np.ndarray | DocumentText | PackedRows | Prompts],
        weights: Sequence[float],
        block_size: int,
        seed: int,
        batch: BatchConfig,
        microbatch: int,
        rows: np.ndarray,
        span: float | None = None,
    ):
        if len(weights) != len(datasets):
            raise Mistake(f"{len(weights)} weights for {len(datasets)} datasets: give one each")
        rows = np.asarray(rows, np.int64)
        sizes = (batch.sequences, *batch.growth.values())
        assert all(size % microbatch == 0 for size in sizes), (sizes, microbatch)
        assert rows.size and 0 <= rows.min() and rows.max() < microbatch, (rows, microbatch)
        # Plain array views: slicing a memmap object costs more than copying the row.
        self.tokens = [np.asarray(t) if isinstance(t, np.ndarray) else t for t in datasets]
        self.orders = [train_order(t, block_size, seed, i, span) for i, t in enumerate(datasets)]
        self.ahead: list[CopiedAhead] = []  # of each data set, once batches are read in order
        self.parts, self.together = _whole_parts(weights), rows_together(datasets[0])
        self.block_size, self.batch, self.microbatch, self.rows = (
            block_size,
            batch,
            microbatch,
            rows,
        )

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Any:
        if not 0 <= step < STEPS:
            raise IndexError(f"step {step}")
        dataset, starts = self.windows(step)
        batch = np.empty((len(starts), self.block_size + 1), np.int32)
        reference = np.empty(len(starts), np.float32)
        for d in np.unique(dataset).tolist():
            positions = np.flatnonzero(dataset == d)
            _read(self.tokens[d], starts[positions], batch, positions)
            if self.together > 1:
                reference[positions] = self.tokens[d].reference[starts[positions]]
        batch = batch.reshape(-1, len(self.rows), self.block_size + 1)
        if self.together == 1:
            return batch
        return {"tokens": batch, "reference": reference.reshape(batch.shape[:2])}

    def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (dataset, first token), both int64 [A * R], of this host's rows of `step`.

        Of conversations it is the number of the row, of texts of documents what their `window`
        takes.
        """
        first, size = self.batch.rows_after(step), self.batch.sequences_at(step + 1)
        rows = first + (np.arange(0, size, self.microbatch)[:, None] + self.rows).reshape(-1)
        pairs, side = np.divmod(rows, self.together)  # of other data than pairs, rows and 0
        if len(self.tokens) == 1:
            return np.zeros_like(rows), self._starts(0, pairs) * self.together + side
        dataset, within = mixture_index(pairs, self.parts)
        starts = np.empty_like(rows)
        for d in np.unique(dataset).tolist():
            in_dataset = dataset == d
            starts[in_dataset] = self._starts(d, within[in_dataset])
        return dataset, starts * self.together + side

    def _starts(self, d: int, rows: np.ndarray) -> np.ndarray:
        order, starts = self.orders[d], self.orders[d].window(rows)
        if self.ahead:
            self.ahead[d].reached(order.span(int(rows.max())))
        if isinstance(self.tokens[d], DocumentText):
            starts += rows // order.n_windows * len(self.tokens[d])
        return starts


def _read(
    tokens: np.ndarray | DocumentText | PackedRows,
    starts: np.ndarray,
    batch: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Copy windows into rows of `batch`; a slice a row reads faster than a gather by index."""
    width, packed = batch.shape[1], isinstance(tokens, PackedRows)
    documents = isinstance(tokens, DocumentText)
    for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
        if documents:
            batch[row] = tokens.window(start, width)
        else:
            batch[row] = tokens[start] if packed else tokens[start : start + width]


class EvalBatches:
    """The fixed windows of a validation file, in order: self[i] is int32 [len(rows), T + 1].

    Window j is tokens j*T to j*T + T, so the whole file's windows predict every token but the
    first exactly once, but for the first of documents that say so (`DocumentText`). Past the end of
    the file, and past the first `windows` if given, ids are -1, and the loss leaves these targets
    out. Batch i is windows i*R to i*R + R - 1, of which this host
    reads `rows`. `tokens` counts the targets that are not -1, over all batches and hosts. spread:
    the windows lie evenly over the whole file, instead of side by side at its begin.

    Of packed conversations, a window is a row; they are always spread, as the first rows hold the
    longest. Of pairs, which have two rows each, the windows that are asked for are pairs.
    """

    def __init__(
        self,
        tokens: np.ndarray | DocumentText | PackedRows,
        block_size: int,
        rows_per_batch: int,
        rows: np.ndarray,
        windows: int | None = None,
        spread: bool = False,
    ):
        self.packed = isinstance(tokens, PackedRows)
        if len(tokens) < 2 and not self.packed:
            raise Mistake(
                f"a validation file of {counted(len(tokens), 'token')} has nothing to predict"
            )
        if windows is not None and windows < 1:
            raise Mistake(f"eval.windows={windows} must be at least 1, or null for all")
        self.documents = isinstance(tokens, DocumentText)
        self.array = np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens
        self.block_size = block_size
        self.rows_per_batch, self.rows = rows_per_batch, np.asarray(rows, np.int64)
        self.together, step, targets = 1, block_size, len(tokens) - 1
        if self.packed:
            self.together = tokens.together
            step, targets = 1, len(tokens) // self.together
            spread = spread or self.together == 1
        self.windows = -(-targets // step)
        if windows is not None:
            self.windows = min(windows, self.windows)
        self.spacing = max(step, targets // self.windows) if spread else step
        self.tokens = min(self.windows * step, targets)
        self.windows *= self.together
        if self.packed:
            read = (self.array[self.start(i)] for i in range(self.windows))
            self.tokens = sum(int((row >= 0).sum()) for row in read)
        elif self.documents and self.array.masks:
            read = (self.read(i) for i in range(self.windows))
            self.tokens = sum(int((row[1:] >= 0).sum()) for row in read)

    def start(self, window: int) -> int:
        """Return the first token of a window, or the number of the row that it is."""
        pair, side = divmod(window, self.together)  # of other data than pairs, the window and 0
        return pair * self.spacing * self.together + side

    def read(self, window: int) -> np.ndarray:
        """Return the ids of a window, which may end with the file."""
        start, width = self.start(window), self.block_size + 1
        if self.documents:
            return self.array.window(start, width)
        return self.array[start] if self.packed else self.array[start : start + width]

    def __len__(self) -> int:
        return -(-self.windows // self.rows_per_batch)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):  # IndexError is what ends a `for batch in batches`
            raise IndexError(f"batch {i} of {len(self)}")
        batch = np.full((len(self.rows), self.block_size + 1), -1, np.int32)
        for row, window in enumerate((i * self.rows_per_batch + self.rows).tolist()):
            if window < self.windows:
                values = self.read(window)
                batch[row, : len(values)] = values
        return batch


class CopiedAhead:
    """Copies the parts of a span behind a URL, and then those of the next one, before their turn.

    What else there is no room for is copied when it is read. A thread copies, until another span is
    reached or this object is gone.
    """

    def __init__(self, order: TrainOrder, text: Any):
        streams = (text.tokens, text.ends) if isinstance(text, DocumentText) else (text,)
        self.streams = [s for s in streams if isinstance(s, Joined) and s.copied]
        self.order, self.span = order, -1
        self.reach = text.reach if isinstance(text, DocumentText) else 0

    def reached(self, span: int) -> None:
        """Say that a window of a span is going to be read."""
        if span == self.span or not self.streams:
            return
        self.span, began = span, time.time()  # files used from now on are kept for these spans
        files = dict.fromkeys(file for s in (span, span + 1) for file in self._files(s))
        arguments = (weakref.ref(self), span, [f for f in files if not f.has()], began)
        threading.Thread(target=_copy, args=arguments, daemon=True, name="copies").start()

    def _files(self, span: int) -> Iterator[CopiedFile]:
        for start, stop in self.order.stretches(span):
            first, last = max(0, start - self.reach), stop + self.reach
            for k in self.streams[0].files(first, min(last, len(self.streams[0]))):
                yield from (s.file(k) for s in self.streams if s.lengths[k])


def _copy(
    ahead: weakref.ref[CopiedAhead], span: int, files: list[CopiedFile], unused_since: float
) -> None:
    told = False  # of one of the files of a span, as all may be away
    for file in files:
        try:
            if getattr(ahead(), "span", None) != span or not file.fetch(unused_since):
                return
        except Mistake as error:  # it is tried again when a window needs the file, which ends a run
            if not told:
                warn(f"{error}; the run goes on until an update needs it")
            told = True


def train_iterator(source: TrainBatches, start_step: int, prefetch: int = 2) -> Iterator:
    """Return Grain's iterator over `source` from `start_step` on; it has `close()`.

    One thread reads `prefetch` batches ahead. An error while reading is raised by `next`.
    """
    source.ahead = [CopiedAhead(*pair) for pair in zip(source.orders, source.tokens, strict=True)]
    # One thread: Grain's default of 16 takes the trainer's cores and reads no faster.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator
