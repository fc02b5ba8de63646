"""A tokenizer is trained on text: exact, the same each time, and read by all that reads one."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken

from scalegpt.data.fast_encoding import faster
from scalegpt.data.tokenizer import BYTES
from scalegpt.errors import Mistake
from scalegpt.weights.tokenizer_files import GPT4_WORDS, named, tokenizer_files

pytest.importorskip("rustbpe")
TEXT = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def script():
    path = TEXT.parent / "data/text/train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    o200k = tiktoken.Encoding("o200k_base", pat_str=r"(?s).", mergeable_ranks=bytes_alone,
                              special_tokens={"<|endoftext|>": 256})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # OpenAI's is a download
        patch.setitem(tiktoken.registry.ENCODINGS, "o200k_base", o200k)
        yield module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """A tokenizer of 400 ids of the README's text, in the folder where it was trained twice."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("tok", "again"):
        args = ["--input", str(TEXT), "--vocab-size", "400", "--out", str(folder / name)]
        assert script.main(args) == 0
    return folder


def test_each_merge_is_of_a_most_frequent_pair(folder):
    """The merges are replayed over the words of the text, and its pairs are counted each time."""
    content = json.loads((folder / "tok/tokenizer.json").read_text())
    words = Counter(
        tuple(BYTES[b] for b in word.encode())
        for word in regex.findall(GPT4_WORDS, TEXT.read_text())
    )
    assert len(content["model"]["merges"]) == 400 - 256 - 8
    for left, right in content["model"]["merges"]:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        assert pairs[left, right] == max(pairs.values())
        merged = Counter()
        for word, count in words.items():
            parts, i = [], 0
            while i < len(word):
                both = word[i : i + 2] == (left, right)
                parts.append(left + right if both else word[i])
                i += 2 if both else 1
            merged[tuple(parts)] += count
        words = merged


def test_the_files_are_the_same_each_time_and_leave_room_for_a_chats_marks(folder):
    first, second = (folder / name for name in ("tok", "again"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    tokenizer = named(str(first))
    assert tokenizer.eot == 392 and tokenizer.vocab_size == 393
    assert tokenizer.chat().vocab_size == 400
    text = "It's <|endoftext|> \u00e4\r\n\r\n  12345 \U0001f600!\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
    pytest.importorskip("gigatoken")
    assert "encoded by gigatoken" in faster(tokenizer, [TEXT.read_text()], 1)[1]


def test_transformers_reads_it_and_so_does_what_is_exported(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "tok")
    ours, text = named(str(folder / "tok")), TEXT.read_text()
    assert theirs.encode(text) == ours.encode(text).tolist()
    assert theirs.eos_token_id == ours.eot
    exported = tokenizer_files(ours.spec(), 1024)["tokenizer.json"]
    trained = json.loads((folder / "tok/tokenizer.json").read_text())
    assert exported == trained


@pytest.mark.parametrize(
    "args, message",
    [
        (["--vocab-size", "256"], "--vocab-size=256 must be at least 265: 256 bytes, 8 marks"),
        (["--input", "empty.txt"], "no text in empty.txt"),
        (["--input", "nowhere.txt"], "'nowhere.txt'"),
        (["--out", "there"], "--out .*there is there: choose a new folder, or remove it"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    script, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("empty.txt").touch()
    Path("a.txt").write_text("some text")
    monkeypatch.setattr(script, "learned", None)
    with pytest.raises(Mistake, match=message):
        defaults = {"--input": "a.txt", "--out": "tok"}
        more = [word for pair in defaults.items() if pair[0] not in args for word in pair]
        script.main([*args, *more])
    assert not Path("tok").exists()


def test_text_of_few_words_gives_fewer_ids_and_that_is_told(script, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaaa bbbb")
    script.main(["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "tok")])
    missing = 32768 - 7 - named(str(tmp_path / "tok")).vocab_size
    assert missing > 32000
    assert f"{missing:,} ids less than --vocab-size" in capsys.readouterr().out


def test_the_table_compares_with_what_tiktoken_has_at_hand(script, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("aaaa \u00e4bbb")
    args = ["--input", str(tmp_path / "a.txt"), "--out"]
    script.main([*args, str(tmp_path / "tok")])
    head, row = capsys.readouterr().out.splitlines()[-3:-1]
    values = dict(zip(head.split()[3:], row.split()[1:], strict=True))
    assert values["o200k_base"] == "1.000" and float(values["this"]) > 1

    def none_there(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", none_there)
    script.main([*args, str(tmp_path / "again")])
    out = capsys.readouterr().out
    for name in ("gpt2", "o200k_base"):
        assert f"not compared with {name}: no {name} files for tiktoken (ConnectionErr" in out
    assert out.splitlines()[-3].split() == ["bytes", "a", "token", "this"]
