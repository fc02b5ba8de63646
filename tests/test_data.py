"""Token files and the order of the data, against second implementations in plain Python."""

import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry
from grain.experimental import index_shuffle

from scalegpt.config import BatchConfig, Config, presets
from scalegpt.data import batches as data
from scalegpt.data import token_files, tokenizer
from scalegpt.data.batches import EvalBatches, TrainBatches, TrainOrder, train_iterator
from scalegpt.data.datasets import open_datasets
from scalegpt.data.token_files import check_tokens, open_dataset
from scalegpt.files import staging

# ---------------------------------------------------------------- the order of training windows


def slow_start(length, T, seed, row, stream=0):
    """TrainOrder.window for one row, in Python integers and without a table. The permutation is
    Grain's, which has no second implementation here."""
    n = max(1, (length - T) // T)
    epoch, index = divmod(row, n)
    name = f"scalegpt/{seed}/{stream}/{epoch}".encode()
    digest = hashlib.blake2b(name, digest_size=12).digest()
    phase, key = struct.unpack("<QI", digest)
    if n <= 4096:
        ranks = sorted(
            range(n),
            key=functools.cache(lambda i: index_shuffle(i, max_index=65535, seed=key, rounds=12)),
        )
        index = ranks[index]
    else:
        index = index_shuffle(index, max_index=n - 1, seed=key, rounds=12)
    return phase % min(T, length - n * T) + index * T


@pytest.mark.parametrize(
    "length", [9, 17, 100, 1003, 4097 * 8, 4098 * 8, 65_536 * 8 + 9, 9_035_582_198]
)
def test_order_equals_plain_python(length):
    order, T = TrainOrder(length, 8, seed=7, stream=2), 8
    n = order.n_windows
    rows = [0, 1, 2, n - 1, n, n + 1, 5 * n // 2, 10**6 * n + n // 3]
    expected = [slow_start(length, T, 7, row, stream=2) for row in rows]
    assert order.window(np.array(rows)).tolist() == expected


def test_order_never_changes():
    """A run continued with a newer version must see the batches it would have seen.

    These values pin grain.experimental.index_shuffle too: if a new Grain permutes otherwise, runs
    change with it, and that release has to be refused in pyproject.toml.
    """
    shakespeare = TrainOrder(1_003_854, 256, seed=1337)
    rows = np.array([0, 1, 2, 3919, 3920, 3921, 100_000])
    expected = [395193, 264377, 557753, 111545, 104497, 457521, 503786]
    assert shakespeare.window(rows).tolist() == expected
    openwebtext = TrainOrder(9_035_582_198, 1024, seed=0)
    rows = np.array([0, 1, 8_823_808, 8_823_809, 480 * 600_000])
    expected = [9034788451, 7831026275, 6346397283, 5251084620, 4726655251]
    assert openwebtext.window(rows).tolist() == expected
    in_spans = TrainOrder(9_035_582_198, 1024, seed=0, span=1e9)
    expected = [8565289571, 5837517411, 9009380963, 2603194700, 1493105939]
    assert in_spans.window(rows).tolist() == expected
    batch = TrainBatches(
        [ids(5000), ids(900)], [0.7, 0.3], 16, 5, BatchConfig(sequences=8), 4, np.arange(4)
    )[1000]
    assert batch[:, :, 0].tolist() == [[2671, 4735, 1327, 26], [2127, 1807, 74, 4335]]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 311, 4096, 4097, 20_000])
