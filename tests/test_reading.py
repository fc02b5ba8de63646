"""Texts are read from Parquet and from URLs, in memory that no file decides on."""

import gzip
import tracemalloc
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import fsspec
import pytest
from test_prepare import bins, module, read

from scalegpt.data.prepare import Corpus, _batches
from scalegpt.data.tokenizer import load
from scalegpt.errors import Mistake
from scalegpt.files import parquet, text_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
TEXTS = ["first\r\n", "", "zwei \u00e4\u0000\ufeff", None, "<|endoftext|> \U0001f600", "last"] * 20


def table(path, key="text", values=TEXTS, **options):
    columns = {"id": range(len(values)), key: values, "score": [0.5] * len(values)}
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_lines_that_the_fast_parser_refuses_are_read_as_json_reads_them(tmp_path, packed):
    nested = "[" * 400 + "]" * 400  # pydantic's parser goes 200 deep
    lines = {
        '\ufeff {"text" : "first\\r\\u00e9\\ud83d\\ude00"}\r': "first\r\u00e9\U0001f600",
        '{"text": 1, "id": NaN, "text": "the last of two"}': "the last of two",
        f'{{"nested": {nested}, "text": "deep"}}': "deep",
        "\u00a0": None,
        '{"text": "half \\ud83d, \\ud83d\\ude00"}': "half \ufffd, \U0001f600",
        '{"text": ""}': None,
        '{"text": "\u00e4\0xff"}': "\u00e4\ufffd",
        '{"text": "' + "x" * (3 << 20) + '"}': "x" * (3 << 20),  # longer than a block
    }
    content = "\n".join(lines).encode().replace(b"\0xff", b"\xff")
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(content))
    found = list(read(module("text"), path, errors="replace"))
    assert found == [text for text in lines.values() if text is not None]
    for fault, message in (
        (b"\xff", "a.jsonl, line 3 is not UTF-8: byte 0xff; iconv .* --errors replace reads on"),
        (b"\\ud83d", "a.jsonl, line 3: .ud83d is half a surrogate pair"),
        (b'", "', "a.jsonl, line 3 is not JSON: Expecting ':' delimiter"),
    ):
        long = b'{"text": "%s"}\n' % (b"x" * (2 << 20))
        path.write_bytes(packed(long + b'\n{"text": "%s"}' % fault))
        rows = read(module("text"), path)
        assert len(next(rows)) == 2 << 20
        with pytest.raises(Mistake, match=message):
            next(rows)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_gives_the_texts_of_its_column_in_order(tmp_path, type_):
    path = table(tmp_path / "a", values=pa.array(TEXTS, type_), row_group_size=7)
    assert list(read(module("text"), path)) == [text for text in TEXTS if text]
    assert list(parquet.texts(path, "text", "strict")) == [text or "" for text in TEXTS]


def test_faults_of_parquet_are_named_before_anything_is_read(tmp_path):
    text, path = module("text"), tmp_path / "a.parquet"
    for make, message in (
        (lambda: table(path, key="body"), "no column 'text' among id, body, score; name the col"),
        (lambda: table(path, values=[1, 2]), "the column 'text' holds int64, no text; name the"),
        (lambda: table(path, values=[["a"]]), "holds list<.*, no text; name the column"),
        (lambda: path.write_bytes(table(path).read_bytes()[:-9]), "cannot read .*a.parquet: "),
        (lambda: path.write_bytes(b"PAR1"), "cannot read .*a.parquet: "),
    ):
        make()
        with pytest.raises(Mistake, match=message):
            text.kinds_of([table(tmp_path / "whole.parquet"), path], "text", False, "strict")
    # The footer is whole and what it speaks of is not.
    footer = pq.read_metadata(table(path, values=["some text"] * 9, use_dictionary=False))
    content, page = bytearray(path.read_bytes()), footer.row_group(0).column(1).data_page_offset
    content[page : page + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(Mistake, match="cannot read .*a.parquet: "):
        list(read(text, path))
    table(path, values=pa.array([b"good", b"\xff"], pa.binary()))
    with pytest.raises(Mistake, match="a.parquet, row 2 is not UTF-8: invalid start byte; --err"):
        list(read(text, path))
    assert list(read(text, path, errors="replace")) == ["good", "\ufffd"]


def test_a_small_parquet_of_long_texts_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_HELD", 1 << 20)
    monkeypatch.setattr(parquet, "MOST_HELD", 1 << 20)
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), ["a" * 1_000_000])
    path = table(tmp_path / "bomb", values=long, store_schema=False)
    assert path.stat().st_size < 1 << 17
    before = pa.total_allocated_bytes()
    rows, most = parquet.texts(path, "text", "strict"), 0
    for content in islice(rows, 40):
        assert len(content) == 1_000_000
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20e6
    table(path, values=["a" * (1 << 20) + "a"])
    with pytest.raises(Mistake, match="bomb, row 1 has more than 1,048,576 bytes"):
        next(parquet.texts(path, "text", "strict"))


def test_a_small_zstd_file_of_a_long_text_is_read_in_bounded_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "bomb.zst"
    packer = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(128)) + packer.flush())
    assert path.stat().st_size < 5000
    sizes = [len(block) for block in text_files.blocks(path)]
    assert sum(sizes) == 128 << 20 and max(sizes) < 40 << 20


