"""A text prepared in parts is the text prepared at once; what is wrong with a part is told."""

import gzip
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from test_prepare import DATA, module

from scalegpt.config import BatchConfig, loading
from scalegpt.data import batches, datasets, joined
from scalegpt.data.batches import TrainBatches, train_iterator
from scalegpt.data.datasets import open_datasets, train_batches
from scalegpt.data.documents import DocumentText
from scalegpt.data.joined import Joined, part_folder
from scalegpt.data.parts import Part
from scalegpt.data.token_files import open_dataset, open_split
from scalegpt.errors import Mistake
from scalegpt.files import staging, text_files

FILES = 7


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A folder of files, of which one is empty, what one machine makes of it, and three parts."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "in").mkdir()
    for k in range(FILES):
        texts = [f"{k} {i} " + "word " * (i * 7 % 40) for i in range(30 * (k != 3))]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "in" / f"{k}.jsonl").write_text(lines)
    prepared(folder, "one")
    for number in (2, 0, 1):
        prepared(folder, "many", f"--part={number}/3")
    return folder


@pytest.fixture
def folder(corpora, tmp_path):
    """A copy of `corpora`, whose input stays where it is."""
    for name in ("one", "many"):
        shutil.copytree(corpora / name, tmp_path / name)
    (tmp_path / "in").symlink_to(corpora / "in")
    return tmp_path


def prepared(folder, name, *more):
    flags = {"--tokenizer": "byte", "--val-fraction": "0.1", "--out": str(folder / name)}
    flags |= {"--input": str((folder / "in").resolve())}
    flags |= dict(word.split("=", 1) for word in more if "=" in word)
    return module("text").main(
        [*(f"{k}={v}" for k, v in flags.items()), *(word for word in more if "=" not in word)]
    )


def refused(folder, message, *more):
    """What lies there is the same after a refusal."""
    before = {path: path.stat().st_mtime_ns for path in (folder / "many").rglob("*")}
    with pytest.raises(Mistake, match=message):
        prepared(folder, "many", *more)
    assert {path: path.stat().st_mtime_ns for path in (folder / "many").rglob("*")} == before


def test_parts_are_together_what_one_machine_makes(folder, capsys):
    prepared(folder, "many", "--merge")
    one, many = (json.loads((folder / n / "meta.json").read_text()) for n in ("one", "many"))
    for key in ("train", "val", "tokenizer", "vocab_size", "dtype", "source"):
        assert one[key] == many[key]
    for name in ("train.bin", "val.bin"):
        whole = b"".join((part_folder(folder / "many", k, 3) / name).read_bytes() for k in range(3))
        assert whole == (folder / "one" / name).read_bytes()
    assert not (folder / "many" / "train.bin").exists()
    capsys.readouterr()
    for more in (["--merge"], [], ["--part=1/3"]):  # a killed job is begun again as a whole
        prepared(folder, "many", *more)
        assert "is already prepared" in capsys.readouterr().out


def test_the_trainer_reads_parts_as_the_one_file(folder):
    prepared(folder, "many", "--merge")
    one, many = open_dataset(folder / "one"), open_dataset(folder / "many")
    assert one.fingerprint == many.fingerprint and one.index == many.index
    assert one.val_bytes_per_token == many.val_bytes_per_token
    for name in ("train", "val", "train_ends", "val_ends"):
        a, b = getattr(one, name), getattr(many, name)
        assert len(a) == len(b) and a.dtype == b.dtype and a.nbytes == b.nbytes
        assert np.array_equal(a, b) and int(a[-1]) == int(b[-1]) and int(a[5]) == int(b[5])
        for start in range(0, len(a), 13):
            assert np.array_equal(a[start : start + 40], b[start : start + 40])
    assert np.array_equal(open_split(folder / "many", "val").ends, one.val_ends)
    sources = [
        TrainBatches([text], [1.0], 16, 3, BatchConfig(sequences=8), 8, np.arange(8))
        for d in (one, many)
        for text in (d.train, DocumentText(d.train, d.train_ends, 0, "key", True))
    ]
    for step in (0, 1, 40, 500):
        rows = [source[step] for source in sources]
        assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows[1], rows[3])


