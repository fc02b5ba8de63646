"""The documents of a text: their order in an epoch, and what keeps them apart, in plain loops."""

import hashlib
import json
import time
import tracemalloc
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from scalegpt import evaluate, train
from scalegpt.checkpoints import manifest
from scalegpt.config import BatchConfig
from scalegpt.config.command_line import parse
from scalegpt.config.differences import curve_diff
from scalegpt.config.limits import BEGINS
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import best_fit
from scalegpt.data import documents as module
from scalegpt.data.batches import EvalBatches, TrainBatches, TrainOrder
from scalegpt.data.best_fit import FittedText
from scalegpt.data.datasets import open_datasets, resolved, windows_of
from scalegpt.data.documents import DocumentText
from scalegpt.data.prepare import Corpus, write_dataset
from scalegpt.data.token_files import open_split
from scalegpt.data.tokenizer import load
from scalegpt.inference.text_loss import text_evaluator
from scalegpt.model.gpt import GPT
from scalegpt.run import reports
from scalegpt.step.build import build_for_use
from scalegpt.step.loss import row_losses
from scalegpt.step.objective import target_count
from scalegpt.step.sharding import make_mesh

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


# --- rows by best fit


def rows_by_best_fit(documents, block, begin, end, mark):
    """The rows of the text from `begin` to `end` of an epoch's documents, by lists of ids alone."""
    pieces, at = [], 0
    for ids in documents:
        first, last = max(begin, at), min(end, at + len(ids))
        if first < last:
            # The mark that ends it, which the file's last one has, or the next token of a cut one.
            whole = [*ids, *[EOT] * (mark and (ids[-1] != EOT or len(ids) == 1))]
            pieces.append((whole[first - at : last - at + mark], first == at))
        at += len(ids)
    rows, count = [], (end - begin) // (block if mark else block + 1)
    short, last, places = [], [], 0  # those in rows' places, if each row has one of a cut besides
    for ids, whole in pieces:
        cuts = range(0, len(ids) - 1, block)
        places += len(ids) - 1 + len(cuts)
        if places > block * count:
            last += [(ids, whole)] * (len(ids) > 1)
            continue
        split = [(ids[at : at + block + 1], whole and at == 0) for at in cuts]
        rows += [[piece] for piece in split if len(piece[0]) == block + 1]
        short += [piece for piece in split if len(piece[0]) <= block]

    def rank(piece):  # of equal ones the last in the file, as ids but the mark say
        return len(piece[0]), piece[1], piece[0][0] or piece[0][1] - 1

    while (short or last) and len(rows) < count:
        row, room = [], block + 1
        while (short or last) and room:
            if not short:
                short, last = last[:1], last[1:]
            if fits := [piece for piece in short if len(piece[0]) <= room]:
                piece = max(fits, key=rank)
                short.remove(piece)
            else:
                longer = max([p for p in short if not p[1]] or short, key=rank)
                short.remove(longer)
                piece = longer[0][:room], longer[1]
                short.append((longer[0][room - 1 :], longer[1] and room == 1))
            row.append(piece)
            room -= len(piece[0])
        rows.append([p for p in row if p[1]] + [p for p in row if not p[1]])
    return rows[:count]


@pytest.mark.parametrize("key, mark", [("k", True), (None, True), ("k", False)])
@pytest.mark.parametrize("marked", [True, False])
def test_documents_fill_rows_as_best_fit_in_plain_loops(monkeypatch, key, mark, marked):
    monkeypatch.setattr(module, "BUCKET", 32)
    monkeypatch.setattr(best_fit, "ROWS", 8)
    lengths = np.random.default_rng(3).integers(2, 20, 100)
    lengths[[7, 40]] = 90, 33  # longer than a row
    tokens, ends = written(lengths, mark)
    text = FittedText(tokens, ends, EOT, key, marked, block_size=16)
    order = TrainOrder(len(text), 16, 0)
    for epoch in range(2):
        documents = (
            epoch_of(tokens, ends, mark, key, epoch, 32)
            if key
            else [part.tolist() for part in np.split(tokens, ends[:-1].astype(int) - mark)]
        )
        starts = np.sort(order.window(epoch * order.n_windows + np.arange(order.n_windows)))
        moved = int(starts[0]) % 8  # so many windows more would be in the first group
        for group in np.split(starts, range(8 - moved, len(starts), 8)):
            begin, count = int(group[0]), len(group)
            end = min(begin + count * (16 if mark else 17), len(text))
            expected = rows_by_best_fit(documents, 16, begin, end, mark)
            assert len(expected) == count or not mark
            for start, row in zip(group.tolist(), expected, strict=False):
                got = text.window(epoch * len(text) + start, 17)
                ids = sum((piece for piece, _ in row), [])
                begins = np.cumsum([0, *(len(piece) for piece, _ in row[:-1])])
                want = np.array(ids + [-1] * (17 - len(ids)), np.int32)
                want[begins] += BEGINS * marked
                want[begins[1:]] = ~want[begins[1:]]
                assert got.tolist() == want.tolist(), (epoch, start)


