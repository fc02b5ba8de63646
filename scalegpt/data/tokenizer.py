"""Tokenizers map text to ids and back: GPT-2's BPE, characters, bytes, or any tokenizer.json.

Ids without a text have one too, which spells them as numbers. Each tokenizer of a text has another
beside it for chats, its `chat`, with ids for the marks between messages.

A tokenizer travels as its `spec()`, a JSON value in a data set's meta.json and in a run's folder,
so that sampling from a run needs none of the files it was prepared with.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.errors import Mistake
from scalegpt.files.json_files import read_object

END_OF_TEXT = "<|endoftext|>"  # prompts write this, whatever the tokenizer calls its mark
# The marks of a chat, in the order of their ids. Where text has an end-of-text mark, that is "bos".
MARKS = ("bos", "system", "user", "assistant", "end", "call", "result", "back")
# Names of the mark in a tokenizer.json, less all but letters and "/": <｜end▁of▁sentence｜>, [EOS]
_EOT_NAMES = ("endoftext", "endofsentence", "/s", "eos")
# SHA-256 of the sorted items of GPT-2's vocabulary; GPT-2s of other languages have 50257, too.
_GPT2_VOCAB = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"


def _byte_characters() -> str:
    """Return the characters that GPT-2's vocabulary writes for bytes 0 to 255.

    A printable byte is its own character; the others take characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(b if b in printable else next(others)) for b in range(256))