def test_parts_in_a_bucket_are_copied_each_as_it_is(folder, tmp_path):
    prepared(folder, "many", "--merge")
    fs = fsspec.filesystem("memory")
    fs.put(f"{folder / 'many'}", "/parts-of-a-bucket", recursive=True)
    dataset = open_dataset("memory://parts-of-a-bucket", str(tmp_path / "cache"))
    assert np.array_equal(dataset.train, open_dataset(folder / "one").train)
    fs.rm("/parts-of-a-bucket/parts-3/1/val.idx")
    with pytest.raises(Mistake, match=r"cannot read .*parts-3/1/val.idx"):
        open_dataset("memory://parts-of-a-bucket", str(tmp_path / "cache"))


@pytest.fixture
def bucket(folder, monkeypatch):
    """Seven parts in a bucket, the names of files that are copied from there, and the bytes of
    parts on the disk with each."""
    for number in range(FILES):
        prepared(folder, "seven", f"--part={number}/{FILES}")
    prepared(folder, "seven", "--merge")
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket", recursive=True) if fs.exists("/bucket") else None
    fs.put(f"{folder / 'seven'}", "/bucket", recursive=True)
    monkeypatch.setattr(staging, "WAITS", ())
    copied, used, copy = [], [], staging._copy

    def noted(fs, source, target, size, *more):
        copied.append(source.removeprefix("/bucket/"))
        used.append(on_disk(folder / "cache") + size * ("parts-" in source))
        return copy(fs, source, target, size, *more)

    monkeypatch.setattr(staging, "_copy", noted)
    return fs, copied, used


def on_disk(cache):
    return sum(p.stat().st_size for p in cache.glob("*/parts-*/*/*") if p.suffix != ".sha256")


def test_parts_are_copied_when_they_are_read_and_make_room_for_others(folder, bucket, tmp_path):
    cache, (_, copied, used) = tmp_path / "cache", bucket
    one, limit = open_dataset(folder / "one"), 20_000
    dataset = open_dataset("memory://bucket", str(cache), limit)
    assert dataset.fingerprint == one.fingerprint and dataset.index == one.index
    size = dataset.train.nbytes + dataset.train_ends.nbytes
    assert limit < size and {Path(name).name for name in copied} == {"meta.json", *BOTH}
    for start in range(0, len(one.train), 1009):
        assert np.array_equal(one.train[start : start + 2000], dataset.train[start : start + 2000])
    assert max(used) <= limit
    part = "parts-7/0/train.bin"
    count = copied.count(part)
    assert dataset.train[5] == one.train[5] and copied.count(part) == count + 1  # it was deleted
    local = cache / staging.name_of_url("memory://bucket") / part
    assert dataset.train[6] == one.train[6] and copied.count(part) == count + 1
    local.unlink()  # as another process does for room
    assert dataset.train[7] == one.train[7] and copied.count(part) == count + 2
    for source in ("train_ends", "val", "val_ends"):
        assert np.array_equal(getattr(one, source), getattr(dataset, source))
    again = open_dataset("memory://bucket", str(cache), limit)
    copied.clear()
    assert again.val[-1] == one.val[-1] and not copied  # what lies there is known by its hash
    texts = [DocumentText(d.train, d.train_ends, 0, "key", True) for d in (one, again)]
    for start in range(0, 2 * len(one.train), 5003):
        assert np.array_equal(texts[0].window(start, 99), texts[1].window(start, 99))
    assert on_disk(cache) > 12_000 >= len(open_dataset("memory://bucket", str(cache), 12_000).val)
    assert on_disk(cache) <= 12_000
    split = open_split("memory://bucket", "train", str(cache), 12_000)  # as evaluate does
    assert np.array_equal(split.tokens, one.train) and np.array_equal(split.ends, one.train_ends)
    assert on_disk(cache) <= 12_000
    with pytest.raises(Mistake, match=r"a file of .* bytes is needed, and data.disk_limit allows"):
        open_dataset("memory://bucket", str(tmp_path / "other"), 4000)
    whole = open_dataset("memory://bucket", str(cache))
    open_dataset("memory://bucket", str(cache), 12_000)  # another run's limit
    with pytest.raises(Mistake, match=r"train.idx is there no more, .* another data.cache_dir"):
        whole.train_ends[:]