def test_every_window_once_an_epoch_and_epochs_differ(n):
    length = 32 * n + 32 + 17
    order = TrainOrder(length, 32, seed=3)
    assert order.n_windows == n
    epochs = order.window(np.arange(3 * n)).reshape(3, n)
    for starts in epochs:
        assert np.array_equal(np.sort(starts), starts.min() + 32 * np.arange(n))
        assert 0 <= starts.min() and starts.max() + 33 <= length
    assert len(set(epochs.min(1).tolist())) > 1  # phases
    other = TrainOrder(length, 32, seed=4).window(np.arange(n))
    if n > 300:
        for a, b in (
            (epochs[0], epochs[1]),
            (epochs[0], epochs[2]),
            (epochs[1], epochs[2]),
            (epochs[0], other),
        ):
            assert (a // 32 == b // 32).mean() < 0.02


@pytest.mark.parametrize("n", [97, 100, 1000, 20_000])
def test_a_span_has_its_pieces_and_an_epoch_every_window_once(n):
    T, piece = 32, 3
    order = TrainOrder(T * n + T + 17, T, seed=3, stream=1, span=piece * T * data.PIECES - 5)
    width = piece * data.PIECES
    assert order.spans == -(-n // width)
    epochs = order.window(np.arange(2 * n)).reshape(2, n)
    seen = []
    for epoch, starts in enumerate(epochs):
        assert np.array_equal(np.sort(starts), starts.min() + T * np.arange(n))
        for k in range(order.spans):
            rows = range(k * width, min(n, (k + 1) * width))
            number = epoch * order.spans + k
            assert {order.span(epoch * n + row) for row in rows} == {number}
            stretches = order.stretches(number)
            expected = [s for a, b in stretches for s in range(a, b - 1, T)]
            assert sorted(expected) == np.sort(starts[rows]).tolist()
            if k < order.spans - 1:
                assert [b - a for a, b in stretches] == [piece * T + 1] * data.PIECES
            seen.append(stretches)
    if n > 1000:  # pieces lie far from each other, and others share a span in the next epoch
        firsts = [np.array([a for a, _ in stretches]) // T for stretches in seen[:50]]
        assert np.mean([np.abs(np.diff(first)).mean() for first in firsts]) > n / 4
        assert not {frozenset(s) for s in seen[: order.spans]} & {*map(frozenset, seen[-50:])}


def test_a_span_as_long_as_the_file_changes_nothing():
    rows = np.arange(500)
    plain = TrainOrder(3217, 32, seed=3).window(rows)
    assert np.array_equal(TrainOrder(3217, 32, seed=3, span=3217).window(rows), plain)
    assert not np.array_equal(TrainOrder(3217, 32, seed=3, span=1000).window(rows), plain)


def test_access_is_random_and_a_small_epoch_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        data, "index_shuffle", lambda i, **k: calls.append(i) or index_shuffle(i, **k)
    )
    large, n = TrainOrder(8_800_001, 1, seed=0), 8_800_000
    rows = 10**6 * n + n // 2 + np.arange(64)
    large.window(rows)
    assert calls == (rows % n).tolist()  # no more than asked for, however far on
    calls.clear()
    data._table.cache_clear()
    small = TrainOrder(3001, 1, seed=0)
    for row in (0, 2999, 7, 3000, 1500, 4000):
        small.window(np.array([row]))
    assert calls == [*range(3000), *range(3000)]  # two epochs


@pytest.mark.parametrize("T", [1, 2, 7])
def test_windows_stay_in_the_file_at_every_small_size(T, monkeypatch):
    monkeypatch.setattr(data, "_table", lambda n, seed: np.arange(n))  # for speed
    for length in range(T + 1, 6 * T + 3):
        order = TrainOrder(length, T, seed=0)
        starts = order.window(np.arange(200 * order.n_windows))
        assert starts.min() == 0 and starts.max() + T + 1 <= length
        assert len(set((starts % T).tolist())) == order.phases  # every phase is used
        covered = {p for s in set(starts.tolist()) for p in range(s, s + T + 1)}
        assert len(covered) >= min(length, 2 * T)
    with pytest.raises(ValueError, match="cannot hold a window"):
        TrainOrder(T, T, seed=0)


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("n", [4000, 30_000, 65_536, 97_655, 1_000_000, 8_800_000])
def test_order_is_as_good_as_random(n, seed):
    """Neighbours are uncorrelated and a batch spreads over the file as chance would have it;
    with 4 rounds index_shuffle is 24 to 95 sigma off at most of these sizes,
    with 8 up to 9 at about 1.0M windows."""
    order = TrainOrder(n + 1, 1, seed)
    assert order.n_windows == n
    p = order.window(np.arange(1 << 15)) / n
    bound = 5 / math.sqrt(len(p))
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256):
        assert abs(np.corrcoef(p[:-lag], p[lag:])[0, 1]) < bound, lag
    assert abs(p.mean() - 0.5) * math.sqrt(12 * len(p)) < 5
    spread = p.reshape(-1, 64).mean(1).var() * 12 * 64  # 1 +- sqrt(2 / 512)
    assert 0.7 < spread < 1.3


@pytest.mark.parametrize("n, epochs, least, most", [(3, 60, 1, 25), (20_000, 3000, 400, 600)])
def test_the_first_three_windows_come_in_all_orders_equally(n, epochs, least, most):
    rows = np.arange(epochs)[:, None] * n + np.arange(3)
    starts = TrainOrder(n + 1, 1, seed=0).window(rows.reshape(-1)).reshape(-1, 3)
    counts = Counter(map(tuple, np.argsort(starts, axis=1).tolist()))
    assert len(counts) == 6 and all(least <= c <= most for c in counts.values())


# -------------------------------------------------------------------------- batches through Grain


def ids(n, base=0):
    """Tokens that say where they are."""
    return np.arange(base, base + n).astype("<u4")


def batches(B=8, A=2, rows=None, T=16, seed=5, tokens=None, weights=None):
    tokens = [ids(5000)] if tokens is None else tokens
    weights = [1.0] if weights is None else weights
    rows = np.arange(B // A) if rows is None else rows
    return TrainBatches(tokens, weights, T, seed, BatchConfig(sequences=B), B // A, rows)


def test_batches_hold_the_windows_of_the_order():
    source = batches()
    assert len(source) > 10**9
    for step in (0, 1, 77, 10**7):
        batch = source[step]
        assert batch.shape == (2, 4, 17) and batch.dtype == np.int32
        for a in range(2):
            for m in range(4):
                start = slow_start(5000, 16, 5, step * 8 + a * 4 + m)
                assert batch[a, m].tolist() == list(range(start, start + 17))
    with pytest.raises(IndexError):
        source[-1]


def test_uint16_ids_above_the_sign_bit_survive():
    tokens = np.full(100, 65_535, "<u2")
    assert (batches(tokens=[tokens])[0] == 65_535).all()


@pytest.mark.parametrize("start", [0, 1, 6, 10**9])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_starting_at_a_step_is_iterating_to_it(start, prefetch):
    source = batches()
    iterator = train_iterator(source, start, prefetch)
    for step in range(start, start + 5):
        assert np.array_equal(next(iterator), source[step])
    iterator.close()
    if start == 6:
        from_zero = train_iterator(source, 0)
        taken = [next(from_zero) for _ in range(7)]
        assert np.array_equal(taken[6], next(train_iterator(source, 6)))
        taken[0][:] = -5  # what was handed out is the consumer's: nothing is shared
        assert np.array_equal(next(from_zero), source[7])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("weights", [None, [0.6, 0.4]])
def test_hosts_together_have_the_one_host_batch(hosts, weights):
    tokens = [ids(5000)] if weights is None else [ids(5000), ids(3000, 10_000)]
    whole = batches(B=16, A=2, tokens=tokens, weights=weights)
    for split in (np.split(np.arange(8), hosts), [np.arange(h, 8, hosts) for h in range(hosts)]):
        for step in (0, 9, 1234):
            together = np.empty((2, 8, 17), np.int32)
            for rows in split:
                part = batches(B=16, A=2, rows=rows, tokens=tokens, weights=weights)
                together[:, rows] = part[step]
            assert np.array_equal(together, whole[step])


def test_a_host_reads_only_its_rows(monkeypatch):
    seen, window = [], TrainOrder.window
    monkeypatch.setattr(TrainOrder, "window", lambda o, rows: seen.extend(rows) or window(o, rows))
    batches(B=16, A=2, rows=np.array([6, 7]))[3]
    assert seen == [48 + 6, 48 + 7, 48 + 14, 48 + 15]


def test_accumulation_does_not_change_the_rows_of_a_step():
    flat = [batches(B=8, A=A)[5].reshape(8, 17) for A in (1, 2, 4, 8)]
    for other in flat[1:]:
        assert np.array_equal(flat[0], other)


def test_an_error_while_reading_reaches_the_consumer():
    class Broken(TrainBatches):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("the disk went away")
            return super().__getitem__(step)

    iterator = train_iterator(
        Broken([ids(5000)], [1.0], 16, 5, BatchConfig(sequences=8), 4, np.arange(4)), 0
    )
    for _ in range(3):
        next(iterator)
    with pytest.raises(OSError, match="the disk went away"):
        next(iterator)


# --------------------------------------------------------------------------------------- mixtures


def slow_mixture(row, parts):
    """The dataset and the row within it, by counting with exact fractions."""
    left, this, after = sum(parts), row, row + 1
    for d, part in enumerate(parts):
        keep = [k - math.floor(Fraction(k * (left - part), left)) for k in (this, after)]
        if keep[0] != keep[1]:
            return d, keep[0]
        this, after, left = this - keep[0], after - keep[1], left - part


@pytest.mark.parametrize("parts", [[7, 3], [5, 3, 2], [1, 1], [1, 999], [3, 1, 1, 8]])
def test_mixture_has_exact_fractions_and_skips_nothing(parts):
    total = sum(parts)
    dataset, within = data.mixture_index(np.arange(20 * total), parts)
    for d, part in enumerate(parts):
        assert (dataset.reshape(20, total) == d).sum(1).tolist() == [part] * 20
        assert np.array_equal(within[dataset == d], np.arange(20 * part))
        drift = np.cumsum(dataset == d) - np.arange(1, 20 * total + 1) * part / total
        assert np.abs(drift).max() < len(parts)
    far = 10**17 + np.arange(50)
    dataset, within = data.mixture_index(far, parts)
    pairs = list(zip(dataset.tolist(), within.tolist(), strict=True))
    assert pairs == [slow_mixture(row, parts) for row in far.tolist()]


@pytest.mark.parametrize(
    "weights, parts",
    [
        ([0.7, 0.3], [7, 3]),
        ([7, 3], [7, 3]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([1 / 7, 6 / 7], [1, 6]),
        ([2.0], [1]),
        ([1e-8, 1.0], [1, 99_999_999]),
    ],
)
def test_weights_become_whole_parts(weights, parts):
    assert data._whole_parts(weights) == parts


def test_weights_of_many_digits_are_kept_to_nine():
    weights = [9_035_582_198, 4_434_897, 12_345]
    parts = data._whole_parts(weights)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part / sum(parts) - weight / sum(weights)) < 2e-9


def test_each_dataset_of_a_mixture_is_without_replacement():
    sizes = [16 * 121 + 16, 16 * 31 + 16, 16 * 51]
    bases = [0, 100_000, 200_000]
    tokens = [ids(n, base) for n, base in zip(sizes, bases, strict=True)]
    source = batches(B=10, A=1, tokens=tokens, weights=[0.5, 0.3, 0.2])
    first = np.concatenate([source[step][0, :, 0] for step in range(100)])
    last = np.concatenate([source[step][0, :, -1] for step in range(100)])
    assert np.array_equal(first + 16, last)
    owner = first // 100_000
    assert [(owner == d).sum() for d in range(3)] == [500, 300, 200]
    for d in range(3):
        starts = first[owner == d] - bases[d]
        expected = [slow_start(sizes[d], 16, 5, row, stream=d) for row in range(len(starts))]
        assert starts.tolist() == expected
        n = (sizes[d] - 16) // 16
        assert len(set(starts[:n].tolist())) == n


def test_weights_by_size_end_all_epochs_together():
    tokens = [ids(16 * 61, 0), ids(16 * 21, 100_000)]  # 60 and 20 windows
    source = batches(B=80, A=1, tokens=tokens, weights=[60.0, 20.0])
    owner = source[0][0, :, 0] // 100_000
    assert (owner == 0).sum() == 60 and (owner == 1).sum() == 20
    assert len(np.unique(source[0][0, :, 0])) == 80


def test_bad_weights_are_refused():
    tokens = [ids(100), ids(100)]
    for weights, message in (
        ([1.0], "1 weights for 2 datasets"),
        ([1.0, 0.0], "data weight 0.0 must be above 0"),
        ([1.0, -2.0], "data weight -2.0"),
        ([1.0, math.nan], "data weight nan"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(tokens=tokens, weights=weights)


# ------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="session")
def shakespeare(shared_data):
    """Characters of tinyshakespeare as nanoGPT numbers them: train, val, chars."""
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    chars = "".join(sorted(set(text)))
    codes = np.searchsorted([ord(c) for c in chars], np.frombuffer(text.encode(), np.uint8))
    codes = codes.astype("<u2")
    return codes[:1_003_854], codes[1_003_854:], chars


@pytest.mark.parametrize("T, R", [(256, 16), (255, 7), (1024, 1), (111_539, 2), (200_000, 2)])
def test_trap_7_evaluation_predicts_every_token_once(shakespeare, T, R):
    val = shakespeare[1]
    assert len(val) == 111_540
    source = EvalBatches(val, T, R, np.arange(R), None)
    assert source.tokens == 111_539 and source.windows == math.ceil(111_539 / T)
    assert len(source) == math.ceil(source.windows / R)
    inputs, targets = [], []
    for batch in source:
        assert batch.shape == (R, T + 1) and batch.dtype == np.int32
        unmasked = batch[:, 1:] >= 0
        assert (batch[:, :-1][unmasked] >= 0).all()
        inputs.append(batch[:, :-1][unmasked])
        targets.append(batch[:, 1:][unmasked])
    assert np.array_equal(np.concatenate(targets), val[1:])
    assert np.array_equal(np.concatenate(inputs), val[:-1])


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 18])
def test_eval_at_every_ragged_length(length):
    source = EvalBatches(ids(length), 8, 3, np.arange(3))
    targets = np.concatenate([batch[:, 1:][batch[:, 1:] >= 0] for batch in source])
    assert targets.tolist() == list(range(1, length)) and source.tokens == length - 1


def test_eval_of_the_first_windows_is_split_over_hosts():
    whole = EvalBatches(ids(1000), 8, 4, np.arange(4), 10)
    assert (whole.windows, whole.tokens, len(whole)) == (10, 80, 3)
    assert (whole[2][2:] == -1).all() and (whole[2][:2] >= 0).all()
    for rows in (np.array([0, 1]), np.array([3])):
        part = EvalBatches(ids(1000), 8, 4, rows, 10)
        assert part.tokens == 80
        for i in range(3):
            assert np.array_equal(part[i], whole[i][rows])
    assert EvalBatches(ids(20), 8, 4, np.arange(4), 10).tokens == 19
    with pytest.raises(ValueError, match="eval.windows=0"):
        EvalBatches(ids(20), 8, 4, np.arange(4), 0)
    with pytest.raises(ValueError, match="nothing to predict"):
        EvalBatches(ids(1), 8, 4, np.arange(4))


def test_a_batch_that_grows_takes_the_same_rows_in_the_same_order():
    """As a list: the rows of all updates, one after the other, are those of any fixed batch."""
    size = BatchConfig(sequences=4, growth={3: 8, 4: 12})
    assert [size.sequences_at(step) for step in (1, 2, 3, 4, 5)] == [4, 4, 8, 12, 12]
    assert [size.rows_after(step) for step in range(6)] == [0, 4, 8, 16, 28, 40]
    make = lambda size, micro: TrainBatches(  # noqa: E731
        [ids(5000), ids(900)], [0.7, 0.3], 16, 5, size, micro, np.arange(micro)
    )
    grown, fixed = make(size, 4), make(BatchConfig(sequences=4), 4)
    assert [grown[step].shape[0] for step in range(5)] == [1, 1, 2, 3, 3]
    rows = np.concatenate([grown[step].reshape(-1, 17) for step in range(5)])
    assert rows.tolist() == np.concatenate([fixed[i][0] for i in range(10)]).tolist()


def test_eval_windows_spread_over_the_whole_file():
    source = EvalBatches(ids(1000), 8, 4, np.arange(4), 10, spread=True)
    starts = np.concatenate([batch[:, 0] for batch in source])[:10]
    assert starts.tolist() == [99 * i for i in range(10)] and source.tokens == 80
    everything = EvalBatches(ids(1000), 8, 4, np.arange(4), 500, spread=True)
    assert [b.tolist() for b in everything] == [
        b.tolist() for b in EvalBatches(ids(1000), 8, 4, np.arange(4))
    ]


def test_evaluation_does_not_change_the_training_data():
    """Fault 12 of nanogpt-jax: how often one evaluated changed what one trained on."""
    source, val = batches(), EvalBatches(ids(1000), 16, 4, np.arange(4))
    plain, mixed = train_iterator(source, 0), train_iterator(source, 0)
    before = [batch.copy() for batch in val]
    for step in range(8):
        if step % 3 == 0:
            assert all(np.array_equal(a, b) for a, b in zip(val, before, strict=True))
        assert np.array_equal(next(plain), next(mixed))


# ------------------------------------------------------------------------- opening a local folder


def write(folder, train=None, val=None, dtype="uint16", vocab_size=300, meta=True, **changes):
    """A dataset folder with its meta.json; `changes` overwrite its keys (train__tokens)."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": 1, "tokenizer": {"kind": "byte"}, "vocab_size": vocab_size, "dtype": dtype}
    for split, tokens in (("train", train), ("val", val)):
        tokens = np.arange(200) % 250 if tokens is None else np.asarray(tokens)
        raw = tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        facts[split] = {
            "tokens": len(tokens),
            "bytes": 3 * len(tokens),
            "documents": 1,
            "max_id": int(tokens.max()),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    for key, value in changes.items():
        *path, last = key.split("__")
        part = facts[path[0]] if path else facts
        if value is None:
            del part[last]
        else:
            part[last] = value
    if meta:
        (folder / "meta.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_open_folder(tmp_path, dtype):
    top = 60_000 if dtype == "uint16" else 120_000
    train = np.arange(500) * 7 % top
    folder = write(tmp_path / "mine", train=train, dtype=dtype, vocab_size=top, train__max_id=499)
    dataset = open_dataset(str(folder))
    assert isinstance(dataset.train, np.memmap) and not dataset.train.flags.writeable
    assert dataset.train.tolist() == train.tolist()
    assert dataset.val.tolist() == (np.arange(200) % 250).tolist()
    assert (dataset.name, dataset.vocab_size) == ("mine", top)
    assert dataset.tokenizer == {"kind": "byte"} and dataset.val_bytes_per_token == 3.0
    check_tokens(dataset, 199)
    with pytest.raises(ValueError, match="mine: val has 200 tokens; model.block_size=200"):
        check_tokens(dataset, 200)
    short = SimpleNamespace(name="a", train=train, val=train[:1])
    with pytest.raises(ValueError, match="a: val has 1 token; model.block_size=5"):
        check_tokens(short, 5)


def test_fingerprint_follows_the_tokens(tmp_path):
    def fingerprint(name, **kw):
        return open_dataset(write(tmp_path / name, **kw)).fingerprint

    same = [fingerprint("a"), fingerprint("b")]
    assert same[0] == same[1] and len(same[0]) == 16
    others = [
        fingerprint("c", train=(np.arange(200) + 1) % 250),
        fingerprint("d", val=np.arange(201) % 250),
        fingerprint("e", vocab_size=301),
        fingerprint("f", dtype="uint32"),
    ]
    long = np.zeros(200_000, int)
    others.append(fingerprint("i", train=long))
    long[100_000] = 1  # only the recorded sha256 knows
    others.append(fingerprint("j", train=long))
    bare = [
        fingerprint("g", meta=False),
        fingerprint("h", meta=False, train=(np.arange(200) + 1) % 250),
    ]
    assert len(set(others + bare + same)) == 9


def test_a_file_that_meta_json_does_not_describe_is_refused(tmp_path):
    folder = write(tmp_path / "o")
    (folder / "train.bin").write_bytes(np.arange(1, 201).astype("<u2").tobytes())
    with pytest.raises(ValueError, match="train.bin is not the file that meta.json .* describes"):
        open_dataset(folder)


def test_bins_alone_are_gpt2_in_uint16(tmp_path):
    dataset = open_dataset(write(tmp_path / "o", train=[50_256, 1, 2] * 9, meta=False))
    assert (dataset.tokenizer, dataset.vocab_size) == ("gpt2", 50_257)
    assert dataset.val_bytes_per_token is None and dataset.train.dtype == np.uint16


def test_an_interrupted_prepare_is_not_taken_for_gpt2(tmp_path):
    folder = write(tmp_path / "o", meta=False)
    (folder / "meta.json.partial").write_text("{}")
    with pytest.raises(ValueError, match="preparing it was interrupted"):
        open_dataset(folder)


def test_bins_alone_in_uint32_are_noticed(tmp_path):
    """Read as uint16 they pass the id check, and every second token is 0."""
    folder = write(tmp_path / "u", dtype="uint32", meta=False)
    with pytest.raises(ValueError, match="every second value is 0.*uint32"):
        open_dataset(folder)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    for wide in ("uint32", "int64"):  # nanoGPT's table states no dtype either
        for split in ("train", "val"):
            np.arange(200, dtype=wide).tofile(folder / f"{split}.bin")
        with pytest.raises(
            ValueError, match=f"0, which looks like {wide} read as uint16; .*'{wide}'"
        ):
            open_dataset(folder)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 70_000}))
    with pytest.raises(ValueError, match="0, which looks like int64 read as uint32"):
        open_dataset(folder)
    for split in ("train", "val"):
        (np.arange(200) + 69_000).astype("<u4").tofile(folder / f"{split}.bin")
    assert open_dataset(folder).train.tolist() == list(range(69_000, 69_200))
    open_dataset(write(tmp_path / "ok", train=np.arange(200) % 2, val=np.arange(200) % 3))


def test_trap_9_nanogpts_folder_is_read_as_it_is(tmp_path, shakespeare):
    train, val, chars = shakespeare
    folder = write(tmp_path / "shakespeare_char", train=train, val=val, meta=False)
    itos, stoi = dict(enumerate(chars)), {c: i for i, c in enumerate(chars)}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65, "itos": itos, "stoi": stoi}))
    dataset = open_dataset(folder)
    assert dataset.vocab_size == 65 and dataset.val_bytes_per_token == 1.0  # all of it is ASCII
    assert dataset.tokenizer == {"kind": "char", "chars": chars}
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    text = "".join(dataset.tokenizer["chars"][i] for i in dataset.train[:14])
    assert text == "First Citizen:"


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_runs_a_command_is_refused(tmp_path):
    folder, mark = write(tmp_path / "evil", meta=False), tmp_path / "executed"
    bomb = pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "stoi": Evil(mark)})
    pickle.loads(bomb)  # it does run where nothing refuses it
    assert mark.exists()
    mark.unlink()
    (folder / "meta.pkl").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"meta.pkl is not .*it asks for \w+\.system"):
        open_dataset(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x05garbage",
        pickle.dumps({"itos": {0: "a"}}),
        pickle.dumps({"vocab_size": "2"}),
        pickle.dumps({"vocab_size": 0}),
        pickle.dumps({"vocab_size": 1 << 40}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "a"}}),
        pickle.dumps([1, 2]),
        pickle.dumps({"vocab_size": 2, "itos": np.arange(2)}),
    ],
)
def test_a_damaged_meta_pkl_is_refused(tmp_path, content):
    folder = write(tmp_path / "bad", meta=False)
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="meta.pkl is not nanoGPT's table"):
        open_dataset(folder)


def test_ids_that_stand_for_no_known_text_are_data_and_written_as_numbers(tmp_path):
    folder = write(tmp_path / "ids", train=np.arange(200) % 3, val=np.arange(99) % 3, meta=False)
    specs = []
    for itos in (None, ["the", " cat", "s"], ["the", " dog", "s"], ["a", "?", "?"]):
        more = {} if itos is None else {"itos": itos}
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, **more}))
        dataset = open_dataset(folder)
        assert dataset.vocab_size == 3 and len(dataset.train) == 200
        specs.append(dataset.tokenizer)
        codec = tokenizer.load(json.loads(json.dumps(dataset.tokenizer)))
        assert codec.encode(" 2 0\n1").tolist() == [2, 0, 1] and codec.decode([2, 0, 1]) == "2 0 1"
        for text, problem in (("the cat", "stand for no text"), ("3", "outside 0..2")):
            with pytest.raises(ValueError, match=problem):
                codec.encode(text)
    assert [[tokenizer.same(a, b) for b in specs] for a in specs] == np.eye(4).tolist()


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere.*prepare.py"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare has no train.bin; .*data/text/prepare.py"):
        open_dataset(tmp_path / "bare")
    folder = tmp_path / "shakespeare"  # which scalegpt can prepare
    folder.mkdir()
    script = Path(__file__).parents[1] / "data" / "shakespeare" / "prepare.py"
    fix = re.escape(f"make one: python {script} --out {folder}")
    with pytest.raises(ValueError, match=f"no train.bin; .*{fix}"):
        open_dataset(folder)


def test_a_script_of_nanogpt_in_our_data_folder_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "_folder", lambda name: tmp_path / name)
    scripts = {"ours": "import os\nfrom scalegpt.errors import Mistake\n", "theirs": "import os\n"}
    for name, text in scripts.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "prepare.py").write_text(text)
    assert presets.recipe("ours") == tmp_path / "data" / "ours" / "prepare.py"
    assert presets.recipe("theirs") is None and presets.recipe("nobodys") is None


def prepared(folder: Path, **data) -> list:
    data = {"path": str(folder), **data}
    return open_datasets(Config(data=data, run={"out_dir": "x"}, model={"block_size": 8}))


def test_data_sets_mix_if_their_ids_mean_the_same_however_it_is_written(tmp_path):
    write(tmp_path / "bare", meta=False)
    for kind, refused in (("gpt2", False), ("byte", True)):
        folder = write(tmp_path / kind)
        meta = json.loads((folder / "meta.json").read_text()) | {"tokenizer": {"kind": kind}}
        (folder / "meta.json").write_text(json.dumps(meta))
        mixture = {str(tmp_path / "bare"): 0.5, str(folder): 0.5}
        if refused:
            with pytest.raises(ValueError, match="byte and bare have different tokenizers"):
                prepared(tmp_path, path=mixture)
        else:
            assert len(prepared(tmp_path, path=mixture)) == 2


def test_a_data_set_of_scalegpts_own_is_prepared_in_any_folder_of_its_name(tmp_path, capfd):
    folder = tmp_path / "there" / "python_stdlib"
    with pytest.raises(ValueError, match="there is no folder"):
        prepared(folder)
    (dataset,) = prepared(folder, prepare=True)
    assert dataset.vocab_size == 256 and "train: " in capfd.readouterr().out
    (folder / "meta.json").rename(folder / "meta.json.partial")  # killed before its last step
    prepared(folder, prepare=True)
    assert "train: " in capfd.readouterr().out
    prepared(folder, prepare=True)
    assert not capfd.readouterr().out


def test_data_that_are_there_are_never_prepared_again_and_a_script_among_them_never_runs(tmp_path):
    """nanoGPT's folders have both, under names that scalegpt has as well."""
    folder = write(tmp_path / "shakespeare", meta=False)
    (folder / "prepare.py").write_text("raise SystemExit('this must not run')")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    prepared(folder, prepare=True)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "train.bin").unlink()
    folder = folder.rename(tmp_path / "another_name")
    with pytest.raises(ValueError, match="has no train.bin"):
        prepared(folder, prepare=True)
    (write(tmp_path / "half") / "val.bin").unlink()
    with pytest.raises(ValueError, match="half has no val.bin"):
        open_dataset(tmp_path / "half")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype_": "int16"}, "dtype 'int16' is not one of uint16, uint32"),
        ({"vocab_size": None}, "lacks vocab_size; run prepare.py"),
        ({"tokenizer": None, "dtype": None}, "lacks tokenizer, dtype"),
        ({"train__tokens": None}, "lacks train.tokens"),
        ({"val": 5}, "lacks val.tokens"),
        ({"format": 2}, "format 2 is unknown"),
        ({"vocab_size_": "65"}, "vocab_size is '65', not a count"),
        ({"val__tokens": -1}, "val.tokens is -1"),
        ({"train__tokens": 201}, r"400 bytes but .* 201 tokens .* 402 bytes: it is truncated"),
        ({"train__tokens": 100}, "400 bytes but .* 200 bytes: it is longer than it should be"),
    ],
)
def test_a_wrong_meta_json_is_refused(tmp_path, changes, message):
    folder = write(tmp_path / "bad")
    facts = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        *path, last = key.rstrip("_").split("__")
        part = facts[path[0]] if path else facts
        part.pop(last)
        if value is not None:
            part[last] = value
    (folder / "meta.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_meta_json_that_is_no_object_is_refused(tmp_path, text, message):
    folder = write(tmp_path / "bad")
    (folder / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


def test_empty_and_odd_sizes(tmp_path):
    folder = write(tmp_path / "e")
    (folder / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="val.bin is empty"):
        open_dataset(folder)
    folder = write(tmp_path / "o", meta=False)
    (folder / "train.bin").write_bytes(b"1234567")
    with pytest.raises(ValueError, match=r"7 bytes, not a multiple of 2 \(uint16\)"):
        open_dataset(folder)
    folder = write(tmp_path / "q", dtype="uint32")
    (folder / "train.bin").write_bytes(b"123456")
    with pytest.raises(ValueError, match=r"6 bytes, not a multiple of 4 \(uint32\)"):
        open_dataset(folder)


@pytest.mark.parametrize("at", [0, 9, 10, 25, 99])
@pytest.mark.parametrize("max_id", [None, 300])
def test_ids_outside_the_vocabulary_are_found(tmp_path, monkeypatch, at, max_id):
    monkeypatch.setattr(token_files, "CHUNK", 10)
    tokens = np.arange(100) * 2
    tokens[at:] = np.where(np.arange(at, 100) % 3 == at % 3, 300, 5)
    folder = write(tmp_path / "x", train=tokens, train__max_id=max_id)
    with pytest.raises(ValueError, match=f"train.bin: token {at} is 300, .* vocabulary of 300"):
        open_dataset(folder)
    open_dataset(write(tmp_path / "y", train=tokens, train__max_id=max_id, vocab_size=301))


def test_a_recorded_max_id_saves_the_scan(tmp_path, monkeypatch):
    scanned = []
    monkeypatch.setattr(token_files, "_check_ids", lambda file, *_: scanned.append(file.name))
    open_dataset(write(tmp_path / "a", train__max_id=None))
    open_dataset(write(tmp_path / "b"))
    open_dataset(write(tmp_path / "c", meta=False))
    assert scanned == ["train.bin", "train.bin", "val.bin"]


def test_a_long_scan_shows_its_progress(tmp_path, monkeypatch, capfd):
    folder = write(tmp_path / "x", train__max_id=None)
    open_dataset(folder)
    assert "checking" not in capfd.readouterr().err
    monkeypatch.setattr(token_files, "SLOW", 10)
    open_dataset(folder)
    assert "checking train.bin" in capfd.readouterr().err


def test_a_wrong_dtype_is_guessed(tmp_path):
    wide = np.arange(60_000, 60_200) % 65_536
    folder = write(tmp_path / "a", train=wide, dtype="uint32", vocab_size=50_000)
    facts = json.loads((folder / "meta.json").read_text())
    facts["dtype"], facts["train"] = "uint16", {"tokens": 400}
    (folder / "meta.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="token 0 is 60000.*uint32 read as uint16"):
        open_dataset(folder)
    folder = write(tmp_path / "b", train=np.arange(200) + 1, vocab_size=50_000)
    facts = json.loads((folder / "meta.json").read_text())
    facts["dtype"], facts["train"] = "uint32", {"tokens": 100}
    (folder / "meta.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"token 0 is {2 * 65_536 + 1}.*uint16 read as uint32"):
        open_dataset(folder)


# --------------------------------------------------------------------------------- staging a URL


def publish(folder, url):
    fs, root = fsspec.core.url_to_fs(url)
    if fs.exists(root):
        fs.rm(root, recursive=True)
    fs.makedirs(root)
    for file in folder.iterdir():
        fs.pipe(f"{root}/{file.name}", file.read_bytes())
    return fs, root


@pytest.fixture(params=["memory", "file"])
def remote(request, tmp_path):
    """A published dataset: (folder it came from, its URL, its file system, its root)."""
    folder = write(tmp_path / "source")
    base = "memory://bucket" if request.param == "memory" else f"file://{tmp_path}/bucket"
    url = f"{base}/{tmp_path.name}/toy"
    return folder, url, *publish(folder, url)


def test_fault_17_a_url_is_staged_to_disk_once_not_read_into_memory(remote, tmp_path, monkeypatch):
    folder, url, fs, root = remote
    opened, open_ = [], type(fs).open
    monkeypatch.setattr(
        type(fs), "open", lambda *a, **k: opened.append(os.path.basename(a[1])) or open_(*a, **k)
    )
    cache = tmp_path / "cache"
    dataset, local = open_dataset(url, str(cache)), open_dataset(folder)
    assert np.array_equal(dataset.train, local.train) and dataset.name == "toy"
    assert str(dataset.train.filename).startswith(str(cache))
    assert dataset.fingerprint == local.fingerprint
    assert sorted(opened) == ["meta.json", "train.bin", "val.bin"]
    opened.clear()
    for spelling in (url, url + "/"):
        assert open_dataset(spelling, str(cache)).name == "toy"
    assert opened == []

    time.sleep(0.02)  # other tokens, same sizes
    publish(write(folder, train=(np.arange(200) + 1) % 250), url)
    opened.clear()
    again = open_dataset(url, str(cache))
    assert again.train[0] == 1 and "train.bin" in opened
    fs.rm(f"{root}/meta.json")
    assert open_dataset(url, str(cache)).tokenizer == "gpt2"  # the old meta.json is gone
    fs.rm(f"{root}/train.bin")
    with pytest.raises(ValueError, match="has no train.bin"):
        open_dataset(url, str(cache))


def test_a_damaged_copy_is_replaced(remote, tmp_path):
    _, url, _, _ = remote
    file = open_dataset(url, str(tmp_path / "cache")).train.filename
    with open(file, "wb") as stream:
        stream.write(b"12")
    assert len(open_dataset(url, str(tmp_path / "cache")).train) == 200


@pytest.mark.parametrize("how", ["short", "killed"])
def test_a_broken_download_leaves_no_file(remote, tmp_path, monkeypatch, how):
    _, url, fs, _ = remote
    open_ = type(fs).open

    class Failing(io.BytesIO):
        def read(self, *_):
            raise ConnectionError("reset by peer")

    def broken(self, path, *a, **k):
        if not path.endswith("train.bin"):
            return open_(self, path, *a, **k)
        return io.BytesIO(b"abcd") if how == "short" else Failing()

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "open", broken)
        with pytest.raises(ValueError) as error:
            open_dataset(url, str(cache))
    assert ("4 of 400 bytes arrived" if how == "short" else "reset") in str(error.value)
    left = {file.name for file in cache.glob("*/*") if "train" in file.name}
    assert left == set()
    assert len(open_dataset(url, str(cache)).train) == 200


def test_a_full_disk_is_told_before_the_download(remote, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="has room for 10; free some"):
        open_dataset(remote[1], str(tmp_path / "cache"))


def test_processes_of_a_machine_share_one_download(remote, tmp_path, monkeypatch):
    _, url, fs, _ = remote
    opened, open_, results = [], type(fs).open, []

    def slow_open(self, path, *a, **k):
        opened.append(os.path.basename(path))
        time.sleep(0.05)
        return open_(self, path, *a, **k)

    monkeypatch.setattr(type(fs), "open", slow_open)
    threads = [
        threading.Thread(
            target=lambda: results.append(len(open_dataset(url, str(tmp_path / "c")).train))
        )
        for _ in range(3)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == [200] * 3 and opened.count("train.bin") == 1


def test_default_cache_folder_and_progress(remote, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(staging, "CHUNK", 100)
    file = open_dataset(remote[1]).train.filename
    assert str(file).startswith(str(tmp_path / "xdg" / "scalegpt" / "toy-"))
    assert "train.bin: 100%" in capfd.readouterr().err
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = open_dataset(remote[1]).train.filename
    assert str(file).startswith(str(tmp_path / "home" / ".cache" / "scalegpt"))


def test_a_missing_protocol_package_names_the_extra(tmp_path, monkeypatch):
    for protocol in ("gs", "s3"):  # as in a process where neither was opened before
        monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r'gs://b/toy.*pip install "scalegpt\[tpu\]"'):
        open_dataset("gs://b/toy", str(tmp_path))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://b/toy.*s3fs.*pip install the package it names"):
        open_dataset("s3://b/toy", str(tmp_path))
    with pytest.raises(ValueError, match="cannot read nonsense://b"):
        open_dataset("nonsense://b/toy", str(tmp_path))


# ------------------------------------------------------------------------------- imports and speed


def test_importing_touches_no_device_and_no_file_system():
    code = (
        "import sys, scalegpt.data.parts, scalegpt.data.engine\n"
        "assert not {'jax', 'pydantic'} & {*sys.modules}  # data commands start at once\n"
        "import jax, scalegpt.data.batches, scalegpt.data.datasets\n"
        "jax.config.update('jax_num_cpu_devices', 3)  # refused once JAX has its devices\n"
        "assert 'tensorflow' not in sys.modules and 'fsspec.core' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_fault_15_the_input_pipeline_throughput(tmp_path):
    """64 x 1024 tokens a batch from 100M: at least 20M tokens/s, or a NumPy gather's rate.

    Seeds' fault 15: 15 ms a step on the critical path. See the figures with pytest -s.
    """
    B, T, n, steps = 64, 1024, 100_000_000, 60
    np.random.default_rng(0).integers(0, 50_257, n, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    tokens.max()  # into the page cache, for the gather as for us

    def rate(step):
        best = math.inf
        for _ in range(5):
            begin = time.perf_counter()
            for i in range(steps):
                step(i)
            best = min(best, time.perf_counter() - begin)
        return steps * B * T / best / 1e6

    source = TrainBatches([tokens], [1.0], T, 0, BatchConfig(sequences=B), B, np.arange(B))
    halves = [tokens[: n // 2], tokens[n // 2 :]]
    mixed = TrainBatches(halves, [0.7, 0.3], T, 0, BatchConfig(sequences=B), B, np.arange(B))
    starts, within = np.random.default_rng(0).integers(0, n - T, (steps, B, 1)), np.arange(T + 1)
    order, rows = source.orders[0], np.arange(B)
    plain, mixture = train_iterator(source, 0), train_iterator(mixed, 0)
    figures = {
        "order alone": rate(lambda i: order.window(i * B + rows)),
        "source alone": rate(lambda i: source[i]),
        "through Grain": rate(lambda _: next(plain)),
        "mixture of two through Grain": rate(lambda _: next(mixture)),
        "NumPy gather": rate(lambda i: tokens[starts[i] + within].astype(np.int32)),
    }
    print("\nmillion tokens/s:", ", ".join(f"{k} {v:.0f}" for k, v in figures.items()))
    floor = min(20, figures["NumPy gather"])
    assert figures["through Grain"] >= floor and figures["mixture of two through Grain"] >= floor
