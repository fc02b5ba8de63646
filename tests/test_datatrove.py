"""What datatrove's DocumentTokenizer and its merger write is read as it is, or refused."""

import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tiny_run

from scalegpt import evaluate, generate, train
from scalegpt.config import BatchConfig
from scalegpt.data.batches import TrainBatches
from scalegpt.data.documents import DocumentText
from scalegpt.data.token_files import open_dataset, open_split, read_meta
from scalegpt.data.tokenizer import load
from scalegpt.errors import Mistake
from scalegpt.weights.tokenizer_files import named, trained

EOT = 50256
BYTES = trained({bytes([byte]): byte for byte in range(256)})  # its <|endoftext|> is 256
RANKS = [[30, 5, 1, 60], [], [7], [40] * 50]  # lengths of the documents of each rank


def written(folder, ranks=RANKS, said="gpt2|2", dtype="<u2", eot=EOT, name="_unshuffled"):
    """Documents in the layout of DocumentTokenizer, by hand; return all ids and their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, whole, total = np.random.default_rng(len(ranks)), [], 0
    for rank, lengths in enumerate(ranks):
        documents = [np.append(rng.integers(0, 250, n - 1), eot).astype(dtype) for n in lengths]
        file, ends = folder / f"{rank:05d}{name}.ds", np.cumsum(lengths, dtype="<u8")
        file.write_bytes(b"".join(document.tobytes() for document in documents))
        Path(f"{file}.index").write_bytes(ends.tobytes())
        Path(f"{file}.metadata").write_text(f"{said}\n{sum(lengths)}\n{sum(lengths)} T")
        whole, total = whole + documents, total + sum(lengths)
    return np.concatenate([np.array([], dtype), *whole]), np.cumsum(
        [len(document) for document in whole]
    )


def same_rows(dataset, tokens, ends):
    """Whether a run sees the same as of one file with these documents."""
    sources = [
        TrainBatches([text], [1.0], 16, 3, BatchConfig(sequences=8), 8, np.arange(8))
        for text in (
            DocumentText(dataset.train, dataset.train_ends, EOT, "key", True),
            DocumentText(tokens, ends, EOT, "key", True),
        )
    ]
    return all(np.array_equal(sources[0][step], sources[1][step]) for step in range(40))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_are_one_stream_whose_last_documents_are_for_validation(tmp_path, dtype):
    tokens, ends = written(tmp_path / "fw", said=f"gpt2|{dtype[-1]}", dtype=dtype)
    dataset = open_dataset(tmp_path / "fw")
    cut = len(tokens) - 40  # a 200th is 10 tokens, and the last document has 40
    assert dataset.tokenizer == {"kind": "gpt2"} and dataset.vocab_size == 50257
    assert dataset.train.dtype == dtype and dataset.val_bytes_per_token is None
    assert np.array_equal(dataset.train, tokens[:cut]) and np.array_equal(dataset.val, tokens[cut:])
    assert np.array_equal(dataset.train_ends, ends[:-1]) and np.array_equal(dataset.val_ends, [40])
    for start in range(0, cut, 13):  # across files and at the cut
        assert np.array_equal(dataset.train[start : start + 70], tokens[:cut][start : start + 70])
    assert [int(dataset.train_ends[i]) for i in (0, 3, 4, -1)] == [*ends[[0, 3, 4]], cut]
    assert same_rows(dataset, tokens[:cut], ends[:-1])
    assert np.array_equal(open_split(tmp_path / "fw", "val").tokens, tokens[cut:])
    assert named(str(tmp_path / "fw")).name == "gpt2"


def test_the_cut_may_lie_within_a_file_or_between_two(tmp_path):
    ranks = [[100] * 9, [500] + [2] * 3, [1] * 4]
    tokens, ends = written(tmp_path, ranks)
    dataset = open_dataset(tmp_path)
    n = len(dataset.train)
    assert len(tokens) - n == 8 and np.array_equal(dataset.val, tokens[n:])
    assert np.array_equal(dataset.val_ends, ends[ends > n] - n)
    assert dataset.val_ends[:].tolist() == [2, 4, 5, 6, 7, 8]


def test_sub_folders_are_the_splits(tmp_path):
    tokens, ends = written(tmp_path / "train")
    val = written(tmp_path / "val", [[9], [8, 8]])
    dataset = open_dataset(tmp_path)
    assert np.array_equal(dataset.train, tokens) and np.array_equal(dataset.train_ends, ends)
    assert np.array_equal(dataset.val, val[0]) and np.array_equal(dataset.val_ends, val[1])


def test_a_tokenizer_is_beside_the_files_or_in_the_cache_of_hugging_face(tmp_path, monkeypatch):
    special = [{**BYTES["added_tokens"][0], "id": 257, "content": "<|stop|>"}]
    content = {**BYTES, "added_tokens": BYTES["added_tokens"] + special}
    snapshot = tmp_path / "hub/models--owner--tok/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "hub/models--owner--tok/refs").mkdir()
    (tmp_path / "hub/models--owner--tok/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    written(tmp_path / "cached", said="owner/tok|2", eot=257)
    dataset = open_dataset(tmp_path / "cached")
    assert dataset.vocab_size == 258
    assert load(dataset.tokenizer).eot == 257  # as documents end, whatever a mark's name is
    written(tmp_path / "beside", said="/some/path/tokenizer.json|2", eot=256)
    (tmp_path / "beside/tokenizer.json").write_text(json.dumps(content))
    assert load(open_dataset(tmp_path / "beside").tokenizer).eot == 256
    written(tmp_path / "unmarked", said="owner/tok|2", eot=65)
    spec = open_dataset(tmp_path / "unmarked").tokenizer
    assert "eot" not in spec and load(spec).eot == 256


def test_a_bucket_is_copied_and_copies_of_what_it_has_no_more_go(tmp_path):
    tokens, _ = written(tmp_path / "fw")
    fs = fsspec.filesystem("memory")
    if fs.exists("/fw"):
        fs.rm("/fw", recursive=True)
    fs.put(f"{tmp_path / 'fw'}", "/fw", recursive=True)
    fs.put(f"{tmp_path / 'fw'}", "/fw/more", recursive=True)  # no split
    url, cache = "memory://fw", str(tmp_path / "cache")
    assert np.array_equal(open_dataset(url, cache).train, tokens[:-40])
    for end in ("", ".index", ".metadata"):
        fs.rm(f"/fw/00000_unshuffled.ds{end}")
    assert np.array_equal(open_dataset(url, cache).train, tokens[sum(RANKS[0]) : -40])
    fs.rm("/fw", recursive=True)
    fs.put(f"{tmp_path / 'fw'}", "/fw/train", recursive=True)
    fs.put(f"{tmp_path / 'fw'}", "/fw/val", recursive=True)
    assert np.array_equal(open_split(url, "val", cache).tokens, tokens)
    assert not [*Path(cache).glob("*/train/*")]  # evaluation copies what it reads
    assert np.array_equal(open_dataset(url, cache).train, tokens)
    fs.pipe_file("/fw/val/00000_unshuffled.ds.loss", b"x")
    with pytest.raises(Mistake, match=r"memory://fw/val/00000_unshuffled\.ds\.loss masks tokens"):
        open_dataset(url, cache)


def test_other_tokens_another_order_and_another_index_are_other_data(tmp_path):
    def marks():
        dataset = open_dataset(tmp_path)
        return dataset.fingerprint, dataset.index

    written(tmp_path)
    first, (file, ids) = marks(), (tmp_path / "00003_unshuffled.ds", [])
    assert marks() == first
    ids = np.fromfile(file, "<u2")
    ids[1000] += 1
    ids.tofile(file)
    assert marks()[0] != first[0] and marks()[1] == first[1]
    ids[1000] -= 1
    ids.tofile(file)
    assert marks() == first
    ends = np.fromfile(f"{file}.index", "<u8")
    ends[3] -= 1
    ends.tofile(f"{file}.index")
    assert marks()[0] == first[0] and marks()[1] != first[1]
    ends[3] += 1
    ends.tofile(f"{file}.index")
    for end in ("", ".index", ".metadata"):
        Path(f"{file}{end}").rename(tmp_path / f"00001_a.ds{end}")
    assert marks()[0] != first[0]


def without(name):
    return lambda folder: (folder / name).unlink()


def with_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def saying(text):
    def change(folder):
        for file in folder.glob("*.metadata"):
            file.write_text(text)

    return change


def moved(folder):
    (folder / "val").mkdir()
    for file in folder.glob("00003*"):
        file.rename(folder / "val" / file.name)


def resized(change):
    def changed(folder):
        file = folder / "00000_unshuffled.ds"
        file.write_bytes(change(file.read_bytes()))

    return changed


INDEX = "00000_unshuffled.ds.index"
OTHER = np.array([3, 2, 96], "<u8").tobytes()
BAD = {
    "no index": (without(INDEX), rf"unshuffled.ds has no {INDEX}, which .* with save_index=True"),
    "an odd size": (resized(lambda x: x[:-1]), "191 bytes, but by .* 96 tokens of 2 bytes each"),
    "a long index": (resized(lambda x: x[:-8]), "184 bytes, but by .* 96 tokens .* is cut short"),
    "an empty file": (resized(lambda x: b""), "0 bytes, but by .* 96 tokens"),
    "an empty index": (with_bytes(INDEX, b""), "192 bytes, but by .* 0 tokens"),
    "a cut index": (with_bytes(INDEX, b"123456789"), "9 bytes, no multiple of 8; copy both"),
    "an index out of order": (with_bytes(INDEX, OTHER), f"{INDEX} is out of order"),
    "another width": (saying("gpt2|4"), "192 bytes, but by .* 96 tokens of 4 bytes each"),
    "no metadata": (
        lambda folder: [file.unlink() for file in folder.glob("*.metadata")],
        r"does not say which tokenizer made it, as 00000_unshuffled.ds.metadata would: put that",
    ),
    "an unknown one": (saying("Unknown Tokenizer|2|2"), "does not say which tokenizer made it"),
    "a path": (saying("/a/tokenizer.json|2"), r"tokenizer /a/tokenizer.json: put its tokenizer"),
    "one elsewhere": (saying("an/other|2"), r"run `hf download an/other tokenizer.json`, or put"),
    "two tokenizers": (
        with_bytes("00002_unshuffled.ds.metadata", b"an/other|2"),
        r"00000_\w+.ds is of another tokenizer than 00002_\w+.ds, gpt2 and an/other: put them",
    ),
    "ids of others": (
        lambda folder: (folder / "tokenizer.json").write_text(json.dumps(BYTES)),
        "00000_unshuffled.ds: token 29 is 50256, outside the vocabulary of 257: put the token",
    ),
    "no tokenizer.json": (with_bytes("tokenizer.json", b"{}"), "not a Hugging Face tokenizer.json"),
    "masks": (with_bytes("00000_unshuffled.ds.loss", b"\1" * 96), "loss masks tokens from the los"),
    "a validation folder alone": (moved, "holds 00000_unshuffled.ds and val/00003_unshuffled.ds:"),
    "a shuffled copy": (
        lambda folder: written(folder, [[9]], name="_00000_doc_shuffled"),
        "00000_unshuffled.ds lies beside its shuffled copy, .* the text would be there twice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(tmp_path, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    change, message = BAD[name]
    written(tmp_path / "fw")
    change(tmp_path / "fw")
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with pytest.raises(Mistake, match=message) as raised:
        open_dataset(tmp_path / "fw")
    assert "\n" not in str(raised.value)
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))


def test_files_that_are_no_data_set_are_one_line(tmp_path):
    written(tmp_path / "empty", [[], []])
    with pytest.raises(Mistake, match="empty: its .ds files are empty; run datatrove again"):
        open_dataset(tmp_path / "empty")
    written(tmp_path / "one", [[], [50]])
    with pytest.raises(Mistake, match="one has too few documents to hold the last ones out"):
        open_dataset(tmp_path / "one")
    written(tmp_path / "half" / "train")
    written(tmp_path / "half" / "val", [[]])
    with pytest.raises(Mistake, match=r"half has no text in val/\*.ds: put some there"):
        open_dataset(tmp_path / "half")
    written(tmp_path / "wide", said="gpt2")  # of a datatrove that did not say the width
    written(tmp_path / "wide", [[9]], dtype="<u4", said="gpt2", name="_more")
    with pytest.raises(Mistake, match="ds, 2 bytes an id and 4 bytes an id: put them into two"):
        open_dataset(tmp_path / "wide")
    with pytest.raises(Mistake, match=f"read together: give {re.escape(str(tmp_path / 'one'))}$"):
        open_split(tmp_path / "one" / "00001_unshuffled.ds", "val")


def test_the_bins_of_nanogpt_beside_such_files_are_still_the_data(tmp_path):
    written(tmp_path)
    for split in ("train", "val"):
        np.arange(200, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    assert len(open_dataset(tmp_path).train) == 200


def test_a_meta_json_cannot_claim_to_be_datatroves(tmp_path):
    written(tmp_path)
    tiny_run.write_data(tmp_path / "data", tiny_run.TEXT)
    meta = json.loads((tmp_path / "data/meta.json").read_text()) | {"splits": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert type(read_meta(tmp_path)[0]) is dict
    with pytest.raises(Mistake, match="has no train.bin"):
        open_dataset(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What datatrove itself makes of three files, of which one is empty."""
    pytest.importorskip("datatrove", reason="what it writes, it writes itself")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    folder = tmp_path_factory.mktemp("datatrove")
    (folder / "tokenizer.json").write_text(json.dumps(BYTES))
    (folder / "in").mkdir()
    texts = [f"{i} is {i * i % 97}. " * (i % 5 + 1) for i in range(400)]
    for rank, some in enumerate((texts[:200], [], texts[200:])):
        lines = "".join(json.dumps({"text": text, "id": text}) + "\n" for text in some)
        (folder / "in" / f"{rank}.jsonl").write_text(lines)
    mark = {"eos_token": "<|endoftext|>"}
    made = str(folder / "tokenizer.json")
    LocalPipelineExecutor(
        [
            JsonlReader(str(folder / "in")),
            LambdaFilter(lambda document: len(document.text) > 20),
            DocumentTokenizer(str(folder / "plain"), made, shuffle_documents=False, **mark),
        ],
        tasks=4,
        workers=1,
        logging_dir=str(folder / "logs"),
    ).run()
    LocalPipelineExecutor(
        [
            JsonlReader(str(folder / "in")),
            DocumentTokenizer(str(folder / "shuffled"), made, seed=1, **mark),
        ],
        tasks=4,
        workers=1,
        logging_dir=str(folder / "logs of shuffled"),
    ).run()
    merger = DocumentTokenizerMerger(
        str(folder / "shuffled"), str(folder / "merged"), "texts", max_tokens_per_file=5000, seed=1
    )
    LocalPipelineExecutor([merger], logging_dir=str(folder / "logs of merged")).run()
    return folder, texts