@pytest.mark.parametrize("mark", [True, False])
def test_rows_by_best_fit_are_full_and_predict_each_token_once(monkeypatch, mark):
    """What fits is whole but for a few, and little is left out; the start of a run says how much.
    Hosts and microbatches change nothing, in whatever order steps are read."""
    monkeypatch.setattr(best_fit, "ROWS", 32)
    lengths = np.random.default_rng(5).integers(3, 120, 400)
    tokens, ends = written(lengths, mark)
    make = lambda: FittedText(tokens, ends, EOT, "k", block_size=64)  # noqa: E731
    text, order = make(), TrainOrder(len(tokens), 64, 5)
    starts = len(text) + order.window(order.n_windows + np.arange(order.n_windows))
    rows = np.array([text.window(start, 65) for start in starts.tolist()])
    used = [sum(length for _, length in text._row(start)) for start in starts.tolist()]
    assert 65 * len(used) - sum(used) <= (1 if mark else 32)  # of the epoch's last row
    values, counts = np.unique(rows[:, 1:][rows[:, 1:] > EOT], return_counts=True)
    assert len(values) > 0.975 * (len(tokens) - 400)  # but marks, or first tokens
    assert counts.max() == 1 or not mark  # without marks, groups share what may be left out
    fit = whole = 0
    row_of, place = {}, {}  # of a token, but the marks
    for r, row in enumerate(np.where(rows < 0, ~rows, rows).tolist()):
        for at, value in enumerate(row):
            row_of[value], place[value] = r, at
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        first, last = end - length + 1, end - mark
        if length + mark <= 65 and {first, last} <= row_of.keys():
            fit += 1
            whole += row_of[first] == row_of[last] and place[last] - place[first] == last - first
    assert whole > 0.93 * fit > 150  # where groups meet, documents are cut
    cut, left_out = text.shares()
    assert 0 <= cut < 0.05 and 0 <= left_out < 0.02  # windows would cut a half
    assert (left_out > 0) == mark  # the mark that ends a document also begins the next one

    def batches(rows, micro):
        size = BatchConfig(sequences=8)
        return TrainBatches([make(), tokens], [0.75, 0.25], 64, 5, size, micro, rows)

    whole = batches(np.arange(8), 8)
    for step in (19, 0, 7):
        parts = np.stack([batches(np.arange(h, 8, 2), 8)[step] for h in range(2)], 2)
        assert np.array_equal(parts.reshape(1, 8, 65), whole[step])
        assert np.array_equal(batches(np.arange(4), 4)[step].reshape(1, 8, 65), whole[step])


@pytest.mark.parametrize("key", ["k", None])
def test_best_fit_leaves_out_the_end_of_a_group_whatever_the_lengths_there(monkeypatch, key):
    """That end is elsewhere in each epoch: no text is left out always, and short documents are left
    out as often as long ones."""
    monkeypatch.setattr(best_fit, "ROWS", 8)
    lengths = np.random.default_rng(7).geometric(1 / 12, 500) + 2
    tokens, ends = written(lengths)
    text = FittedText(tokens, ends, EOT, key, block_size=64)
    plain, order = DocumentText(tokens, ends, EOT, key), TrainOrder(len(tokens), 64, 5)
    read, predicted = np.zeros((2, len(tokens) + 1), int)
    for epoch in range(16):
        starts = np.sort(order.window(epoch * order.n_windows + np.arange(order.n_windows)))
        for group in np.split(starts, range(8 - int(starts[0]) % 8, len(starts), 8)):
            group += epoch * len(text)
            ids = plain.window(int(group[0]), 64 * len(group) + 1)[1:]
            ids = ids[ids > 1]  # but marks, and what no mark comes before
            rows = np.array([text.window(start, 65)[1:] for start in group.tolist()])
            there = np.isin(ids, rows)
            assert there.sum() == (rows > 1).sum()  # each once, and none of another group
            assert there[: there.sum()].all() and 0 < (~there).sum() < 64
            read[ids] += 1
            predicted[ids[there]] += 1
    left_out, length = (read - predicted)[2:], np.repeat(lengths, lengths)[1:]
    assert (left_out < 9).all()
    some = [(length >= a) & (length < b) for a, b in ((3, 10), (10, 20), (20, 99))]
    shares = np.array([left_out[these].sum() / read[2:][these].sum() for these in some])
    assert 0.05 < shares.min() and np.ptp(shares) < 0.01


