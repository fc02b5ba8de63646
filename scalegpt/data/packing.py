"""Whole conversations are packed into the rows of a batch, by their lengths alone; pairs are not.

A conversation begins with the mark bos, written as ~bos because nothing predicts it; no other value
of a file is that. Which conversations share a row follows from the file and the width of a row, so
that neither seed, mesh nor step changes it. Letters: T block size.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from scalegpt.data.tokenizer import MARKS
from scalegpt.errors import Mistake, counted


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The rows of a file of conversations: self[i] is int32 [width], padded with -1.

    tokens: the file's signed ids. starts, lengths: of the conversations' parts that are used, row
    after row, of which row i has firsts[i] to firsts[i + 1]. shortened, left_out: counts of
    conversations, or pairs, that are too long. together: rows that no batch parts, 2 of pairs.
    reference: of pairs, the log-probability of each row's answer by the weights that a run starts
    from, float32 [rows]; NaN until the run has computed or read it (`run/reference.py`).
    """

    name: str
    width: int
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    shortened: int
    left_out: int
    together: int = 1
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        row, used = np.full(self.width, -1, np.int32), 0
        for part in range(self.firsts[i], self.firsts[i + 1]):
            start, length = self.starts[part], self.lengths[part]
            row[used : used + length] = self.tokens[start : start + length]
            used += length
        return row

    def first_token(self, i: int) -> int:
        """Return where row i's first conversation begins in the file."""
        return int(self.starts[self.firsts[i]])

    def __str__(self) -> str:
        """Say how many conversations there are, what became of the longest, and how full rows are.

        As `52,002 conversations in 9,120 rows, 98.7 % full; 31 shortened to ...`.
        """
        if self.together > 1:
            n = len(self) // self.together
            text = f"{counted(n, 'pair')} in rows of {self.width - 1:,} tokens"
            return f"{text}; {self.left_out:,} are too long" if self.left_out else text
        fill = self.lengths.sum() / (len(self) * self.width)
        conversations = counted(len(self.starts) + self.left_out, "conversation")
        text = f"{conversations} in {counted(len(self), 'row')}, {fill:.1%} full"
        if self.shortened:
            text += f"; {self.shortened:,} shortened to model.block_size={self.width - 1}"
        if self.left_out:
            text += f"; {self.left_out:,} left out, as no answer begins within it"
        return text


def end_id(vocab_size: int) -> int:
    """Return the id of <|end|>, by the vocabulary of a tokenizer for chats.

    MARKS are its last ids. So no tokenizer is loaded, which might need the network.
    """
    return mark_id(vocab_size, "end")


def mark_id(vocab_size: int, name: str) -> int:
    """Return the id of one of MARKS but bos, as `end_id`."""
    return vocab_size - len(MARKS) + MARKS.index(name)


def pack(name: str, tokens: np.ndarray, vocab_size: int, block_size: int) -> PackedRows:
    """Pack the conversations of a file of signed ids into rows of block_size + 1 tokens.

    vocab_size: the tokenizer's. One that is too long loses whole turns from its end; if not even
    its first answer fits, the answer is cut; without any trained token it is left out. name: of the
    file, for messages. Raises Mistake if none is left.
    """
    width, tokens = block_size + 1, np.asarray(tokens)
    if tokens[0] >= 0:
        raise Mistake(f"{name} does not begin with the mark of a conversation; prepare it again")
    begins = np.flatnonzero(tokens == tokens[0])
    lengths = np.diff(begins, append=len(tokens))
    long = np.flatnonzero(lengths > width)
    ends = np.append(0, np.flatnonzero(tokens == end_id(vocab_size)) + 1)  # of trained answers
    kept = ends[np.searchsorted(ends, begins[long] + width, "right") - 1]
    lengths[long] = np.where(kept > begins[long], kept - begins[long], width)
    used = np.array([(tokens[b : b + n] >= 0).any() for b, n in zip(begins, lengths, strict=True)])
    if not used.any():
        raise Mistake(
            f"{name}: no answer of its {counted(len(begins), 'conversation')} begins within "
            f"model.block_size={block_size}; raise it, or prepare shorter conversations"
        )
    shortened = int(used[long].sum())
    begins, lengths = begins[used], lengths[used]
    order, firsts = _rows(lengths, width)
    return PackedRows(
        name,
        width,
        tokens,
        begins[order],
        lengths[order],
        firsts,
        shortened,
        len(used) - len(begins),
    )


def one_in_each_row(name: str, tokens: np.ndarray, block_size: int) -> PackedRows:
    """Return rows of one conversation: of pair i that with the chosen answer is 2i, the other next.

    A pair of which one is longer than block_size is left out. Rows are as wide as the longest that
    is left, rounded up for kernels of attention. name: of the file, for messages. Raises Mistake if
    none is left.
    """
    tokens = np.asarray(tokens)
    begins = np.flatnonzero(tokens == tokens[0])
    if tokens[0] >= 0 or len(begins) % 2:
        raise Mistake(f"{name} does not hold pairs of conversations; prepare it again")
    lengths = np.diff(begins, append=len(tokens))
    fits = (lengths.reshape(-1, 2) <= block_size + 1).all(1)
    if not fits.any():
        raise Mistake(
            f"{name}: none of its {counted(len(fits), 'pair')} fits within model.block_size="
            f"{block_size}; raise it, or prepare shorter conversations"
        )
    kept = np.repeat(fits, 2)
    longest = int(lengths[kept].max()) - 1
    step = 16 if longest <= 128 else 128
    return PackedRows(
        name,
        min(block_size, -(-longest // step) * step) + 1,
        tokens,
        begins[kept],
        lengths[kept],
        np.arange(kept.sum() + 1),
        0,
        int((~fits).sum()),
        together=2,
        reference=np.full(kept.sum(), np.nan, np.float32),
    )


def _rows(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill one row after the other with the longest conversations that still fit.

    Returns the numbers of the conversations in the order of the rows, and where in that order each
    row begins, with the end. This is first-fit decreasing: 11/9 of the fewest rows at most.
    """
    by_length: dict[int, list[int]] = {}
    for i in range(len(lengths) - 1, -1, -1):  # so that the first of a length is taken first
        by_length.setdefault(int(lengths[i]), []).append(i)
    available, order, firsts = sorted(by_length), list[int](), [0]
    while available:
        room = width
        while place := bisect_right(available, room):
            length = available[place - 1]
            order.append(by_length[length].pop())
            room -= length
            if not by_length[length]:
                del available[place - 1]
        firsts.append(len(order))
    return np.array(order), np.array(firsts)
