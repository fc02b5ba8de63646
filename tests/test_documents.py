"""The documents of a text: their order in an epoch, against a plain loop over lists."""

import hashlib
import time
import tracemalloc

import numpy as np
import pytest

from scalegpt.config import BatchConfig
from scalegpt.data import documents as module
from scalegpt.data.batches import TrainBatches, TrainOrder
from scalegpt.data.documents import DocumentText

EOT = 0


def written(lengths, mark=True):
    """Ids that say where they are, in documents of these lengths, and where each of them ends."""
    ends = np.cumsum(lengths).astype("<u8")
    tokens = np.arange(1, ends[-1] + 1).astype("<u4")
    if mark:
        tokens[ends[ends > 0] - 1] = EOT
    return tokens, ends


def epoch_of(tokens, ends, mark, key, epoch, bucket):
    """An epoch's documents in order, as lists of ids: a loop over all of them."""
    begins = [0, *(int(end) - mark for end in ends[:-1]), len(tokens)]
    n, shift, whole = len(ends), 0, []
    if n > bucket:
        digest = hashlib.blake2b(f"{key}/{epoch}/buckets".encode(), digest_size=8).digest()
        shift = int.from_bytes(digest, "little") % bucket
    for number in range((n + shift) // bucket + 1):
        inside = [i for i in range(n) if (i + shift) // bucket == number]
        stream = hashlib.shake_128(f"{key}/{epoch}/{number}".encode()).digest(8 * len(inside))
        keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(len(inside))]
        keys = [value // bucket for value in keys]
        for _, i in sorted(zip(keys, inside, strict=True)):
            whole.append(tokens[begins[i] : begins[i + 1]].tolist())
    return whole


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("bucket", [4, 64])
def test_an_epoch_has_each_document_once_and_whole(monkeypatch, bucket, mark):
    monkeypatch.setattr(module, "BUCKET", bucket)
    lengths = np.random.default_rng(bucket).integers(0, 9, 50) + mark
    lengths[7], lengths[8] = 90, mark  # one longer than windows, one without text
    tokens, ends = written(lengths, mark)
    text = DocumentText(tokens, ends, EOT, "k")
    orders, begins = set(), [0, *(ends[:-1].astype(int) - mark).tolist()]
    for epoch in range(3):
        whole = epoch_of(tokens, ends, mark, "k", epoch, bucket)
        expected = sum(whole, [])
        assert sorted(expected) == sorted(tokens.tolist()) and len(whole) == 50
        orders.add(tuple(expected))
        first = epoch * len(text)
        assert text.window(first, len(text)).tolist() == expected
        for start in range(0, len(text) - 9, 7):  # any window is a part of it
            assert text.window(first + start, 10).tolist() == expected[start : start + 10]
            place = text.first_token(first + start)
            assert tokens[place] == expected[start]
        parts = text.parts(first, len(text))
        assert parts.whole.all() and set(parts.places.tolist()) <= set(begins)
        assert len(set(parts.places.tolist())) == (np.diff([*begins, len(tokens)]) > 0).sum()
    assert len(orders) == 3
    assert DocumentText(tokens, ends, EOT, None).window(5, 60).tolist() == tokens[5:65].tolist()


def test_the_order_of_documents_never_changes():
    """A run continued with a newer version must see the batches it would have seen."""
    tokens, ends = written([3] * 20_000)
    text = DocumentText(tokens, ends, EOT, "scalegpt/1337/0")
    starts = [0, 1, 30_000, 59_999, 60_000, 60_001 * 5]
    assert [text.first_token(start) for start in starts] == [2288, 2289, 27351, 52771, 8471, 2707]


def test_documents_are_shuffled_as_well_as_chance_would(monkeypatch):
    """Of one bucket, and of several, whose borders move: neighbours are uncorrelated, and in some
    epochs documents meet that no border of fixed buckets would let meet."""
    monkeypatch.setattr(module, "BUCKET", 1024)
    for n in (1024, 10_240):
        tokens, ends = written([1] * n, mark=False)
        text = DocumentText(tokens, ends, None, "k")
        whole = np.array([text.window(epoch * n, n) for epoch in range(3)]) - 1
        for order in whole:
            assert sorted(order.tolist()) == list(range(n))
            moved = order - np.arange(n)
            assert np.abs(moved).max() < 1024 and np.abs(moved).mean() > 1024 / 4
            steps = order[1:] - order[:-1]
            assert np.mean(np.abs(steps) < 8) < 0.05
        assert (whole[0] == whole[1]).mean() < 0.01
    assert len({text._shift(epoch) for epoch in range(9)}) == 9


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_are_a_function_of_seed_and_step_on_any_hosts(hosts, monkeypatch):
    monkeypatch.setattr(module, "BUCKET", 16)
    files = [written(np.random.default_rng(i).integers(1, 30, 60)) for i in range(2)]
    orders = [TrainOrder(len(tokens), 16, 5, stream=i) for i, (tokens, _) in enumerate(files)]

    def batches(rows, micro):
        texts = [DocumentText(*file, EOT, f"scalegpt/5/{i}") for i, file in enumerate(files)]
        size = BatchConfig(sequences=8)
        return TrainBatches(texts, [0.5, 0.5], 16, 5, size, micro, rows)

    whole = batches(np.arange(8), 8)
    for step in (0, 7, 19):
        parts = [batches(np.arange(h, 8, hosts), 8)[step] for h in range(hosts)]
        together = np.empty((1, 8, 17), np.int32)
        for h, part in enumerate(parts):
            together[:, h::hosts] = part
        assert np.array_equal(together, whole[step])
        assert np.array_equal(batches(np.arange(4), 4)[step].reshape(1, 8, 17), whole[step])
        dataset, starts = whole.windows(step)
        for row, (d, start) in enumerate(zip(dataset.tolist(), starts.tolist(), strict=True)):
            epoch, position = divmod(start, len(files[d][0]))
            text = sum(epoch_of(*files[d], True, f"scalegpt/5/{d}", epoch, 16), [])
            assert whole[step][0, row].tolist() == text[position : position + 17]
            number = (8 * step + row) // 2
            assert (epoch, position) == (
                number // orders[d].n_windows,
                orders[d].window(np.array([number]))[0],
            )


def test_an_index_that_is_out_of_order_is_told():
    tokens, ends = written([5] * 20)
    ends[[3, 9]] = ends[[9, 3]]  # of a file above 256 MB, whose hash is not checked at the start
    with pytest.raises(ValueError, match="index of documents .* is damaged"):
        DocumentText(tokens, ends, EOT, "k").window(0, 50)


class Index:
    """The index of 10^9 documents of 500 to 1,500 tokens, which takes no memory."""

    def __len__(self):
        return 10**9

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self[np.arange(i.start, i.stop)]
        i = np.asarray(i, np.int64) + 1
        return (1000 * i + (i * 2654435761) % 500).astype(np.uint64)


class Tokens:
    """As many tokens, each of which is its place modulo 2^16."""

    dtype = np.dtype("<u2")

    def __len__(self):
        return int(Index()[10**9 - 1])

    def __getitem__(self, i):
        if isinstance(i, slice):
            return np.arange(i.start, i.stop).astype(np.uint16)
        return np.uint16(i % 65536)


def test_a_thousand_million_documents_take_no_memory_and_no_start():
    tracemalloc.start()
    began = time.perf_counter()
    text = DocumentText(Tokens(), Index(), None, "k")
    order = TrainOrder(len(text), 1024, 0)
    started = time.perf_counter() - began
    starts = order.window(10**8 * np.arange(300)).tolist()
    for i, start in enumerate(starts):
        window = text.window(start + i * len(text), 1025)
        parts = text.parts(start + i * len(text), 1025)
        assert len(window) == parts.lengths.sum() == 1025 and len(parts.places) <= 4
        middle = int(parts.places[0])
        assert abs(middle - start) < module.BUCKET * 1500
        assert window[0] == middle % 65536
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert started < 1 and peak < 32 << 20