BYTES = _byte_characters()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, made by `load`, `named` or `char_tokenizer`.

    name: "gpt2", "byte", "char", "ids", or the file name of a tokenizer.json.
    vocab_size: number of ids, so every id is in [0, vocab_size).
    eot: id of the end-of-text mark between documents, or None; for bytes it is 0, NUL.
    piecewise: a text may be cut before a space or newline that follows a non-space, and encoding
    the pieces one by one gives the same ids as encoding the whole.
    marks: the ids of MARKS by name, or {} for a tokenizer that is not for chats of ours.
    bos: id that weights of others expect before a text, such as Llama's <s>, or None.
    special: the ids of tokens that are no text, by how a conversation spells them.
    template: of others' weights that answer, what `templates.encode` needs; else {}.
    encode_special: as `encode`, but special tokens count as such; None where `encode` of the texts
    between them gives the same ids.
    """

    name: str
    vocab_size: int
    eot: int | None
    piecewise: bool
    _encode: Callable[[str], Any]
    _decode: Callable[[np.ndarray], str]
    _spec: dict[str, Any]
    marks: dict[str, int] = field(default_factory=dict)
    bos: int | None = None
    special: dict[str, int] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    encode_special: Callable[[str], Any] | None = None
    _part: Callable[[int], bytes | None] = lambda id_: (
        None
    )  # of an id whose text is half a character

    def encode(self, text: str) -> np.ndarray:
        """Return ids, int32; special tokens and marks count as plain text.

        Raises Mistake for a character that a char tokenizer does not have, and for chats for one
        that is a mark itself, as NUL is to bytes.
        """
        return np.asarray(self._encode(text), np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Encode as `encode` after `bos`, but turn `<|endoftext|>` into the id `eot`, where the
        tokenizer has these."""
        first = [] if self.bos is None else [self.bos]
        texts = [text] if self.eot is None else text.split(END_OF_TEXT)
        parts = [ids for part in texts for ids in ([self.eot], self.encode(part))]
        return np.concatenate([first, *parts[1:]]).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, marks: bool = False) -> str:
        """Return the text of `ids`, with U+FFFD for bytes that are not UTF-8.

        marks: show the marks of a chat by name, as <|end|>, instead of leaving them out. Raises
        Mistake for an id outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64).ravel()
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)]
        if unknown.size:
            last = self.vocab_size - 1
            raise Mistake(f"token id {unknown[0]} is outside {self.name}'s 0..{last}")
        names = {i: f"<|{name}|>" if marks else "" for name, i in self.marks.items()}
        # Texts between marks were encoded one by one, and half a character ends at a mark.
        parts = ((name, [*part]) for name, part in groupby(ids.tolist(), names.get))
        return "".join(
            self._decode(np.array(part)) if name is None else name * len(part)
            for name, part in parts
        )

    def bytes_of(self, id_: int) -> bytes | None:
        """Return the bytes of an id's text, none for a mark; None where they are not known."""
        if id_ in (self.eot, *self.marks.values()):
            return b""
        if self.template and id_ in self.special.values():
            return b""
        text = self.decode([id_])
        return self._part(id_) if "\ufffd" in text else text.encode()

    def within(self, vocab_size: int) -> "Tokenizer":
        """Return this tokenizer limited to a model's ids; text that needs others is a Mistake."""
        if vocab_size >= self.vocab_size:
            return self

        def encode(text: str, encode: Callable[[str], Any] = self._encode) -> np.ndarray:
            ids = np.asarray(encode(text), np.int32)
            if ids.size and ids.max() >= vocab_size:
                raise Mistake(
                    f"tokenizer {self.name} gives id {ids.max()} for {text[:20]!r}, but the model "
                    f"has only {vocab_size}: it was made for another tokenizer"
                )
            return ids

        eot = self.eot if self.eot is not None and self.eot < vocab_size else None
        marks = self.marks if max(self.marks.values(), default=0) < vocab_size else {}
        bos = self.bos if self.bos is not None and self.bos < vocab_size else None
        whole = self.encode_special and partial(encode, encode=self.encode_special)
        special = {token: i for token, i in self.special.items() if i < vocab_size}
        kept = {"eot": eot, "marks": marks, "bos": bos, "special": special}
        return replace(self, vocab_size=vocab_size, _encode=encode, encode_special=whole, **kept)

    def spec(self) -> dict[str, Any]:
        """Return a JSON value from which `load` makes the same tokenizer again, less a template:
        text of these ids teaches nobody to answer."""
        return self._spec

    @property
    def begin(self) -> int | None:
        """The mark that stands before the first token of a text."""
        return self.eot if self.bos is None else self.bos

    @property
    def end(self) -> int | None:
        """The mark that a model ends a text with: of a chat, the end of an answer."""
        return self.marks.get("end", self.eot)

    @property
    def ends(self) -> frozenset[int]:
        """The ids of which each ends an answer, less what others name outside the vocabulary."""
        ends = {self.end, *self.template.get("ends", ())}
        return frozenset(i for i in ends if i is not None and 0 <= i < self.vocab_size)

    @property
    def spelt(self) -> re.Pattern:
        """What finds each special token, as one group, where a text spells it."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @property
    def chats(self) -> bool:
        """Whether this is the tokenizer of a model that answers, of ours or of others."""
        return bool(self.marks or self.template)

    def chat(self) -> "Tokenizer":
        """Return this tokenizer with marks for chats. Raises Mistake for ids without a text."""
        return self if self.marks else load({"kind": "chat", "base": self.spec()})


def same(spec: str | dict[str, Any], other: str | dict[str, Any]) -> bool:
    """Tell whether an id stands for the same text in both specs, however they are spelt."""
    return _meaning(spec) == _meaning(other)


def is_chat_of(spec: str | dict[str, Any], base: str | dict[str, Any]) -> bool:
    """Tell whether `spec` is `base` with marks of a chat, so that it has all ids of `base`."""
    match spec:
        case {"kind": "chat", "base": other}:
            return same(other, base)
    return False


def _meaning(spec: str | dict[str, Any]) -> str:
    """Return a value that is equal for two specs if every id stands for the same text in both."""
    match spec:
        case "gpt2" | {"kind": "gpt2"}:
            return _GPT2_VOCAB
        case {"kind": "chat", "base": base}:
            return f"chat of {_meaning(base)}"
        case "byte" | {"kind": "byte"}:
            vocab = {c: i for i, c in enumerate(BYTES)}
        case {"kind": "char", "chars": str(chars)}:
            vocab = {c: i for i, c in enumerate(chars)}
        case {"json": {"model": {"vocab": dict() | list() as vocab}, **rest}}:
            if isinstance(vocab, list):  # Unigram's pieces with their scores
                vocab = {str(piece): i for i, piece in enumerate(vocab)}
            vocab = vocab | {t["content"]: t["id"] for t in added_tokens(rest)}
        case _:
            return json.dumps(spec, sort_keys=True)
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()


def added_tokens(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens that a tokenizer.json has beside its model's."""
    tokens = content.get("added_tokens")
    added = []
    for token in tokens if isinstance(tokens, list) else ():
        match token:
            case {"content": str(), "id": int()}:
                added.append(token)
    return added