@pytest.mark.parametrize("longest", [1, 2, 40])
def test_text_without_marks_has_every_row_of_an_epoch(longest):
    """A short document has few tokens to predict, so that the end of an epoch may fill few rows."""
    tokens, ends = written(np.random.default_rng(1).integers(1, longest + 1, 900), False)
    text, order = FittedText(tokens, ends, None, "k", block_size=16), TrainOrder(len(tokens), 16, 0)
    for start in order.window(np.arange(order.n_windows)).tolist():
        row = text.window(start, 17)
        assert len(row) == 17 and row[0] == tokens[text.first_token(start)]
        assert (row[1:] >= 0).any() == (longest > 1)


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
    fitted = FittedText(Tokens(), Index(), None, "k", block_size=1024)
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
        assert len(fitted.window(start + i * len(text), 1025)) == 1025
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert started < 1 and peak < 32 << 20


# --- masks


@pytest.mark.parametrize(
    "source, key",
    [("index", None), ("index", "k"), ("marks", None), ("no mark", None), ("no mark", "k")],
)
def test_windows_say_where_documents_begin(source, key, monkeypatch):
    """A document begins with the mark before it; without one, its first token is not predicted."""
    monkeypatch.setattr(module, "BUCKET", 8)
    mark = source != "no mark"
    tokens, ends = written(np.random.default_rng(1).integers(1, 9, 40), mark)
    text = DocumentText(tokens, None if source == "marks" else ends, EOT, key, marked=True)
    expected, begun = [], []
    for document in (
        epoch_of(tokens, ends, mark, key, 2, 8)
        if key
        else np.split(tokens, ends[:-1].astype(int) - mark)
    ):
        expected += list(document)
        begun += [True, *[False] * (len(document) - 1)][: len(document)]
    for start in range(0, len(tokens), 5):
        window = text.window(2 * len(tokens) + start, 12)
        cut = window < 0
        plain = np.where(cut, ~window, window)
        assert (plain % BEGINS).tolist() == expected[start : start + 12]
        begins = np.array(begun[start : start + 12])
        if source == "marks":  # also where the first document begins without, and at the end
            begins = plain % BEGINS == EOT
        assert (plain >= BEGINS).tolist() == begins.tolist()
        assert (cut == (begins & (plain % BEGINS != EOT))).all()
    batches = EvalBatches(DocumentText(tokens, ends, EOT, marked=True), 16, 3, np.arange(3))
    read = np.concatenate([batch for batch in batches])
    targets = read[:, 1:]
    assert batches.tokens == (targets >= 0).sum() == len(tokens) - 1 - (0 if mark else 39)
    assert (targets[targets >= 0] % BEGINS > 0).sum() <= len(tokens)


TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=20, vocab_multiple=8)
MODELS = {
    "learned": dict(bias=True),
    "rope": dict(position="rope", value_embeddings=True, tie_word_embeddings=False)
    | dict(smear=True, backout=True),
}


@cache
def model_and_params(kind, attention="xla", isolate=True):
    config = ModelConfig(**TINY, **MODELS[kind], isolate=isolate)
    model = GPT(config, jnp.dtype("float32"), attention)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes["params"]
    )


@cache
def losses_of(kind, attention="xla", isolate=True):
    """A function of tokens to the cross-entropy of each target, and the gradient of their sum."""
    model, params = model_and_params(kind, attention, isolate)

    def total(params, tokens):
        each = row_losses(model, params, tokens, None, summed=False)
        return each.sum(), each

    gradient = jax.jit(jax.grad(total, has_aux=True))
    return lambda tokens: gradient(params, np.asarray(tokens, np.int32))[::-1]