BOTH = ("train.bin", "val.bin")


def test_spans_are_copied_before_their_turn_and_a_run_reads_what_it_would_locally(
    folder, bucket, tmp_path
):
    one = open_dataset(folder / "one")
    dataset = open_dataset("memory://bucket", str(tmp_path / "cache"), 1e9)
    batch = ([1.0], 16, 3, BatchConfig(sequences=8), 8, np.arange(8), len(one.train) / 9)
    local, remote = (TrainBatches([d.train], *batch) for d in (one, dataset))
    order = remote.orders[0]
    assert order.spans > 8
    steps = train_iterator(remote, 5)
    for step in range(5, 5 + 2 * order.spans):
        assert np.array_equal(local[step], next(steps))
    copied = bucket[1]
    ahead, end = remote.ahead[0], time.monotonic() + 30
    later = {file._name for s in (ahead.span, ahead.span + 1) for file in ahead._files(s)}
    for row in range(0, 2 * order.n_windows, 5):
        if order.span(row) in (ahead.span, ahead.span + 1):
            start = int(order.window(np.array([row]))[0])
            for at in (start, start + 16):
                part = int(dataset.train.stops.searchsorted(at, "right"))
                assert f"parts-7/{part}/train.bin" in later
    while not later <= {*copied} and time.monotonic() < end:
        time.sleep(0.01)
    assert later <= {*copied} and len(copied) == len({*copied})


def test_a_limit_of_little_more_than_a_span_has_files_copied_a_few_times_an_epoch(
    folder, bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "PIECES", 1)
    cache, limit, one = tmp_path / "cache", 14_000, open_dataset(folder / "one")
    dataset = open_dataset("memory://bucket", str(cache), limit)
    batch = ([1.0], 16, 3, BatchConfig(sequences=8), 8, np.arange(8), len(one.train) / 9)
    local, remote = (TrainBatches([d.train], *batch) for d in (one, dataset))
    bucket[1].clear()
    steps, epoch = train_iterator(remote, 0), remote.orders[0].n_windows // 8
    for step in range(2 * epoch):
        assert np.array_equal(local[step], next(steps))
    assert max(bucket[2]) <= limit
    # Two epochs of nine spans, of which each needs two or three of six files, perhaps copied ahead
    # and again; without spans, nearly each of the 2,000 windows would have one copied.
    assert 12 <= len(bucket[1]) <= 2 * 9 * 3 * 2, bucket[1]