def is_chat(spec: Any) -> bool:
    """Tell whether a spec is of a model that answers, of ours or of others."""
    return isinstance(spec, dict) and (spec.get("kind") == "chat" or "template" in spec)


def kind(spec: str | dict[str, Any]) -> str:
    """Return the name of a spec's kind, for messages."""
    match spec:
        case {"kind": "chat", "base": base}:
            return f"{kind(base)} with marks of a chat"
    return spec if isinstance(spec, str) else spec["kind"]


def load(spec: str | dict[str, Any]) -> Tokenizer:
    """Return the tokenizer "gpt2" or "byte", or that of a value that `.spec()` returned.

    Specs come from files of unknown origin, so a path in one is never followed. Raises Mistake for
    anything else, a missing optional package, or gpt2 without cache or network.
    """
    check(spec)
    match spec:
        case {"template": dict(template), **rest}:
            return replace(load(rest), template=template)
        case "gpt2" | {"kind": "gpt2"}:
            return of_openai("gpt2")
        case "byte" | {"kind": "byte"}:
            return _byte()
        case {"kind": "char", "chars": str(chars)}:
            return _char(chars)
        case {"kind": "ids", "vocab_size": size}:
            return _ids(size, spec)
        case {"kind": "tokenizer.json"}:
            return _hugging_face(spec)
        case {"kind": "chat", "base": base}:
            return _chat(load(base), spec)
    raise AssertionError(spec)


def check(spec: Any) -> None:
    """Raise Mistake unless `spec` is a tokenizer's; nothing is loaded."""
    match spec:
        case {"template": template, **rest}:
            match template:
                case {"source": str(), "variables": dict(), "ends": list(ends)}:
                    if all(type(i) is int for i in ends):
                        return check(rest)
        case "gpt2" | "byte" | {"kind": "gpt2" | "byte"}:
            return
        case {"kind": "char", "chars": str(chars)}:
            if not chars or len(set(chars)) != len(chars):
                raise Mistake(
                    f"a char tokenizer needs distinct characters, at least one; got {chars!r}"
                )
            return
        case {"kind": "ids", "vocab_size": int(size)} if size > 0:
            return
        case {"kind": "tokenizer.json", "name": str(), "json": dict(), **rest}:
            if isinstance(rest.get("eot", ""), str) and isinstance(rest.get("bos", ""), str):
                return
        case {"kind": "chat", "base": {"kind": "ids" | "chat" as other}}:
            raise Mistake(f"marks of a chat go beside a tokenizer of text, not beside {other}")
        case {"kind": "chat", "base": base}:
            return check(base)
    raise Mistake(f"no tokenizer {str(spec)[:60]!r}: there are gpt2, byte, and specs of others")