@pytest.mark.parametrize("head, unit, message", [
    (b"", b"\0", "is UTF-16 text, or binary data, not UTF-8 text"),
    (b'{"text": "', b"word ", "has more than 1,048,576 .* without b?'.n', too many to be held"),
])  # fmt: skip
def test_a_small_gzip_of_what_has_no_end_is_refused_in_bounded_memory(
    tmp_path, monkeypatch, head, unit, message
):
    monkeypatch.setattr(text_files, "MOST_HELD", 1 << 20)
    path, member = tmp_path / "bomb.jsonl.gz", gzip.compress(unit * (1 << 20))
    path.write_bytes(gzip.compress(head) + member * 2000)  # 2 and 10 GB
    assert path.stat().st_size < 1e8
    text = module("text")
    tracemalloc.start()
    with pytest.raises(Mistake, match=message):
        list(read(text, path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_a_document_of_any_length_is_cut_in_bounded_memory():
    text, read_so_far = "some words of a document without an end\n" * 25_000, Counter()

    def chunks():
        for _ in range(5000):  # 5 GB, of which as much is read as is asked for
            read_so_far["chunks"] += 1
            yield text

    corpus = Corpus(load("byte"), [("train", chunks())], 1)
    tracemalloc.start()
    size = sum(len(piece) for batch in islice(_batches(corpus), 60) for _, piece, _ in batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 59e6 < size <= 1e6 * read_so_far["chunks"] < size + 4e6 and peak < 30e6


def test_urls_are_read_as_files_are(tmp_path):
    text, memory = module("text"), fsspec.filesystem("memory")
    local = {
        "b.txt.gz": gzip.compress(b"packed"),
        "deep/a.parquet": table(tmp_path / "a").read_bytes(),
        ".hidden/c.txt": b"hidden",
    }
    for name, content in local.items():
        memory.pipe(f"/corpus/{name}", content)
    packed, rows = "memory://corpus/b.txt.gz", "memory://corpus/deep/a.parquet"
    for pattern, files in (
        ("memory://corpus", [packed, rows]),
        ("memory://corpus/*.gz", [packed]),
        ("memory://corpus/**/*.parquet", [rows]),
    ):
        found = text_files.find_files(pattern)
        assert [name.replace(":///", "://") for name in found] == files
    for nothing in ("memory://nowhere", "memory://corpus/*.zip"):
        with pytest.raises(Mistake, match=f"no file, folder or pattern of files '{nothing[:12]}"):
            text_files.find_files(nothing)
    with pytest.raises(Mistake, match="cannot read nothing://x.*pip install"):
        text_files.find_files("nothing://x")
    args = ["--val-fraction", "0.6", "--tokenizer", "byte"]
    folder = tmp_path / "local"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt.gz", "deep/a.parquet"):
        (folder / name).write_bytes(local[name])
    for name, source in (("here", f"{folder}/**/*.*"), ("there", "memory://corpus/**/*.*")):
        text.main(["--input", source, "--out", str(tmp_path / name), *args])
    (here, meta), (there, _) = bins(tmp_path / "here"), bins(tmp_path / "there")
    assert all((here[split] == there[split]).all() for split in here)
    assert meta["train"]["documents"] + meta["val"]["documents"] == 1 + 4 * 20


@pytest.mark.parametrize("name", ["fineweb_edu", "climbmix"])
def test_published_sets_are_the_same_from_the_hub_and_from_a_local_copy(
    tmp_path, monkeypatch, capsys, name
):
    """The hub is faked: it lists and hands out small files in the layout of the set."""
    import huggingface_hub

    script, folder = module(name), {"fineweb_edu": "sample/10BT", "climbmix": ""}[name]
    (tmp_path / "hub" / folder).mkdir(parents=True)
    names = [f"{folder}/{i:03}_00000.parquet".lstrip("/") for i in range(4)]
    for i, file in enumerate(names):
        table(tmp_path / "hub" / file, values=[f"{i}: text {n}" for n in range(1000)])
    monkeypatch.setattr(script, "VALIDATION", 0.1, raising=False)
    asked = []

    def tree(self, repository, path, repo_type):
        assert (repository, path, repo_type) == (script.REPOSITORY, folder or None, "dataset")
        yield SimpleNamespace(path="README.md", size=1)
        for file in reversed(names):
            yield SimpleNamespace(path=file, size=(tmp_path / "hub" / file).stat().st_size)

    def hand_out(repository, file, repo_type):
        asked.append(file)
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hand_out)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    args = ["--tokenizer", "byte", "--files", "2", "--out"]
    script.main([*args, str(tmp_path / "there")])
    assert asked == [*([names[3]] if name == "climbmix" else []), *names[:2]]
    assert f"{script.REPOSITORY}: {len(asked)} files, 0.0" in capsys.readouterr().out
    script.main([*args, str(tmp_path / "here"), "--input", str(tmp_path / "hub")])
    (here, _), (there, meta) = bins(tmp_path / "here"), bins(tmp_path / "there")
    assert all((here[split] == there[split]).all() for split in here)
    texts = bytes(there["train"].astype("u1")).split(b"\0")
    assert set(texts) <= {b"", *(b"%d: text %d" % (i, n) for i in range(2) for n in range(1000))}
    if name == "climbmix":
        assert meta["train"]["documents"] == 2000 and meta["val"]["documents"] == 1000
        assert bytes(there["val"].astype("u1")).startswith(b"3: text 0\0")
    else:
        assert meta["train"]["documents"] + meta["val"]["documents"] == 2000
    with pytest.raises(Mistake, match="--files=0 must be 1 or more"):
        script.main(["--files", "0", "--out", str(tmp_path / "none")])

    def fails(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(Mistake, match="cannot download .*no network; start again, and what is"):
        script.main(["--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
