"""Token files against plain loops on real text: exact counts, order, packing, death half-way."""

import argparse
import bz2
import dataclasses
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock, Timeout

from scalegpt.config import command_line
from scalegpt.data import prepare, reading, token_files
from scalegpt.data.prepare import Corpus, write_dataset
from scalegpt.data.tokenizer import char_tokenizer, load
from scalegpt.files import text_files

FILES = ["meta.json", "train.bin", "train.idx", "val.bin", "val.idx"]
DATA = Path(__file__).resolve().parents[1] / "data"


def script(name, *args, **options):
    command = [sys.executable, str(DATA / name / "prepare.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def module(name):
    """The script as a module, for its functions."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", DATA / name / "prepare.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def bins(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return {s: np.fromfile(folder / f"{s}.bin", meta["dtype"]) for s in ("train", "val")}, meta


def split_at(ids, mark):
    """The documents of a token file, each without the mark that must end it."""
    assert ids[-1] == mark
    return [part[:-1].tolist() for part in np.split(ids, np.flatnonzero(ids == mark) + 1)[:-1]]


def is_unprepared(folder):
    return not {"train.bin", "val.bin", "meta.json"} & {p.name for p in folder.iterdir()}


@pytest.fixture(scope="module")
def shakespeare(shared_data):
    return shared_data / "tinyshakespeare/input.txt"


@pytest.fixture(scope="module")
def wiki(shared_data):
    """300 articles of Wikipedia."""
    with lzma.open(shared_data / "wiki_en.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(300), strict=False)]


@pytest.fixture(scope="module")
def wiki_jsonl(wiki, tmp_path_factory):
    path = tmp_path_factory.mktemp("wiki") / "wiki.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in wiki), encoding="utf-8")
    return path


def read(script, *paths, errors="strict", **options):
    kinds = script.kinds_of(paths, "text", options.pop("plain", False), errors)
    return script.read_documents(kinds, "text", errors, **options)


def corpus(texts, tokenizer="byte", **options):
    """A corpus whose last document is for validation."""
    splits = ["train"] * (len(texts) - 1) + ["val"]
    return Corpus(load(tokenizer), zip(splits, texts, strict=True), 1000, **options)


# --- the sets


def test_shakespeare_char_has_nanogpts_tokens(shakespeare, tmp_path):
    run = script("shakespeare_char", "--input", shakespeare, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    ids, meta = bins(tmp_path)
    text = shakespeare.read_text("utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert meta["vocab_size"] == 65 and meta["dtype"] == "uint16" and meta["format"] == 1
    assert (ids["train"].size, ids["val"].size) == (1_003_854, 111_540)
    assert np.concatenate([ids["train"], ids["val"]]).tolist() == [stoi[c] for c in text]
    assert load(meta["tokenizer"]).decode(ids["val"]) == text[1_003_854:]


def test_shakespeare_has_nanogpts_tokens_and_meta_describes_them(shakespeare, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    run = script("shakespeare", "--input", shakespeare, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    ids, meta = bins(tmp_path)
    text = shakespeare.read_text("utf-8")
    parts = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    assert (ids["train"].size, ids["val"].size) == (301_966, 36_059)
    for split, part in parts.items():
        assert ids[split].tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(part)
        assert meta[split] == {
            "tokens": ids[split].size,
            "bytes": len(part.encode()),
            "documents": 1,
            "max_id": int(ids[split].max()),
            "sha256": hashlib.sha256((tmp_path / f"{split}.bin").read_bytes()).hexdigest(),
            "index": hashlib.sha256((tmp_path / f"{split}.idx").read_bytes()).hexdigest(),
        }
        assert np.fromfile(tmp_path / f"{split}.idx", "<u8").tolist() == [ids[split].size]
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    again = script("shakespeare", "--input", shakespeare, "--out", tmp_path)
    assert again.returncode == 0 and "already prepared" in again.stdout
    other = script("shakespeare", "--input", tmp_path / "meta.json", "--out", tmp_path)
    assert other.returncode == 2 and "--force" in other.stderr


def test_a_download_is_checked_and_kept(shakespeare, tmp_path, monkeypatch):
    set_ = module("shakespeare")
    monkeypatch.setattr(set_, "URL", shakespeare.as_uri())
    assert set_.download(tmp_path / "input.txt") == shakespeare.read_bytes()
    monkeypatch.setattr(set_, "URL", "http://127.0.0.1:9/gone")
    assert set_.download(tmp_path / "input.txt") == shakespeare.read_bytes()
    with pytest.raises(
        ValueError, match="cannot get http://127.0.0.1:9/gone.*a copy of it as .*/other.txt"
    ):
        set_.download(tmp_path / "other.txt")
    (tmp_path / "wrong").write_text("an error page")
    monkeypatch.setattr(set_, "URL", (tmp_path / "wrong").as_uri())
    with pytest.raises(ValueError, match="sha256"):
        set_.download(tmp_path / "other.txt")
    assert not (tmp_path / "other.txt").exists()


def test_python_stdlib_needs_nothing_and_holds_out_whole_files(tmp_path):
    start = time.monotonic()
    runs = [  # two processes of one job that find the data missing at once
        subprocess.Popen(
            [sys.executable, str(DATA / "python_stdlib/prepare.py"), "--out", str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert time.monotonic() - start < 20
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("already prepared" in output for output in outputs) == [False, True]
    ids, meta = bins(tmp_path)
    texts = {s: bytes(ids[s].astype(np.uint8)).decode().removesuffix("\0").split("\0") for s in ids}
    root = Path(sysconfig.get_path("stdlib"))
    library = module("python_stdlib")
    names = library.source_files(root)
    assert {"os.py", "json/decoder.py"} <= {n.as_posix() for n in names}
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.parts)]
    assert len(texts["train"]) + len(texts["val"]) == len(names)
    contents = Counter((root / name).read_bytes() for name in names)
    copies = {content.decode() for content, count in contents.items() if count > 1}
    assert set(texts["train"]).isdisjoint(set(texts["val"]) - copies)
    assert (root / "os.py").read_text("utf-8") in texts["train"] + texts["val"]
    share = meta["val"]["bytes"] / (meta["val"]["bytes"] + meta["train"]["bytes"])
    assert 0.04 < share <= 0.051
    assert meta["val"]["bytes"] == meta["val"]["tokens"] == ids["val"].size  # NUL is a byte too


@pytest.mark.oracle
def test_openwebtext_is_nanogpts_split_and_tokens(wiki, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install 'scalegpt[data]'")
    tiktoken = pytest.importorskip("tiktoken")
    owt = module("openwebtext")
    texts = wiki * 10  # 3,000 documents, so that .0005 of them are 2
    dataset = datasets.Dataset.from_dict({"text": texts})
    meta = write_dataset(tmp_path, lambda: owt.corpus(load("gpt2"), dataset), "wiki", 0, False)
    bpe = tiktoken.get_encoding("gpt2")
    with pytest.raises(ValueError, match="--input has 1 of the two documents"):
        owt.corpus(load("gpt2"), dataset.select([0]))
    parts = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ids, _ = bins(tmp_path)
    for split, part in (("train", parts["train"]), ("val", parts["test"])):
        assert meta[split]["documents"] == len(part) == {"train": 2998, "val": 2}[split]
        encoded = {text: bpe.encode_ordinary(text) for text in set(part["text"])}
        expected = [i for text in part["text"] for i in [*encoded[text], 50256]]
        assert ids[split].tolist() == expected


@pytest.mark.oracle
def test_openwebtext_reads_local_parquet_as_jsonl(wiki, wiki_jsonl, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'scalegpt[data]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / ".cache"))
    datasets.Dataset.from_dict({"text": wiki}).to_parquet(tmp_path / "a.parquet")
    owt = module("openwebtext")
    for pattern in (str(tmp_path / "*.parquet"), str(tmp_path), str(wiki_jsonl)):
        assert list(owt.load_text(pattern, tmp_path)["text"]) == wiki
    (tmp_path / "a.md").write_text("text")
    for pattern, found in (("*.md", ["'.md'"]), ("*", ["'.md'", "'.parquet'"])):
        with pytest.raises(ValueError, match=f"found: .{', '.join(found)}.; say by a pattern"):
            owt.load_text(str(tmp_path / pattern), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["chat", "climbmix", "fineweb_edu", "openwebtext", "python_stdlib", "shakespeare", "text"],
)
def test_help_says_what_each_flag_means_and_its_default(name, monkeypatch):
    class Parsed(Exception):
        pass

    def refuse(parser, _):
        raise Parsed(parser)

    monkeypatch.setattr(command_line.Parser, "parse_args", refuse)
    with pytest.raises(Parsed) as parsed:
        module(name).main([])
    for action in parsed.value.args[0]._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, argparse.SUPPRESS):
            text = action.help % vars(action)
            assert "default" in text and str(action.default) in text, action.option_strings


# --- own text


def test_text_is_split_by_a_hash_and_tokenised_as_by_hand(wiki, wiki_jsonl, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("HOME", str(wiki_jsonl.parent))
    options = ("--val-fraction", 0.1, "--seed", 7, "--out", tmp_path)
    run = script("text", f"--input=~/{wiki_jsonl.name}", *options)
    assert run.returncode == 0, run.stderr
    ids, meta = bins(tmp_path)

    def to_val(text):
        digest = hashlib.blake2b(text[:65536].encode(), key=b"7", digest_size=8).digest()
        return int.from_bytes(digest, "big") < 0.1 * 2**64

    bpe = tiktoken.get_encoding("gpt2")
    for split, kept in (
        ("train", [t for t in wiki if not to_val(t)]),
        ("val", filter(to_val, wiki)),
    ):
        kept = list(kept)
        assert split_at(ids[split], 50256) == [bpe.encode_ordinary(t) for t in kept]
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in kept)
        assert meta[split]["documents"] == len(kept)
    assert 15 <= meta["val"]["documents"] <= 45
    assert meta["source"] == f"text --input={wiki_jsonl.resolve()} --val-fraction=0.1 --seed=7"


def test_packed_and_plain_and_reordered_text_is_the_same_data(wiki, wiki_jsonl, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    raw = wiki_jsonl.read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    frames = zstandard.ZstdCompressor().compress(raw[:half])
    frames += zstandard.ZstdCompressor().compress(raw[half:])
    packed = {
        "gz": gzip.compress(raw[:half]) + gzip.compress(raw[half:]),
        "xz": lzma.compress(raw),
        "bz2": bz2.compress(raw),
        "zst": frames,
    }
    text = module("text")
    for suffix, content in packed.items():
        path = tmp_path / f"wiki.jsonl.{suffix}"
        path.write_bytes(content)
        assert list(read(text, path)) == wiki, suffix
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(ValueError, match=f"cannot read .*wiki.jsonl.{suffix}"):
            list(read(text, path))
        path.unlink()
    folder = tmp_path / "plain" / "deep"
    folder.mkdir(parents=True)
    for i, article in enumerate(wiki):
        (folder / f"{(i * 7) % 300:03}.md").write_bytes(article.encode())
    (folder / ".hidden").write_bytes(b"\xff")
    sides = []
    for source in (wiki_jsonl, tmp_path / "plain", f"{tmp_path}/plain/**/*.md"):
        files = text_files.find_files(str(source))
        pairs = text.split_documents(lambda files=files: read(text, *files), 0.1, 0)
        sides.append({(split, "".join(chunks)) for split, chunks in pairs})
    assert sides[0] == sides[1] == sides[2] and len(sides[0]) == len(set(wiki))


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
def test_a_single_document_gives_its_end(shakespeare, tmp_path, tokenizer):
    options = ("--tokenizer", tokenizer, "--val-fraction", 0.25, "--out", tmp_path / "out")
    run = script("text", "--input", shakespeare, *options)
    assert run.returncode == 0, run.stderr
    assert ("use --tokenizer byte --force" in run.stdout) == (tokenizer == "gpt2")
    ids, meta = bins(tmp_path / "out")
    content = shakespeare.read_text("utf-8")
    cut = int(len(content) * 0.75)
    for split, part in (("train", content[:cut]), ("val", content[cut:])):
        mark = load(meta["tokenizer"]).eot
        found = ids[split] if mark is None else split_at(ids[split], mark)[0]
        assert load(meta["tokenizer"]).decode(found) == part
        assert meta[split]["bytes"] == len(part.encode()) + (tokenizer == "byte")


def test_validation_text_of_its_own(tmp_path):
    (tmp_path / "t.txt").write_text("to train")
    (tmp_path / "v.txt").write_text("to validate")
    run = script(
        *("text", "--input", tmp_path / "t.txt", "--val-input", tmp_path / "v.txt"),
        *("--tokenizer", "byte", "--out", tmp_path / "out"),
    )
    assert run.returncode == 0, run.stderr
    last = f"val: 12 tokens, 1 document\nread as plain text: 2 .txt, {tmp_path}/t.txt and 1 more\n"
    assert run.stdout.endswith(last)
    ids, _ = bins(tmp_path / "out")
    assert {s: bytes(i.tolist()) for s, i in ids.items()} == {
        "train": b"to train\0",
        "val": b"to validate\0",
    }


def test_a_tokenizer_json_is_kept_whole_in_meta(wiki, wiki_jsonl, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(wiki[:50], vocab_size=600, special_tokens=["</s>"])
    model.save(str(tmp_path / "mine.json"))
    options = ("--tokenizer", tmp_path / "mine.json", "--val-fraction", 0.1)
    run = script("text", "--input", wiki_jsonl, *options, "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    (tmp_path / "mine.json").unlink()
    ids, meta = bins(tmp_path / "out")
    texts = [load(meta["tokenizer"]).decode(t) for s in ids for t in split_at(ids[s], 0)]
    assert meta["vocab_size"] == 600 and sorted(texts) == sorted(wiki)


def test_bad_utf8_is_named_with_its_place_or_replaced(tmp_path):
    path = tmp_path / "bad.txt"
    offset = (1 << 20) + 1  # behind the first block read, whose end cuts a character in two
    path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode() + b"\xffb")
    text = module("text")
    with pytest.raises(
        ValueError, match=f"bad.txt is not UTF-8 text: byte 0xff at offset {offset}"
    ):
        "".join(next(read(text, path)))
    found = "".join(next(read(text, path, errors="replace")))
    assert found == "a" * ((1 << 20) - 1) + "é\ufffdb"
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800b"}')
    with pytest.raises(ValueError, match="half.jsonl, line 1"):
        list(read(text, tmp_path / "half.jsonl"))


def test_what_a_file_is_read_as_is_told_by_what_it_holds(tmp_path):
    text, rows = module("text"), '{"text": "one"}\n{"text": "two"}\n'
    for name, content, documents in (
        ("a.json", rows, ["one", "two"]),
        ("A.JSONL", rows, ["one", "two"]),
        ("a.json.gz", gzip.compress(rows.encode()), ["one", "two"]),
        ("packed.txt", lzma.compress(b"prose"), ["prose"]),
        ("plain.gz", "prose", ["prose"]),
        ("long.txt", '{"text": "' + "x" * (2 << 20) + '"}', ["x" * (2 << 20)]),
        ("marked.txt", "\ufeffprose \ufeff", ["prose \ufeff"]),
        ("marked.jsonl", "\ufeff" + rows, ["one", "two"]),
        ("brace.txt", "{a brace}\n", ["{a brace}\n"]),
        ("note.txt", "[Illustration]\n", ["[Illustration]\n"]),
        ("latin.csv", "caf\u00e9\0", ["caf\u00e9\0"]),
        ("README.md", "---\nlicense: mit\n---\n", ["---\nlicense: mit\n---\n"]),
        ("nothing.txt", "", []),
    ):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        assert ["".join(document) for document in read(text, path)] == documents, name
    path = tmp_path / "a.json"
    assert ["".join(document) for document in read(text, path, plain=True)] == [rows]
    kinds = {tmp_path / "a.jsonl.gz": reading.LINES, tmp_path / "b": reading.PLAIN}
    kinds |= {tmp_path / f"{i}.txt": reading.PLAIN for i in range(3)}
    assert [*text.summary(kinds)] == [
        f"read as plain text: 3 .txt, {tmp_path}/0.txt and 2 more",
        f"read as JSON lines: 1 .jsonl.gz, {tmp_path}/a.jsonl.gz",
        f"read as plain text: 1 without ending, {tmp_path}/b",
    ]


def test_what_is_no_text_is_refused_by_what_it_is_also_where_errors_are_replaced(tmp_path):
    text, archive, path = module("text"), io.BytesIO(), tmp_path / "a.txt"
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    for content, kind in (
        (gzip.compress(archive.getvalue()), "is a tar archive"),
        (gzip.compress(gzip.compress(b"text")), "is gzip"),
        (b"PK\x03\x04" + bytes(99), "is a zip archive"),
        (gzip.compress(b"PAR1\x15\x04"), "is Parquet"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG image"),
        ("text".encode("utf-16"), "is UTF-16 text"),
        ("text".encode("utf-32"), "is UTF-32 text"),
        ("text".encode("utf-16-be"), "is UTF-16 text, or binary data"),
        (np.arange(50_000, dtype="<u2").tobytes(), "is binary data"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b'{\n "cells": []\n}', "is JSON, but not one object a line"),
        (b'[\n {"text": "one"},\n {"text": "two"}]', "is JSON, but not one object a line"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.txt {kind}"):
            read(text, path, errors="replace")
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}')
    with pytest.raises(ValueError, match="a.json is JSON, but not one object a line.*--plain"):
        read(text, tmp_path / "a.json")
    path.write_bytes("na\u00efve text of Latin-1".encode("latin-1"))
    with pytest.raises(ValueError, match="byte 0xef at offset 2; iconv.*--errors replace"):
        read(text, path)
    assert "".join(*read(text, path, errors="replace")) == "na\ufffdve text of Latin-1"


def test_a_folder_of_several_kinds_is_refused_and_a_pattern_says_which_are_meant(tmp_path):
    text = module("text")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "empty.txt").touch()
    for name, content in (("a.txt", "prose"), ("b.jsonl", '{"text": "one"}')):
        (tmp_path / name).write_text(content)
        kinds = text.kinds_of(text_files.find_files(str(tmp_path)), "text", False, "strict")
        with pytest.raises(ValueError, match=f"README.md.*by a pattern, as '.*{name[1:]}', or"):
            text.check_one_kind(str(tmp_path), kinds)
    text.check_one_kind(str(tmp_path), text.kinds_of([*kinds], "text", True, "strict"))
    text.check_one_kind(str(tmp_path), text.kinds_of([*kinds][1:2], "text", False, "strict"))


def test_links_are_followed_and_lead_to_each_file_once(tmp_path):
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "far/deep/a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.txt").write_text("b")
    for name, target in {"far": "../far", "again": "../far", "up": ".", "c.txt": "b.txt"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in" / "up again").symlink_to(".")  # with two of them, glob takes for ever
    for pattern in ("in", "in/**/*.txt"):
        names = [path.name for path in text_files.find_files(str(tmp_path / pattern))]
        assert sorted(names) == ["a.txt", "b.txt"], pattern
    (tmp_path / "in/lost").symlink_to("nowhere")
    for pattern in ("in", "in/*"):
        with pytest.raises(ValueError, match="in/lost is a link that leads nowhere"):
            text_files.find_files(str(tmp_path / pattern))


@pytest.mark.parametrize("fraction, side", [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_split_that_would_be_empty_is_refused_with_a_fraction_that_works(fraction, side):
    text = module("text")
    for n in (2, 3, 10, 300):
        documents = [f"book {i}" for i in range(n)]
        with pytest.raises(ValueError, match=f"none of {n} documents goes to {side}") as error:
            text.split_documents(lambda d=documents: iter(d), fraction, 0)
        better = float(re.search("--val-fraction=([^ ]*) gives", str(error.value))[1])
        splits = Counter(s for s, _ in text.split_documents(lambda d=documents: iter(d), better, 0))
        assert splits["val" if side == "validation" else "train"] == 1 and splits.total() == n
    with pytest.raises(ValueError, match=f"goes to {side} by [^;]*: give .* by --val-input"):
        text.split_documents(lambda: iter(["same", "same"]), fraction, 0)
    with pytest.raises(ValueError, match="of length 1, is too short for --val-fraction"):
        text.split_documents(lambda: iter(["x"]), fraction, 0)


def test_a_separator_divides_plain_text(tmp_path, monkeypatch):
    text, mark = module("text"), "<|endoftext|>"
    for size in range(1, 40):
        chunks = [f"one\n{mark}\ntwo{mark}{mark}\n"[i : i + size] for i in range(0, 60, size)]
        assert [*text_files.parts(tmp_path, chunks, mark)] == ["one\n", "\ntwo", "", "\n"]
    with monkeypatch.context() as patch:
        patch.setattr(text_files, "MOST_HELD", 5)
        with pytest.raises(ValueError, match="has more than 5 characters without"):
            list(text_files.parts(tmp_path, ["ten of them", "and more"], mark))
    (tmp_path / "a.txt").write_text(f"one\n{mark}\ntwo{mark}{mark}\n")
    assert list(read(text, tmp_path / "a.txt", separator=mark)) == ["one", "two"]
    assert ["".join(d) for d in read(text, tmp_path / "a.txt")] == [f"one\n{mark}\ntwo{mark * 2}\n"]


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--input is missing"),
        (["--input", "nowhere.txt"], "'nowhere.txt'"),
        (["--input", "empty.txt"], "no text in empty.txt"),
        (
            ["--input", "a.jsonl", "--key", "body"],
            "line 1: nothing under --text-key 'body' in ['text']",
        ),
        (["--input", "null.jsonl"], "line 1: under --text-key 'text' is null, no text; leave such"),
        (["--input", "a.jsonl", "--tokenizer", "gpt5"], "'gpt5'"),
        (["--input", "a.jsonl", "--val-fraction", "1"], "between 0 and 1, got 1.0"),
        (["--input", "a.jsonl"], "none of 2 documents goes to validation by --val-fraction=0.005"),
        (["--input", "torn.jsonl"], "torn.jsonl, line 2 is not JSON"),
        (["--input", "torn.gz"], "cannot read torn.gz"),
        (["--input", "a.jsonl", "--val-input", "empty.txt"], "no text in empty.txt"),
        (["--input", "a.jsonl", "--out", "."], "--out . holds input files"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback(tmp_path, args, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}')
    (tmp_path / "torn.jsonl").write_text('{"text": "one"}\n{"te')
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"gzip" * 99)[:20])
    defaults = {"--out": "out", "--tokenizer": "byte"}
    more = [word for pair in defaults.items() if pair[0] not in args for word in pair]
    run = script("text", *args, *more, cwd=tmp_path)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: ") and message in run.stderr
    assert not (tmp_path / "out").exists() or is_unprepared(tmp_path / "out")


# --- the writer


@pytest.mark.slow
def test_workers_do_not_change_the_files(shakespeare, wiki, tmp_path):
    texts = [shakespeare.read_text("utf-8")[i:] for i in range(8)] + [*wiki, "", "end"]

    def build():
        splits = ("val" if i % 9 == 4 else "train" for i in range(len(texts)))
        return Corpus(load("gpt2"), zip(splits, texts, strict=True), 10**6)

    assert len(list(prepare._batches(build()))) > 5  # more than are encoded ahead
    metas = [write_dataset(tmp_path / str(n), build, "x", n, False) for n in (0, 2)]
    assert metas[0] == metas[1]
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_of_a_document_have_the_tokens_of_the_whole(shakespeare, size):
    """GPT-2's pieces may not be cut anywhere: white space looks ahead."""
    nasty = "a  b\n\n\nc \n d\t\te\u00a0 f\x1c g\u3000\n h's 'll   12 34\r\n\r\n  !?  x"
    nasty += " \u00a0" * 8 + "\ty"  # of these, several together are one token
    text = nasty + shakespeare.read_text("utf-8")[: 60 * size] + nasty
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    tokenizer = load("gpt2")
    pieces = list(prepare._pieces(chunks, tokenizer))
    assert "".join(piece for piece, _ in pieces) == text and len(pieces) > 3
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    whole = tokenizer.encode(text).tolist()
    assert np.concatenate([tokenizer.encode(piece) for piece, _ in pieces]).tolist() == whole
    assert np.concatenate([tokenizer.encode(chunk) for chunk in chunks]).tolist() != whole


def test_text_without_a_place_to_cut_is_encoded_in_linear_time_or_refused_by_size(monkeypatch):
    for tokenizer in (load("byte"), char_tokenizer("ACGT")):
        chunks = ["ACGT" * (1 << 18)] * 64  # looking through all that is held takes minutes
        pieces = [piece for piece, _ in prepare._pieces(chunks, tokenizer)]
        assert max(map(len, pieces)) == len(chunks[0]) and sum(map(len, pieces)) == 64 << 20
    whole = dataclasses.replace(load("byte"), piecewise=False)
    monkeypatch.setattr(prepare, "MOST_WHOLE", 1000)
    document = "ACGT" * (3 << 18) + " b"  # its one place to cut is far on
    corpus = SimpleNamespace(documents=[("train", document)], tokenizer=load("gpt2"))
    with pytest.raises(ValueError, match="more than 1,000 characters"):
        list(prepare._batches(corpus))
    monkeypatch.setattr(prepare, "MOST_WHOLE", 100)
    for tokenizer, chunk, where in (
        (load("gpt2"), "ACGT", " without a space or newline after a word"),
        (whole, "A C ", ","),
    ):
        assert len(list(prepare._pieces([chunk] * 25, tokenizer))) == 1
        with pytest.raises(ValueError, match=f"more than 100 characters{where}.*tokenizer byte"):
            list(prepare._pieces([chunk] * 26, tokenizer))


def test_a_document_stays_whole_for_a_tokenizer_that_cuts_unknown_ways():
    tokenizer = dataclasses.replace(load("byte"), piecewise=False)
    documents = [("train", iter(["one ", "two", " three"])), ("val", "four")]
    batches = list(prepare._batches(Corpus(tokenizer, documents, 1)))
    assert batches == [[("train", "one two three", True), ("val", "four", True)]]


def test_more_than_65536_ids_are_uint32(tmp_path):
    chars = "".join(map(chr, range(0x10000, 0x10000 + 65537)))
    for n, dtype in ((65536, "uint16"), (65537, "uint32")):
        documents = [("train", chars[:n]), ("val", chars[n - 1])]
        meta = write_dataset(
            *(tmp_path / dtype, lambda d=documents, c=chars[:n]: Corpus(char_tokenizer([c]), d, 9)),
            *("x", 0, False),
        )
        assert meta["dtype"] == dtype and meta["train"]["max_id"] == n - 1
        ids, _ = bins(tmp_path / dtype)
        assert ids["train"].tolist() == list(range(n)) and ids["val"].tolist() == [n - 1]


def test_without_separation_no_mark_is_set(tmp_path, capsys):
    write_dataset(tmp_path, lambda: corpus(["ab", "c", "d"], separate=False), "x", 0, False)
    ids, meta = bins(tmp_path)
    assert ids["train"].tolist() == [97, 98, 99] and meta["train"]["documents"] == 2
    assert "nothing separates" not in capsys.readouterr().out, "as it was asked for"
    for texts, told in ((["a", "b"], False), (["a", "b", "c"], True)):
        letters = corpus(texts, {"kind": "char", "chars": "abc"})
        write_dataset(tmp_path, lambda made=letters: made, f"{texts}", 0, True)
        assert ("nothing separates documents" in capsys.readouterr().out) == told


@pytest.mark.parametrize("spec", ["byte", {"kind": "char", "chars": "abcd"}])
def test_the_index_says_where_each_document_ends(tmp_path, spec):
    """Of documents in pieces, of batches, and of empty ones; what is damaged is made anew."""
    texts = ["ab" * 3, "d", "", "abcd", "c" * 700_000, "", "ba" * 400_000, "c"]

    def made():
        parts = [("val" if i % 2 else "train", iter([t[:2], t[2:]])) for i, t in enumerate(texts)]
        return Corpus(load(spec), parts, 1000)

    meta = write_dataset(tmp_path, made, "x", 0, False)
    opened, mark = token_files.open_dataset(tmp_path), int(spec == "byte")
    for split, ends in (("train", opened.train_ends), ("val", opened.val_ends)):
        parts = [text for i, text in enumerate(texts) if (i % 2 == 1) == (split == "val")]
        assert ends.dtype == "<u8" and meta[split]["documents"] == len(parts) == len(ends)
        assert ends.tolist() == np.cumsum([len(text) + mark for text in parts]).tolist()
        alone = token_files.open_split(tmp_path / f"{split}.bin", split)
        assert alone.ends.tolist() == ends.tolist()
    index = (tmp_path / "train.idx").read_bytes()
    for damaged, message in (
        (index[:-8], r"24 bytes but meta.json says 32"),
        (index[8:] + index[-8:], "train.idx is not the file that meta.json"),
    ):
        (tmp_path / "train.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            token_files.open_dataset(tmp_path)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(ValueError, match="has no train.idx; copy it"):
        token_files.open_dataset(tmp_path)
    assert write_dataset(tmp_path, made, "x", 0, False) == meta, "it was not whole"
    assert (tmp_path / "train.idx").read_bytes() == index
    del meta["train"]["index"], meta["val"]["index"]  # as earlier versions wrote it
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert token_files.open_dataset(tmp_path).train_ends is None
    assert token_files.open_dataset(tmp_path).fingerprint == opened.fingerprint


def test_what_is_there_is_kept_until_the_new_is_whole(tmp_path):
    first = write_dataset(tmp_path, lambda: corpus(["a", "b"]), "one", 0, False)
    assert write_dataset(tmp_path, pytest.fail, "one", 0, False) == first
    with pytest.raises(ValueError, match="holds 'one', not 'two'"):
        write_dataset(tmp_path, pytest.fail, "two", 0, False)

    def broken():
        yield "c" * (1 << 21)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        write_dataset(tmp_path, lambda: corpus([broken(), "d"]), "two", 0, True)
    assert bins(tmp_path)[1] == first and not list(tmp_path.glob("*.partial"))
    second = write_dataset(tmp_path, lambda: corpus(["c", "d"]), "two", 0, True)
    assert bins(tmp_path)[0]["train"].tolist() == [99, 0] and second["source"] == "two"
    with open(tmp_path / "train.bin", "ab") as file:
        file.write(b"\0")  # no longer what meta.json says
    assert write_dataset(tmp_path, lambda: corpus(["c", "d"]), "two", 0, False) == second
    assert (tmp_path / "train.bin").stat().st_size == 4


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_dying_between_renames_leaves_no_mixture(tmp_path, monkeypatch, renamed):
    write_dataset(tmp_path, lambda: corpus(["a", "b"]), "old", 0, False)
    replace, calls = os.replace, iter(range(9))

    def die(source, target):
        if next(calls) == renamed:
            raise OSError("killed here")
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="killed here"):
        write_dataset(tmp_path, lambda: corpus(["cc", "dd"]), "new", 0, True)
    bins_there = {p.name: p.stat().st_size for p in tmp_path.glob("*.bin")}
    assert not (tmp_path / "meta.json").exists()
    assert bins_there in ({"train.bin": 4}, {"train.bin": 6}, {"train.bin": 6, "val.bin": 6})


def test_too_little_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1999}))
    with pytest.raises(ValueError, match="2,000 bytes needed, 1,999 free"):
        write_dataset(tmp_path, lambda: corpus(["a", "b"]), "x", 0, False)
    assert is_unprepared(tmp_path) and "MB needed" in capsys.readouterr().out