def read_json(file: Path) -> dict[str, Any]:
    """Return the spec of a tokenizer.json, with the end-of-text mark that files beside it state.

    Raises Mistake for a file that cannot be read.
    """
    spec = {"kind": "tokenizer.json", "name": file.name, "json": read_object(file)}
    # Special tokens only: GPT-2's config.json names id 50256, whatever the vocabulary is.
    special = [t for t in added_tokens(spec["json"]) if t.get("special")]
    marks = {key: t["content"] for t in special for key in (t["id"], t["content"])}
    for name, key in (
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
    ):
        stated = read_object(path).get(key) if (path := file.with_name(name)).is_file() else None
        stated = stated.get("content") if isinstance(stated, dict) else stated
        for mark in stated if isinstance(stated, list) else [stated]:
            if isinstance(mark, str | int) and mark in marks:
                return {**spec, "eot": marks[mark]}
    return spec


def char_tokenizer(text_chunks: Iterable[str]) -> Tokenizer:
    """Return a tokenizer whose ids number the text's distinct characters in code point order."""
    there = np.zeros(sys.maxunicode + 1, bool)  # a set of the characters takes ten times as long
    for chunk in text_chunks:
        there[_codes(chunk)] = True
    return load({"kind": "char", "chars": "".join(map(chr, np.flatnonzero(there)))})


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _char(chars: str) -> Tokenizer:
    codes = np.array([ord(c) for c in chars], np.int64)
    unknown = codes.max() + 1
    table = np.full(unknown + 1, -1, np.int32)  # code point -> id; every larger one -> unknown
    table[codes] = np.arange(codes.size)

    def encode(text: str) -> np.ndarray:
        ids = table[np.minimum(_codes(text), unknown)]
        if (ids < 0).any():
            first = text[int(np.argmax(ids < 0))]
            raise Mistake(
                f"char tokenizer has no {first!r} (U+{ord(first):04X}), only the {len(chars):,} "
                "characters of the text that it was made from"
            )
        return ids

    def decode(ids: np.ndarray) -> str:
        return "".join(chars[i] for i in ids)

    return Tokenizer(
        "char", len(chars), None, True, encode, decode, {"kind": "char", "chars": chars}
    )


def _byte() -> Tokenizer:
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    spec = {"kind": "byte"}
    return Tokenizer("byte", 256, 0, True, encode, decode, spec, _part=lambda i: bytes([i]))


def gpt2_ranks() -> dict[bytes, int]:
    """Return the tokens of GPT-2 with their ids, less its end-of-text mark."""
    import tiktoken

    return tiktoken.get_encoding("gpt2")._mergeable_ranks


def of_openai(name: str) -> Tokenizer:
    """Return a tokenizer that tiktoken has under this name; `load` knows gpt2 alone.

    Raises Mistake where its files are neither cached nor to be had from a network.
    """
    import tiktoken

    try:
        bpe = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors too
        raise Mistake(
            f"no {name} files for tiktoken ({type(error).__name__}): without a network set "
            "TIKTOKEN_CACHE_DIR to a cache filled on a machine with one, or use --tokenizer byte"
        ) from error
    encode, decode = bpe.encode_ordinary, lambda ids: bpe.decode(ids.tolist())
    part, spec = bpe.decode_single_token_bytes, {"kind": name}
    special = {END_OF_TEXT: bpe.eot_token}
    return Tokenizer(
        name, bpe.n_vocab, bpe.eot_token, True, encode, decode, spec, special=special, _part=part
    )


def _ids(size: int, spec: dict[str, Any]) -> Tokenizer:
    def encode(text: str) -> list[int]:
        try:
            ids = [int(number) for number in text.split()]
        except ValueError:
            raise Mistake(
                f"{text[:20]!r}: these ids stand for no text that is known; write ids, as in '5 17'"
            ) from None
        if unknown := [i for i in ids if not 0 <= i < size]:
            raise Mistake(f"token id {unknown[0]} is outside 0..{size - 1}")
        return ids

    def decode(ids: np.ndarray) -> str:
        return " ".join(map(str, ids.tolist()))

    return Tokenizer("ids", size, None, True, encode, decode, spec)