@pytest.mark.parametrize("kind, attention", [("learned", "xla"), ("rope", "flax")])
def test_a_document_has_the_loss_that_it_has_alone(kind, attention):
    """With a mark before each, which is also what ends the one before, and without."""
    texts = [[0, 3, 4, 5, 6], [0, 7, 8], [0], [0, 9, 10, 11, 12, 13, 14, 15]]
    for mark in (True, False):
        parts = [np.array(text if mark else text[1:], np.int32) for text in texts]
        row = np.concatenate([p + BEGINS * (np.arange(len(p)) == 0) for p in parts])
        if not mark:
            row[row >= BEGINS] = ~row[row >= BEGINS]
        row = np.concatenate([row, np.full(25 - len(row), -1)])[None]
        got, _ = losses_of(kind, attention)(row)
        at = 0
        for i, part in enumerate(parts):
            following = [0] if mark and i + 1 < len(parts) else []
            alone = np.concatenate([part, following, np.full(25 - len(part) - len(following), -1)])
            want, _ = losses_of(kind, attention, None)(alone[None])
            n = len(part) + len(following) - 1 if len(part) else 0
            np.testing.assert_allclose(got[0, at : at + n], want[0, :n], rtol=0, atol=1e-5)
            at += len(part)
        count = sum(map(len, parts)) - (1 if mark else sum(len(part) > 0 for part in parts))
        assert float(target_count(row)) == count == (np.asarray(got) != 0).sum()


@pytest.mark.parametrize("kind", MODELS)
def test_masks_change_no_bit_where_a_window_holds_one_document(kind):
    rows = np.random.default_rng(2).integers(1, 20, (3, 25)).astype(np.int32)
    rows[1, 0] += BEGINS  # it may begin with the window, or before
    got, grads = losses_of(kind)(rows)
    want, plain = losses_of(kind, isolate=None)(rows % BEGINS)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# --- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """200 short texts as a data set of bytes, a tenth of them for validation."""
    folder = tmp_path_factory.mktemp("texts") / "texts"
    parts = [("train" if i % 10 else "val", f"{i} is {i * i % 97}. " * (i % 5)) for i in range(200)]
    write_dataset(folder, lambda: Corpus(load("byte"), parts, 9000), "x", 0, False)
    return folder


def given(data, out="out", **changes):
    return parse(tiny_run.arguments(data, out, **changes), "test", {})[0]


def test_what_a_run_needs_to_know_documents(texts, tmp_path):
    plain, masked = given(texts), given(texts, data__document_mask="true")
    config = resolved(masked, open_datasets(masked))
    assert (config.model.isolate, config.model.bos) == (True, None) and config.model.begins_in_batch
    changes = ["model.isolate: None -> True", "data.document_mask: False -> True"]
    assert curve_diff(resolved(plain, open_datasets(plain)), config) == changes
    measures = {manifest.measure({"config": c.model_dump()}) for c in (plain, masked)}
    assert len(measures) == 2
    apart = given(texts, data__document_mask="true", model__isolate="false")
    with pytest.raises(ValueError, match="document_mask=true .* model.isolate=false does not"):
        resolved(apart, open_datasets(apart))
    old = tiny_run.write_data(tmp_path / "plays", tiny_run.TEXT)  # without marks or an index
    asked = given(old, data__document_mask="true")
    with pytest.raises(ValueError, match="plays has neither train.idx nor end-of-text marks"):
        resolved(asked, open_datasets(asked))
    with pytest.raises(ValueError, match="shuffle=documents, but plays has no train.idx"):
        open_datasets(given(old, data__shuffle="documents"))
    # An update's windows are named by where they are in the file.
    config = given(texts, data__shuffle="documents")
    tokens = open_datasets(config)[0].train
    text = DocumentText(tokens, open_datasets(config)[0].train_ends, 0, "scalegpt/1337/0")
    order = TrainOrder(len(tokens), tiny_run.T, 1337)
    starts = order.window(np.arange(tiny_run.ROWS)).tolist()
    assert windows_of(config, open_datasets(config), 1) == [
        ("texts", text.first_token(start)) for start in starts
    ]
    assert [text.first_token(start) for start in starts] != starts