KILLED = """
import multiprocessing, sys, time
from pathlib import Path
from scalegpt.data.prepare import Corpus, write_dataset
from scalegpt.data.tokenizer import load

def documents():
    for i in range(1000):
        if i == 20:
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            time.sleep(60)
        yield "val" if i % 5 else "train", "text " * 100_000

if __name__ == "__main__":
    write_dataset(Path("out"), lambda: Corpus(load("byte"), documents(), 1000), "x", 2, False)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states in /proc")
def test_fault_24_a_killed_preparation_leaves_nothing_whole_and_no_workers(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen(
        [sys.executable, "killed.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    run.stdout.readline()  # disk
    workers = [int(pid) for pid in run.stdout.readline().split()]
    out = tmp_path / "out"
    assert len(workers) == 2 and (out / "train.bin.partial").stat().st_size > 0
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert is_unprepared(out)

    def lives(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    deadline = time.monotonic() + 10
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    write_dataset(out, lambda: corpus(["a", "b"]), "x", 0, False)
    assert sorted(p.name for p in out.iterdir()) == FILES


def test_who_waits_for_a_lock_that_is_removed_makes_it_anew(tmp_path, monkeypatch):
    """`_only_writer` removes the file of its lock, and relies on this property of filelock."""
    path, flock = tmp_path / "lock", fcntl.flock
    first, second, third = (FileLock(path, timeout=seconds) for seconds in (0, 10, 0))
    first.acquire()
    with pytest.raises(Timeout):
        third.acquire()

    def removed_meanwhile(*arguments):  # `second` has opened the file, and does not hold it yet
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        first.release()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    second.acquire()
    assert path.exists()
    with pytest.raises(Timeout):
        third.acquire()
    second.release()
    third.acquire()