def documents_of(dataset):
    """The texts of a data set's documents, in order."""
    codec, texts = load(dataset.tokenizer), []
    for tokens, ends in ((dataset.train, dataset.train_ends), (dataset.val, dataset.val_ends)):
        begins = [0, *(int(end) for end in ends)]
        for begin, end in zip(begins, begins[1:], strict=False):
            assert tokens[end - 1] == codec.eot
            texts.append(codec.decode(tokens[begin : end - 1]))
    return texts


@pytest.mark.slow
@pytest.mark.oracle
def test_what_datatrove_writes_is_read_and_trained_on(made, tmp_path, monkeypatch, capsys):
    folder, texts = made
    with pytest.raises(Mistake, match=f"tokenizer {folder}/tokenizer.json: put its tokenizer.json"):
        open_dataset(folder / "plain")
    for name in ("plain", "shuffled", "merged"):
        (folder / name / "tokenizer.json").write_text(json.dumps(BYTES))
    assert documents_of(open_dataset(folder / "plain")) == [x for x in texts if len(x) > 20]
    for name in ("shuffled", "merged"):
        found = documents_of(open_dataset(folder / name))
        assert found != texts and sorted(found) == sorted(texts)
    assert len([*(folder / "merged").glob("*.ds")]) > 2

    keys = {"data.shuffle": "documents", "data.document_mask": "true", "model.dropout": 0}
    argv = tiny_run.arguments(folder / "merged", tmp_path / "run", **keys)
    tiny_run.stop_after(monkeypatch, 7)
    assert train.main(argv) == 3
    tiny_run.stop_after(monkeypatch)
    other = argv[1:] + [f"--data.path={folder / 'shuffled'}"]
    with pytest.raises(Mistake, match="data.path: other tokens in shuffled"):
        train.main(other)
    assert train.main(argv) == 0
    losses = tiny_run.rows(tmp_path / "run", "val/loss")
    run = ["--run", str(tmp_path / "run"), "--checkpoint", "latest"]
    capsys.readouterr()
    assert evaluate.main([*run, "--windows", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(found["val/loss"] - losses[tiny_run.STEPS]) < 1e-6
    assert generate.main([*run, "--prompt", "7 is ", "--max-new-tokens", "4"]) == 0
    assert "7 is " in capsys.readouterr().out