def test_what_is_wrong_with_a_part_in_a_bucket_is_told_before_training_or_where_it_is_read(
    bucket, tmp_path, monkeypatch
):
    fs, cache, file = bucket[0], tmp_path / "cache", "/bucket/parts-7/5/train.bin"
    whole = fs.cat_file(file)

    def opened(limit=1e9):
        return open_dataset("memory://bucket", str(cache), limit)

    fs.pipe_file(file, whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(Mistake, match=r"5/train.bin is not the file that meta.json describes"):
        opened().train[:]
    assert not [*cache.glob("*/parts-7/5/train.bin*")]
    fs.pipe_file(file, whole)
    broken, left = [2], cache / staging.name_of_url("memory://bucket") / "parts-7/5/.9.train.bin"
    left.write_bytes(b"of a process that was killed")
    open_ = type(fs).open

    def flaky(self, path, *a, **k):
        if path.endswith("5/train.bin") and broken[0]:
            broken[0] -= 1
            raise ConnectionError("reset by peer")
        return open_(self, path, *a, **k)

    monkeypatch.setattr(type(fs), "open", flaky)
    with pytest.raises(Mistake, match=r"cannot copy .*5/train.bin to .*: reset by peer; try again"):
        opened().train[:]
    monkeypatch.setattr(staging, "WAITS", (0, 0))
    assert len(opened().train[:]) and not left.exists() and not broken[0]
    fs.pipe_file(file, whole[:-1])
    with pytest.raises(Mistake, match=r"5/train.bin has .* bytes but meta.json says .* --part 5/7"):
        opened()
    fs.rm(file)
    with pytest.raises(Mistake, match=r"cannot read .*5/train.bin: it is not there; .* --part 5/7"):
        opened()


def test_a_limit_that_a_span_may_not_fit_in_is_refused(bucket, tmp_path, monkeypatch):
    def run(**data):
        data = {"path": "memory://bucket", "cache_dir": str(tmp_path / "cache")} | data
        sections = {"model": {"block_size": 16}, "data": data, "run": {"out_dir": "x"}}
        config = loading.validate(sections, "here")
        return train_batches(config, open_datasets(config), 1, np.zeros(1, int)).orders[0]

    size = open_dataset("memory://bucket", str(tmp_path / "cache"))
    size = sum(s.nbytes for s in (size.train, size.train_ends, size.val, size.val_ends)) / 1e9
    assert run(disk_limit=size * 1.001).spans == 1
    assert run(disk_limit=size * 1.001, shuffle_span=2000).spans > 7
    with pytest.raises(Mistake, match=r"data.disk_limit=.* GB, but the data set has .* GB in buck"):
        run(disk_limit=size * 0.999)
    need = []
    monkeypatch.setattr(datasets, "PIECES", 1)
    for pack in ("windows", "best_fit"):  # of which a row has pieces of documents from further away
        with pytest.raises(
            Mistake, match=r"but the files that data.shuffle_span=800 tokens lie in may"
        ) as caught:
            run(disk_limit=size * 0.3, shuffle_span=800, pack=pack)
        need.append(float(re.search(r"may have (\S+) GB", str(caught.value))[1]))
    assert need[0] < need[1]
    with pytest.raises(Mistake, match=r"data.disk_limit leaves .*; raise it, or prepare the text"):
        fs = fsspec.filesystem("memory")
        fs.put(str(tmp_path / "one"), "/alone", recursive=True)
        run(path="memory://alone", disk_limit=size / 9)


@pytest.mark.parametrize("text", ["3/3", "a/b", "1", "-1/3", "0/0", "1/2/3", "1 /2"])
def test_a_part_that_is_none_is_refused(folder, text):
    refused(folder, f"--part={text} must be I/N, as 0/10 to 9/10", f"--part={text}")


def test_other_parts_are_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    part = "--part=1/3"
    refused(folder, "holds parts of 3, not of 2; remove", "--part=1/2")
    refused(folder, "holds parts of 3, not of 8; remove", "--part=0/8")
    refused(folder, "takes no --part", part, "--merge")
    refused(folder, "char is made of all the text", part, "--tokenizer=char")
    for other in ("--seed=1", "--val-fraction=0.2", "--tokenizer=gpt2", "--separator=x"):
        refused(folder, "holds .*, not .*: see --force and --out", part, other)
        refused(folder, "holds .*, not .*: see --force and --out", "--merge", other)
    with monkeypatch.context() as patch:
        patch.setattr("scalegpt.__version__", "9.9")
        refused(folder, r"by scalegpt [0-8].*not .*by scalegpt 9\.9", part)
        refused(folder, r"by scalegpt [0-8].*not .*by scalegpt 9\.9", "--merge")
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(folder / "one", tokenizer)
    meta = json.loads((tokenizer / "meta.json").read_text())
    made = ("--part=0/2", f"--tokenizer={tokenizer}")
    prepared(folder, "other", *made)
    spec = {"kind": "char", "chars": "word 0123456789"}
    (tokenizer / "meta.json").write_text(json.dumps({**meta, "tokenizer": spec}))
    with pytest.raises(Mistake, match="holds .*tokenizer .*, not "):
        prepared(folder, "other", *made)


@pytest.mark.parametrize("n", [3, 4, 23])
def test_files_are_shared_by_several_parts_where_these_are_more(tmp_path, monkeypatch, n):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(text_files, "BLOCK", 100)  # of which some lines have several
    texts = [f"{i} " + "word " * (i * 7 % 40) + "\u00e4\r\n" * (i % 3) for i in range(200)]
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts[:150])
    source = tmp_path / "in"
    source.mkdir()
    if n == 4:  # one file, that ends without a newline
        (source / "a.jsonl").write_text("\ufeff" + lines[:-1])
    elif n == 3:
        pq.write_table(pa.table({"text": texts}), source / "a.parquet", row_group_size=17)
    else:
        (source / "a.jsonl").write_text(lines)
        (source / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (source / "c.jsonl").write_text('{"text": "one line"}')
    prepared(tmp_path, "one")
    for number in range(n):
        prepared(tmp_path, "many", f"--part={number}/{n}")
    prepared(tmp_path, "many", "--merge")
    one, many = (json.loads((tmp_path / x / "meta.json").read_text()) for x in ("one", "many"))
    assert one["train"] == many["train"] and one["val"] == many["val"]
    metas = [json.loads((part_folder(tmp_path / "many", k, n) / "meta.json").read_text())
             for k in range(n)]  # fmt: skip
    documents = [m["train"]["documents"] + m["val"]["documents"] for m in metas]
    if n < 23:  # one file is divided evenly, and each byte is hashed once
        assert min(documents) > 0.5 * max(documents)
        inputs = [file for m in metas for file in m["inputs"]]
        assert [f["from"] for f in inputs[1:]] == [f["to"] for f in inputs[:-1]]
    if n == 4:
        with open(source / "a.jsonl", "a") as file:
            file.write('\n{"text": "new"}')
        prepared(tmp_path, "many", "--part=0/4", "--force")
        (tmp_path / "many" / "meta.json").unlink()
        with pytest.raises(
            Mistake, match=r"a.jsonl had .* for part 0/4, and .* for part 1/4: make"
        ):
            prepared(tmp_path, "many", "--merge")


def test_the_lines_of_shares_are_those_of_the_file_at_any_place(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    for text, block in (
        (b"a\n\nbb\nccc\n", 1 << 20),
        (b"\na\r\nbb\n\nlong line", 3),
        (b"x" * 9, 2),
    ):
        path.write_bytes(text)
        monkeypatch.setattr(text_files, "BLOCK", block)
        for n in range(1, 30):
            cuts = [Fraction(i, n) for i in range(n + 1)]
            shares = [b"".join(text_files.blocks(path, share)) for share in pairwise(cuts)]
            assert b"".join(shares) == text
            assert all(share.endswith(b"\n") for share in [*filter(None, shares)][:-1])
    monkeypatch.setattr(text_files, "size_of", lambda path: 0)  # as some servers of URLs do
    with pytest.raises(Mistake, match="lines does not say its size, by which lines are divided"):
        [*text_files.blocks(path, (Fraction(0), Fraction(1, 2)))]


def test_missing_and_damaged_parts_are_named(folder, tmp_path):
    many = folder / "many"
    prepared(folder, "many", "--merge")
    part, file = many / "parts-3" / "1", many / "parts-3" / "1" / "train.bin"
    whole = file.read_bytes()

    def is_told(opening, merging, *more):
        with pytest.raises(Mistake, match=opening):
            open_dataset(many)
        (many / "meta.json").rename(tmp_path / "kept")
        refused(folder, merging, "--merge")
        (tmp_path / "kept").rename(many / "meta.json")

    file.write_bytes(whole[:-2])
    is_told("train.bin has .* bytes but meta.json says .* --part 1/3", "lacks 1 of 3 parts.*: 1;")
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    is_told("train.bin is not the file that", "train.bin is not what .* --part 1/3 --force")
    file.unlink()
    is_told("cannot read .*train.bin: No such file", "lacks 1 of 3 parts.*: 1; .* --part 1/3")
    prepared(folder, "many", "--part=1/3")  # makes what is not whole again
    assert file.read_bytes() == whole and len(open_dataset(many).train)
    shutil.copytree(part, tmp_path / "copy")
    shutil.rmtree(many / "parts-3" / "2")
    shutil.move(tmp_path / "copy", many / "parts-3" / "2")
    is_told("has .* bytes but", "holds .*part 1/3.*, not .*part 2/3")
    shutil.rmtree(many / "parts-3")
    refused(folder, "has no parts to merge", "--merge")


def test_a_file_that_came_between_is_noticed(tmp_path, corpora):
    shutil.copytree(corpora / "in", tmp_path / "in")
    prepared(tmp_path, "many", "--part=0/2")
    (tmp_path / "in" / "10.jsonl").write_text('{"text": "new"}\n')
    refused(tmp_path, "7 files .*, not .*8 files", "--part=0/2")
    (tmp_path / "in" / "10.jsonl").unlink()
    facts = json.loads((tmp_path / "many" / "parts-2" / "0" / "meta.json").read_text())
    assert [Path(f["file"]).name for f in facts["inputs"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    (tmp_path / "in" / "6.jsonl").write_text("no JSON at all, but named so")
    with pytest.raises(Mistake, match="6.jsonl, line 1 is not JSON"):
        prepared(tmp_path, "many", "--part=1/2")
    assert not (tmp_path / "many" / "parts-2" / "1").exists()


def test_meta_json_that_describes_its_parts_wrongly_is_refused(folder):
    prepared(folder, "many", "--merge")
    file = folder / "many" / "meta.json"
    meta = json.loads(file.read_text())
    for wrong in ([], {}, None, {"train": {}}, {"train": {"tokens": [1, "2", 3]}}):
        file.write_text(json.dumps({**meta, "parts": wrong}))
        with pytest.raises(Mistake, match="its parts of train are damaged"):
            open_dataset(folder / "many")
    columns = meta["parts"]["train"]
    for name, wrong in (("tokens", 10**9), ("documents", -1), ("sha256", 1), ("index", None)):
        parts = {**meta["parts"], "train": {**columns, name: [wrong, *columns[name][1:]]}}
        file.write_text(json.dumps({**meta, "parts": parts}))
        with pytest.raises(Mistake, match="its parts of train are damaged"):
            open_dataset(folder / "many")


def test_shares_follow_each_other_and_differ_by_one_at_most():
    for items in (1, 7, 100):
        for n in (1, 2, 3, 7, 100):
            shares = [Part(i, n).share(range(items)) for i in range(n)]
            assert [x for share in shares for x in share] == [*range(items)]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_hundred_thousand_parts_of_a_trillion_tokens_cost_what_few_do():
    """Stand-ins for the files: of 10,000 documents of 1,000 tokens each, 10^9 documents in all."""
    n, documents, tokens = 100_000, 10_000, 10_000_000
    ends, opened = np.arange(1, documents + 1, dtype="<u8") * 1000, []

    def part(k):
        opened.append(k)
        return np.broadcast_to(np.uint16(k % 50_000), tokens)

    tracemalloc.start()
    begin = time.perf_counter()
    text = Joined(part, [tokens] * n, np.dtype("<u2"))
    starts = [k * tokens for k in range(n)]
    index = Joined(lambda k: ends, [documents] * n, ends.dtype, starts)
    assert len(text) == 10**12 and len(index) == 10**9 and index[-1] == 10**12 and not opened
    rows = np.arange(512, 520)  # what one of 128 hosts has
    batch = (1024, 0, BatchConfig(sequences=1024), 1024, rows)
    plain = TrainBatches([text], [1.0], *batch)
    shuffled = TrainBatches([DocumentText(text, index, None, "key")], [1.0], *batch)
    for step in (0, 1, 10**6):
        first = plain.windows(step)[1] // tokens % 50_000
        assert np.array_equal(plain[step].reshape(-1, 1025)[:, 0], first)
        places = shuffled.windows(step)[1].tolist()
        first = [shuffled.tokens[0].first_token(start) // tokens % 50_000 for start in places]
        assert np.array_equal(shuffled[step].reshape(-1, 1025)[:, 0], first)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(opened) < 1000 and seconds < 10 and peak < 40e6, (len(opened), seconds, peak)


def test_the_file_of_an_element_is_found_also_of_what_was_cut():
    ends = [np.array(part, "<u8") for part in ([300, 600, 1000], [], [400, 1000], [100, 200, 300])]
    whole = Joined(ends.__getitem__, [3, 0, 2, 3], np.dtype("<u8"), [0, 1000, 1000, 2000])
    assert [[*whole.files(*at)] for at in ((0, 1), (2, 3), (1, 5), (5, 8))] == [
        [0],
        [0],
        [0, 1, 2],
        [3],
    ]
    for text in (whole, whole.cut(2, 7, less=600), whole.cut(4, 8, less=1400)):
        for value in range(0, int(text[-1]), 50):
            assert bisect_right(text, value, *text.around(value)) == bisect_right(text[:], value)


def test_no_more_files_are_open_than_may_be(monkeypatch):
    monkeypatch.setattr(joined, "OPEN", 2)
    calls = []
    lengths = [3, 0, 4, 0, 0, 1, 2, 0]
    stops = np.cumsum(lengths)
    whole = np.arange(10, dtype="<u8")

    def part(k):
        calls.append(k)
        return whole[stops[k] - lengths[k] : stops[k]]

    stream = Joined(part, lengths, whole.dtype)
    few = Joined(part, lengths, whole.dtype, [100] * len(lengths))
    assert np.array_equal(few, whole + 100)
    for start in range(-11, 12):
        for stop in range(-11, 12):
            assert np.array_equal(stream[start:stop], whole[start:stop])
            assert np.array_equal(stream[start:stop:3], whole[start:stop:3])
    assert set(calls) == {0, 2, 5, 6} and len(calls) > 100
    assert [stream[i] for i in range(-10, 10)] == [*whole, *whole]
    with pytest.raises(IndexError):
        stream[10]


@pytest.mark.slow
def test_whatever_was_killed_is_made_again_to_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        lines = (json.dumps({"text": f"{name} {i} " * 400}) + "\n" for i in range(4000))
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))
    command = [sys.executable, str(DATA / "text" / "prepare.py"), f"--input={tmp_path / 'in'}"]
    command += ["--tokenizer=byte"]

    def start(out, *more):
        given = [*command, f"--out={tmp_path / out}", *more]
        return subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begin = time.monotonic()
    assert start("one").wait() == 0
    seconds = time.monotonic() - begin
    for out, folder, *more in (("again", "again"), ("many", "many/parts-2/0", "--part=0/2")):
        begun = False
        for moment in (0, random.random(), random.random()):  # which find files of earlier ones
            run = start(out, *more)
            while run.poll() is None and not [*tmp_path.glob(f"{folder}/train.bin.partial")]:
                time.sleep(0.005)
            time.sleep(0.7 * seconds * moment)
            run.kill()
            begun |= (
                run.wait() == -signal.SIGKILL and not (tmp_path / folder / "meta.json").exists()
            )
        assert begun
    # Of which two make one part, and two the whole: the one waits for the other.
    runs = [start("many", f"--part={i}/2") for i in (0, 1, 0)] + [start("again"), start("again")]
    assert [run.wait() for run in runs] == [0] * 5
    wrong = start("many", "--part=a/b")
    assert wrong.wait() == 2 and wrong.stderr.read().count("\n") == 1
    assert start("many", "--merge").wait() == 0
    one, again, many = (tmp_path / name for name in ("one", "again", "many"))
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, again)]
    assert contents[0] == contents[1] and len(contents[0]) == 5
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (one, many)]
    assert all(metas[0][split] == metas[1][split] for split in ("train", "val"))


@pytest.mark.slow
@pytest.mark.oracle
def test_ray_makes_the_same_of_three_nodes_of_which_one_is_killed(corpora, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    wait, killed = ray.wait, []

    def kill_one(waiting):
        done = wait(waiting)
        if not killed:  # once one part is made, and others are begun
            killed.append(cluster.remove_node(nodes[1], allow_graceful=False))
        return done

    monkeypatch.setattr(ray, "wait", kill_one)
    try:
        prepared(corpora, "../ray", f"--out={tmp_path / 'ray'}", "--engine=ray", "--parts=7")
        with pytest.raises(Mistake, match="holds parts of 7, not of 8"):
            prepared(corpora, "ray", f"--out={tmp_path / 'ray'}", "--engine=ray", "--parts=8")
    finally:
        cluster.shutdown()
    assert killed
    made, one = (
        json.loads((p / "meta.json").read_text()) for p in (tmp_path / "ray", corpora / "one")
    )
    assert made["train"] == one["train"] and made["val"] == one["val"]