def _hugging_face(spec: dict[str, Any]) -> Tokenizer:
    name, content = spec["name"], spec["json"]
    try:
        import tokenizers

        bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
    except ImportError as error:
        raise Mistake(f"{name} needs `tokenizers`: pip install 'scalegpt[data]'") from error
    except Exception as error:  # the package raises nothing narrower for a file it cannot use
        raise Mistake(f"{name} is not a Hugging Face tokenizer.json: {error}") from error
    bpe.no_truncation()
    bpe.no_padding()
    bpe.encode_special_tokens = True  # spelt in the text, a special token is only text
    size = max(bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # may have gaps
    if not size:
        raise Mistake(f"{name} is not a Hugging Face tokenizer.json: its vocabulary is empty")
    special = [t for t in added_tokens(content) if t.get("special") and t["content"]]
    marks = {t["content"]: t["id"] for t in special}
    letters = {re.sub("[^a-z/]", "", mark.lower()): mark for mark in reversed(marks)}
    known = [letters[mark] for mark in _EOT_NAMES if mark in letters]
    eot = next((marks[mark] for mark in (spec.get("eot"), *known) if mark in marks), None)
    # GPT-2's own cutter: no token reaches from one word into the space before the next.
    gpt2_cutter = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    cutter = {"use_regex": True, **(content.get("pre_tokenizer") or {})}
    piecewise = gpt2_cutter.items() <= cutter.items() and not content.get("normalizer")
    piecewise &= len(marks) == len(added_tokens(content))

    byte_ids = [bpe.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]  # as SentencePiece has
    falls_back = None not in byte_ids and "ByteFallback" in json.dumps(content.get("decoder"))
    bytes_of = {i: byte for byte, i in enumerate(byte_ids)} if falls_back else {}

    def encode(text: str) -> list[int]:
        return bpe.encode(text, add_special_tokens=False).ids

    @cache  # another one, as a setting that goes on and off would be of all threads
    def with_special() -> Any:
        return tokenizers.Tokenizer.from_str(bpe.to_str())

    def encode_special(text: str) -> list[int]:
        return with_special().encode(text, add_special_tokens=False).ids

    def decode(ids: np.ndarray) -> str:
        whole: list[int] = []
        for are_bytes, part in groupby(ids.tolist(), bytes_of.__contains__):
            if are_bytes:
                # One byte that is not UTF-8 would turn all its neighbours into U+FFFD, and so an
                # unfinished character would take away the text before it.
                text = bytes(bytes_of[i] for i in part).decode(errors="replace")
                part = (byte_ids[byte] for byte in text.encode())
            whole += part
        return bpe.decode(whole, skip_special_tokens=False)

    def part(id_: int) -> bytes | None:
        if id_ in bytes_of:
            return bytes([bytes_of[id_]])
        token = bpe.id_to_token(id_) or ""  # of BPE over bytes, if all of its characters are
        return bytes(map(BYTES.index, token)) if {*token} <= {*BYTES} else None

    bos = marks.get(spec.get("bos"))
    chat = {"special": marks, "encode_special": encode_special}
    return Tokenizer(name, size, eot, piecewise, encode, decode, spec, bos=bos, _part=part, **chat)


def _chat(base: Tokenizer, spec: dict[str, Any]) -> Tokenizer:
    names = MARKS if base.eot is None else MARKS[1:]
    marks = {"bos": base.eot} | {name: base.vocab_size + i for i, name in enumerate(names)}

    def encode(text: str) -> np.ndarray:
        ids = base.encode(text)
        if base.eot is not None and (ids == base.eot).any():
            raise Mistake(
                f"the text {text[:20]!r} holds {base.decode([base.eot])!r}, which begins a chat in "
                f"tokens of {base.name}: take it out"
            )
        return ids

    size = base.vocab_size + len(names)
    chat = {"marks": marks, "special": {f"<|{name}|>": i for name, i in marks.items()}}
    return replace(base, vocab_size=size, eot=marks["bos"], _encode=encode, _spec=spec, **chat)
