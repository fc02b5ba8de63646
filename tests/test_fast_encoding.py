"""gigatoken encodes only where it gives the ids of tiktoken and tokenizers."""

import json

import numpy as np
import pytest

from scalegpt.data import fast_encoding, prepare
from scalegpt.data.fast_encoding import by_gigatoken, by_itself, faster
from scalegpt.data.prepare import Corpus
from scalegpt.data.tokenizer import load
from scalegpt.weights.tokenizer_files import tokenizer_files

TEXTS = ["", "It's <|endoftext|> <|mark|>", "\0\r\n\ufeff ", "\u00e4 \U0001f600 123", "a" * 9999]


def spec(**changes):
    """The tokenizer.json of GPT-2, with changes of what it has."""
    content = tokenizer_files("gpt2", 1024)["tokenizer.json"] | changes
    return {"kind": "tokenizer.json", "name": "a.json", "json": content}


@pytest.mark.parametrize("kind", ["gpt2", "tokenizer.json"])
def test_gigatoken_gives_the_ids_of_the_reference(kind, gpt2_tokenizer, shared_data):
    pytest.importorskip("gigatoken")
    tokenizer = load("gpt2" if kind == "gpt2" else json.loads(json.dumps(spec())))
    prose = (shared_data / "tinyshakespeare/input.txt").read_text()
    texts = [*TEXTS, *prose.split("\n\n"), *(["half \ud800 "] if kind == "gpt2" else [])]
    encode, said = faster(tokenizer, texts[:9], 1)
    assert "encoded by gigatoken, which gave the ids of tik" in said or "of tokenizers for" in said
    for (ids, ends), (expected, expected_ends) in (
        (encode(texts), by_itself(load("gpt2"))(texts)),
        (encode([]), by_itself(tokenizer)([])),
    ):
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(ends, expected_ends)


@pytest.mark.parametrize("spec", ["byte", {"kind": "char", "chars": "".join(map(chr, range(999)))}])
def test_bytes_and_characters_encoded_at_once_are_those_of_each_text(spec):
    tokenizer, texts = load(spec), ["", "\0\r\n", "\u00e4 123", "", "a" * 99, "\u0101"]
    ids, ends = by_itself(tokenizer)(texts)
    parts = np.split(ids, ends)
    assert [part.tolist() for part in parts] == [
        *(tokenizer.encode(text).tolist() for text in texts),
        [],
    ]
    assert [part.size for part in by_itself(tokenizer)([])] == [0, 0]


def test_one_id_that_differs_keeps_the_reference_and_is_told(gpt2_tokenizer, monkeypatch, capsys):
    pytest.importorskip("gigatoken")
    tokenizer = load("gpt2")

    def unequal(tokenizer, threads):
        encode = by_gigatoken(tokenizer, threads)
        return lambda texts: encode([text.replace("rare", "Rare") for text in texts])

    monkeypatch.setattr(fast_encoding, "by_gigatoken", unequal)
    assert faster(tokenizer, ["some words"], 1)[0]
    documents = [("train", "some rare words"), ("val", "more")]
    corpus = Corpus(tokenizer, documents, 20)
    rows = [*prepare._encoded(corpus, np.dtype("<u2"), 0)]
    assert rows[0][1].tolist() == [*tokenizer.encode("some rare words"), tokenizer.eot]
    assert "encoded by tiktoken: gigatoken gives other ids for 'some rare words'" in (
        capsys.readouterr().out
    )


def test_without_gigatoken_or_with_what_it_cannot_read_the_reference_encodes(
    gpt2_tokenizer, monkeypatch
):
    pytest.importorskip("gigatoken")
    assert faster(load("byte"), ["text"], 1) == (None, "")
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    encode, said = faster(load(spec(model=words, added_tokens=[])), ["a"], 1)
    assert encode is None and "encoded by tokenizers: gigatoken " in said
    monkeypatch.setattr(fast_encoding, "find_spec", lambda name: None)
    encode, said = faster(load("gpt2"), ["text"], 1)
    assert encode is None and "encoded by tiktoken; pip install 'scalegpt[data]' brings gig" in said
