"""Tokenizers against second implementations: tiktoken itself, dictionaries, Python's codecs."""

import hashlib
import json
import lzma
import os
import subprocess
import sys

import numpy as np
import pytest

from scalegpt.data import prepare
from scalegpt.data.chat import encode_conversation, encode_prompt
from scalegpt.data.tokenizer import (
    MARKS,
    char_tokenizer,
    check,
    is_chat_of,
    kind,
    load,
    read_json,
    same,
)
from scalegpt.weights.tokenizer_files import named

UNICODE = (
    "naïve façade — Ελλάδα 漢字かな 🙂👩‍👩‍👧 e\u0301\r\n\t  x  \u00a0\u3000 y<|endoftext|>z\n\n\n"
)
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@pytest.fixture(scope="module")
def wiki(shared_data):
    """200 articles of Wikipedia."""
    with lzma.open(shared_data / "wiki_en.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]


@pytest.fixture(scope="module")
def bpe(shared_data):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def tokenizer_json(shared_data, tmp_path_factory):
    """GPT-2's vocabulary and merges as a Hugging Face tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")

    def cached(name):
        return (
            shared_data / "tiktoken_cache" / hashlib.sha1((GPT2_FILES + name).encode()).hexdigest()
        )

    vocab = json.loads(cached("encoder.json").read_text("utf-8"))
    merges = [tuple(m.split(" ")) for m in cached("vocab.bpe").read_text("utf-8").split("\n")[1:-1]]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>"])
    model.enable_truncation(8)  # what a file may ask for, and data must not suffer
    model.enable_padding(length=8)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    path.write_text(model.to_str(), encoding="utf-8")
    return path


def all_kinds(tokenizer_json):
    return [load("gpt2"), load("byte"), char_tokenizer([UNICODE]), named(str(tokenizer_json))]


def test_gpt2_is_tiktokens(wiki, bpe):
    tokenizer = load("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("gpt2", 50257, 50256)
    for text in [UNICODE, "", *wiki]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == bpe.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert 50256 not in tokenizer.encode(UNICODE)


@pytest.mark.parametrize("text", [UNICODE, "<|endoftext|>", "<|endoftext|><|endoftext|>a", "", "a"])
def test_prompt_of_gpt2_is_tiktokens_with_special_tokens(text, bpe):
    expected = bpe.encode(text, allowed_special="all")
    assert load("gpt2").encode_prompt(text).tolist() == expected


def test_prompt_without_an_eot_is_plain_text():
    tokenizer = char_tokenizer(["<|endoftext|>"])
    assert tokenizer.encode_prompt("<|endoftext|>").tolist() == [
        sorted(set("<|endoftext|>")).index(c) for c in "<|endoftext|>"
    ]
    assert load("byte").encode_prompt("a<|endoftext|>b").tolist() == [97, 0, 98]


def test_byte_is_utf8(wiki):
    tokenizer = load("byte")
    assert (tokenizer.vocab_size, tokenizer.eot) == (256, 0)
    for text in [UNICODE, "", *wiki]:
        assert tokenizer.encode(text).tolist() == list(text.encode("utf-8"))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_of_partial_utf8_is_the_replacement_character(bpe):
    cut = "é🙂".encode()[:-1]
    assert load("byte").decode(list(cut)) == "é\ufffd"
    half = load("gpt2").encode("🙂")[:1]
    assert load("gpt2").decode(half) == bpe.decode(half.tolist()) == "\ufffd"


def test_the_bytes_of_ids_are_those_of_the_text_and_a_mark_has_none(bpe, tokenizer_json):
    for codec in all_kinds(tokenizer_json):
        ids = codec.encode(UNICODE).tolist()
        assert b"".join(map(codec.bytes_of, ids)) == UNICODE.encode()
        assert {codec.chat().bytes_of(id_) for id_ in codec.chat().marks.values()} == {b""}
    falls_back = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = {"type": "BPE", "vocab": falls_back, "merges": [], "byte_fallback": True}
    spec = {"kind": "tokenizer.json", "name": "x", "json": {"model": model}}
    spec["json"] |= {"added_tokens": [], "decoder": {"type": "ByteFallback"}}
    assert load(spec).bytes_of(0xC3) == b"\xc3"


def test_char_is_a_dictionary(shared_data):
    text = (shared_data / "tinyshakespeare/input.txt").read_text("utf-8")
    tokenizer = char_tokenizer(text[i : i + 1000] for i in range(0, len(text), 1000))
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert tokenizer.vocab_size == 65 and tokenizer.eot is None
    assert tokenizer.encode(text[:50_000]).tolist() == [stoi[c] for c in text[:50_000]]
    assert tokenizer.decode(tokenizer.encode(text[:50_000])) == text[:50_000]


@pytest.mark.parametrize(
    "text, named", [("ab~", "'~' (U+007E)"), ("🙂a", "'🙂' (U+1F642)"), ("a\x00", "'\\x00'")]
)
def test_char_names_an_unknown_character(text, named):
    with pytest.raises(ValueError) as error:
        char_tokenizer(["abc"]).encode(text)
    assert named in str(error.value)


def test_char_refuses_an_empty_or_double_vocabulary():
    for chars in ("", "aba"):
        with pytest.raises(ValueError, match="distinct"):
            load({"kind": "char", "chars": chars})


def test_tokenizer_json_of_gpt2_is_tiktokens(tokenizer_json, wiki, bpe):
    tokenizer = named(str(tokenizer_json))
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.piecewise) == (50257, 50256, True)
    for text in [UNICODE, "", *wiki[:50]]:
        assert tokenizer.encode(text).tolist() == bpe.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "\n".join([UNICODE, *wiki[:50]])
    pieces = prepare._pieces([text[i : i + 99] for i in range(0, len(text), 99)], tokenizer)
    ids = [tokenizer.encode(piece) for piece, _ in pieces]
    assert len(ids) > 100 and np.concatenate(ids).tolist() == bpe.encode_ordinary(text)
    assert tokenizer.encode_prompt(UNICODE).tolist() == bpe.encode(UNICODE, allowed_special="all")
    assert tokenizer.decode([50256, 64]) == "<|endoftext|>a"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"added_tokens": [{"id": 0, "content": "x y", "special": False}]},
    ],
)
def test_a_tokenizer_that_cuts_text_otherwise_than_gpt2_gets_it_whole(tokenizer_json, changes):
    spec = named(str(tokenizer_json)).spec()
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for added in changes.get("added_tokens", []):
        added |= token
    assert not load({**spec, "json": {**spec["json"], **changes}}).piecewise


def test_a_spec_makes_the_same_tokenizer_without_its_file(tokenizer_json, tmp_path):
    copy = tmp_path / "mine.json"
    copy.write_bytes(tokenizer_json.read_bytes())
    tokenizers = [*all_kinds(tokenizer_json)[:3], named(str(copy))]
    copy.unlink()
    for tokenizer in tokenizers:
        again = load(json.loads(json.dumps(tokenizer.spec())))
        for field in ("name", "vocab_size", "eot", "piecewise"):
            assert getattr(again, field) == getattr(tokenizer, field)
        assert again.spec() == tokenizer.spec()
        np.testing.assert_array_equal(again.encode(UNICODE), tokenizer.encode(UNICODE))
        assert again.decode(again.encode(UNICODE)) == UNICODE


def test_decode_refuses_an_id_outside_the_vocabulary(tokenizer_json):
    for tokenizer in all_kinds(tokenizer_json):
        for bad in (-1, tokenizer.vocab_size, 50303 + tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"token id {bad} is outside"):
                tokenizer.decode([0, bad])
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("spec", ["gpt3", "char", "", {"kind": "char"}, {"vocab": 3}, {}])
def test_load_refuses_what_it_does_not_know(spec):
    with pytest.raises(ValueError, match="no tokenizer .*gpt2, byte"):
        load(spec)


def test_load_names_a_file_that_is_no_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    for content in ("{}", "not JSON", '{"model": 3}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match="t.json is not (a Hugging Face tokenizer.json|JSON)"):
            named(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="no tokenizer .*none'.* a run, a data set or a model"):
        named(str(tmp_path / "none"))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"scalegpt\[data\]"):
        named(str(tmp_path / "t.json"))


def test_gpt2_without_cache_or_network_says_what_to_do(tmp_path):
    code = (
        "from scalegpt.data.tokenizer import load\n"
        "try: load('gpt2')\nexcept ValueError as e: print(e)"
    )
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | nowhere, capture_output=True, text=True
    )
    assert run.returncode == 0 and "TIKTOKEN_CACHE_DIR" in run.stdout, run.stderr


def test_importing_loads_no_tokenizer_package_and_no_jax():
    code = (
        "import sys, scalegpt.data.tokenizer, scalegpt.data.prepare\n"
        "print(sorted({'tiktoken', 'tokenizers', 'datasets', 'jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_within_a_smaller_model_text_that_needs_another_id_is_refused():
    codec = load({"kind": "byte"}).within(100)
    assert codec.encode("AZ0").tolist() == [65, 90, 48]
    assert (codec.vocab_size, codec.eot) == (100, 0)
    with pytest.raises(ValueError, match="byte gives id 122 for 'AZz', but the model has only 100"):
        codec.encode("AZz")


# --- marks of a chat

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}]


@pytest.mark.parametrize(
    "name, bos, ids",
    [
        ("gpt2", 50256, [50256, 50258, 17250, 50260, 50259, 17250, 0, 50260]),
        ("byte", 0, [0, 257, 72, 105, 259, 258, 72, 105, 33, 259]),
        ("char", 3, [3, 5, 1, 2, 7, 6, 1, 2, 0, 7]),
        ("words", 0, [0, 4, 1, 6, 5, 1, 2, 6]),
    ],
)
def test_a_chat_has_its_marks_after_the_ids_of_the_text(name, bos, ids, gpt2_tokenizer):
    words = {"[EOS]": 0, "Hi": 1, "!": 2}
    mark = {"id": 0, "content": "[EOS]", "special": True, "single_word": False, "lstrip": False}
    file = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "!"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [mark | {"rstrip": False, "normalized": False}],
    }
    specs = {"char": {"kind": "char", "chars": "!Hi"}}
    specs["words"] = {"kind": "tokenizer.json", "name": "t", "json": file}
    base = load(specs.get(name, name))
    codec = base.chat()
    assert codec.chat() is codec and codec.encode("Hi!").tolist() == base.encode("Hi!").tolist()
    first = base.vocab_size + (base.eot is None)
    names = ("system", "user", "assistant", "end", "call", "result", "back")
    assert codec.marks == {"bos": bos} | {n: first + i for i, n in enumerate(names)}
    assert (codec.vocab_size, codec.eot, codec.end) == (first + 7, bos, codec.marks["end"])
    signed = encode_conversation(codec, MESSAGES)
    assert ids == np.where(signed < 0, ~signed, signed).tolist()
    learned = len(codec.encode("Hi!")) + 1
    assert (signed[:-learned] < 0).all() and (signed[-learned:] >= 0).all()
    assert encode_prompt(codec, MESSAGES[:1]).tolist() == ids[:-learned]
    answer = base.decode(base.encode("Hi!"))
    assert codec.decode(ids) == f"Hi{answer}"
    shown = f"<|bos|><|user|>Hi<|end|><|assistant|>{answer}<|end|>"
    assert codec.decode(ids, marks=True) == shown
    assert codec.decode([]) == "" and base.marks == {} and base.end == base.eot


@pytest.mark.parametrize("name", ["gpt2", "byte", "char", "tokenizer.json"])
def test_text_that_spells_a_mark_never_becomes_it(name, tokenizer_json):
    text = "".join(f"<|{mark}|>" for mark in MARKS) + "<|endoftext|>"
    base = named(str(tokenizer_json)) if name == "tokenizer.json" else None
    codec = (base or (char_tokenizer([text]) if name == "char" else load(name))).chat()
    assert not {*codec.encode(text).tolist()} & {*codec.marks.values()}
    assert codec.decode(codec.encode(text)) == text
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids = encode_conversation(codec, messages)
    assert (np.where(ids < 0, ~ids, ids) == codec.marks["end"]).sum() == 2
    if name == "byte":
        with pytest.raises(ValueError, match="'a.x00b' holds '.x00', which begins a chat"):
            codec.encode("a\0b")


def test_what_is_learned_of_a_conversation_is_what_the_assistant_writes():
    codec = load("byte").chat()
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "12/60?"},
        {"role": "assistant", "content": ["is ", {"call": "12/60", "result": "0.2"}, "0.2"]},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "é"},
    ]

    def learned(messages, train="all"):
        ids = encode_conversation(codec, messages, train)
        assert ids.dtype == np.int32 and (ids == ~0).tolist() == [True] + [False] * (len(ids) - 1)
        return codec.decode(ids[ids >= 0], marks=True), len(ids)

    first = "is <|call|>12/60<|result|>0.2<|end|>"
    assert learned(messages) == (first + "é<|end|>", 38)
    assert learned(messages, "last") == ("é<|end|>", 38)
    messages[4]["weight"] = 0
    assert learned(messages) == (first, 38) and learned(messages, "last") == ("", 38)
    whole = encode_conversation(codec, messages)
    prompt = encode_prompt(codec, messages[:4])
    assert prompt.tolist() == np.where(whole < 0, ~whole, whole)[: len(prompt)].tolist()


def test_specs_of_chats_are_compared_checked_and_limited(tokenizer_json):
    for base in (load("byte"), char_tokenizer([UNICODE])):
        codec = base.chat()
        spec = codec.spec()
        assert spec == {"kind": "chat", "base": base.spec()}
        assert same(spec, json.loads(json.dumps(spec))) and not same(spec, base.spec())
        assert is_chat_of(spec, base.spec()) and not is_chat_of(base.spec(), base.spec())
        assert kind(spec) == f"{kind(base.spec())} with marks of a chat"
        limited = codec.within(base.vocab_size)
        assert limited.marks == {} and limited.vocab_size == base.vocab_size
    gpt2_file = {"kind": "chat", "base": read_json(tokenizer_json)}
    assert same(gpt2_file, {"kind": "chat", "base": "gpt2"})
    for bad, message in [
        ({"kind": "ids", "vocab_size": 3}, "beside a tokenizer of text, not beside ids"),
        ({"kind": "chat", "base": "byte"}, "not beside chat"),
        ("gpt3", "no tokenizer 'gpt3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            check({"kind": "chat", "base": bad})