def test_an_evaluation_may_keep_documents_apart_where_training_does_not(texts, tmp_path):
    """Then it has the model, and the batches, of a run that trains so; and the other way round."""
    found = {}
    for trained in ("false", "true"):
        for evaluated in (None, "false", "true"):
            keys = {"data.document_mask": trained, "eval.document_mask": evaluated}
            config = given(texts, **keys, **{"model.dropout": 0, "model.scan_layers": "false"})
            datasets = open_datasets(config)
            config = resolved(config, datasets)
            steps = build_for_use(config, make_mesh(config.mesh, jax.devices()[:1]), 4)
            params, split = steps.abstract.params, open_split(texts, "val")
            seen = replace(steps, jit_evaluate=Mock(return_value=(np.ones(4), np.ones(4))))
            text_evaluator(seen, [split], [1.0], 12, shown=False)[0](params)
            batches = [call.args[1] for call in seen.jit_evaluate.call_args_list]
            measured = manifest.measure({"config": config.model_dump(mode="json")})
            found[trained, evaluated] = (
                steps.eval_model.config,
                np.concatenate(batches).tolist(),
                measured,
            )
            assert steps.model.config.begins_in_batch == (trained == "true")
    assert found["false", None] == found["false", "false"] == found["true", "false"]
    assert found["true", None] == found["true", "true"] == found["false", "true"]
    assert all(a != b for a, b in zip(found["false", None], found["true", None], strict=True))
    told = {
        "false": "in evaluations within each document, by its index",
        "true": "across documents",
    }
    for trained, line in told.items():
        keys = {"data.document_mask": trained, "eval.document_mask": str(trained == "false")}
        config = resolved(given(texts, **keys), datasets)
        assert reports._apart(config, datasets).endswith(line)
    marks = [replace(datasets[0], name="plays", train_ends=None, val_ends=None)]
    config = resolved(given(texts, data__document_mask="true"), datasets)
    told = reports._apart(config, marks + datasets)
    assert told.endswith("within each document, by its index, in plays by end-of-text marks")
    assert reports._apart(config, marks).endswith("within each document, by end-of-text marks")
    chat = SimpleNamespace(name="talk", config=given(texts, objective__name="sft"))
    with pytest.raises(ValueError, match="talk has learned from conversations.*--document-mask"):
        evaluate._masked(SimpleNamespace(document_mask=False), None, chat, 8)
    old = tiny_run.write_data(tmp_path / "plays", tiny_run.TEXT)  # without marks or an index
    for key in ({"eval.document_mask": "true"}, {"data.pack": "best_fit"}):
        asked = given(old, **key)
        with pytest.raises(ValueError, match=f"{next(iter(key))}.* plays has neither train.idx"):
            resolved(asked, open_datasets(asked))


@pytest.mark.slow
def test_a_run_with_masks_continues_bitwise_on_any_mesh_and_is_evaluated_so(
    texts, tmp_path, monkeypatch, capsys
):
    keys = {"data.shuffle": "documents", "data.document_mask": "true", "model.dropout": 0}
    keys |= {"data.pack": "best_fit"}
    argv = tiny_run.arguments(texts, tmp_path / "whole", **keys)
    tiny_run.stop_after(monkeypatch)
    assert train.main(argv) == 0
    told = capsys.readouterr().out
    assert "within each document, by its index" in told
    assert "rows     texts: of the documents that fit into a row, about " in told
    argv = tiny_run.arguments(texts, tmp_path / "run", **keys)
    tiny_run.stop_after(monkeypatch, 7)
    assert train.main(argv) == 3
    tiny_run.stop_after(monkeypatch)
    assert train.main(argv) == 0
    whole = {key: tiny_run.rows(tmp_path / "whole", key) for key in ("train/loss", "val/loss")}
    assert whole == {key: tiny_run.rows(tmp_path / "run", key) for key in whole}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    assert train.main(tiny_run.arguments(texts, tmp_path / "mesh", **keys, **mesh)) == 0
    for key, rows in whole.items():
        others = tiny_run.rows(tmp_path / "mesh", key)
        assert rows.keys() == others.keys()
        np.testing.assert_allclose([*others.values()], [*rows.values()], rtol=0, atol=1e-5)
    capsys.readouterr()
    options = ["--run", str(tmp_path / "run"), "--checkpoint", "latest", "--windows", "12"]
    assert evaluate.main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(found["val/loss"] - whole["val/loss"][tiny_run.STEPS]) < 1e-6
    assert found["document_mask"] is True
    assert evaluate.main([*options, "--json", "--no-document-mask"]) == 0
    across = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "document_mask" not in across and across["val/loss"] != found["val/loss"]
    assert train.main([*argv, "--run.replay=3"]) == 0
    told = capsys.readouterr().out
    assert "texts:" in told and " is " in told
    # Without masks it is another measure, and another curve.
    other = tiny_run.arguments(
        *(texts, tmp_path / "run"), **keys | {"data.document_mask": "false", "optim.steps": 14}
    )
    with pytest.raises(ValueError, match="data.document_mask: True -> False"):
        train.main(other)
    assert train.main([*other, "--run.allow_config_change=true"]) == 0
    told = capsys.readouterr().out
    assert "the best is sought anew" in told and "spikes are measured against" in told
    last = tiny_run.rows(tmp_path / "run", "val/loss")[14]
    for flag, equal in (("--no-document-mask", True), ("--document-mask", False)):
        assert evaluate.main([*options, "--json", flag]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (abs(found["val/loss"] - last) < 1e-6) == equal
