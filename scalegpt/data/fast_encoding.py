"""Texts are encoded about ten times faster by gigatoken, where it is installed and proves equal.

Its ids are those of tiktoken or tokenizers, which stay the reference: they encode a sample of the
text and of all kinds of characters first, and all of it where one id differs.
"""

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np

from scalegpt.data.tokenizer import Tokenizer, added_tokens, gpt2_ranks

SAMPLE = 1 << 19  # characters of the text that both encode
_REFERENCES = {"gpt2": "tiktoken", "tokenizer.json": "tokenizers"}  # who gives their ids
# The ids of all texts one after the other, and after how many of them each text ends.
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


def by_itself(tokenizer: Tokenizer) -> Encode:
    """Return the function that encodes texts by the tokenizer itself."""
    name = tokenizer.spec()["kind"]

    def at_once(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        sizes = (len(t if name == "char" or t.isascii() else t.encode()) for t in texts)
        return tokenizer.encode("".join(texts)), np.cumsum([*sizes], dtype=np.int64)

    def one_by_one(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [tokenizer.encode(text) for text in texts]
        ends = np.cumsum([part.size for part in ids], dtype=np.int64)
        return np.concatenate([np.empty(0, np.int32), *ids]), ends

    return at_once if name in ("byte", "char") else one_by_one  # an id is a byte, or a character


def faster(tokenizer: Tokenizer, texts: list[str], threads: int) -> tuple[Encode | None, str]:
    """Return gigatoken's encoding, or None where there is none that is equal; and why, in words.

    texts: those to encode first, for the proof. The words are "" for bytes and characters.
    """
    if not (reference := _REFERENCES.get(tokenizer.spec()["kind"])):
        return None, ""
    if not find_spec("gigatoken"):
        hint = "pip install 'scalegpt[data]' brings gigatoken, which is many times faster"
        return None, f"encoded by {reference}; {hint}"
    sample, size = [*_samples(tokenizer)], 0
    for text in texts:
        sample, size = [*sample, text], size + len(text)
        if size > SAMPLE:
            break
    with ThreadPoolExecutor(1) as thread:
        expected = thread.map(tokenizer.encode, sample)  # while gigatoken starts
        try:
            encode = by_gigatoken(tokenizer, threads)
            ids, ends = encode(sample)
        except Exception as error:  # the package raises nothing narrower for a tokenizer it lacks
            return None, f"encoded by {reference}: gigatoken cannot use this tokenizer: {error}"
        for text, part, known in zip(sample, np.split(ids, ends[:-1]), expected, strict=True):
            if not np.array_equal(part, known):
                return None, f"encoded by {reference}: gigatoken gives other ids for {text[:40]!r}"
    return encode, f"encoded by gigatoken, which gave the ids of {reference} for a sample"


def by_gigatoken(tokenizer: Tokenizer, threads: int) -> Encode:
    """Return gigatoken's encoding, unproven. Raises what that package raises."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read when it first encodes
    from gigatoken import Tokenizer as Gigatoken

    spec = tokenizer.spec()
    if spec["kind"] == "gpt2":
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            lines = (base64.b64encode(t) + b" %d\n" % i for t, i in gpt2_ranks().items())
            file.write(b"".join(lines))
            file.flush()
            encoder = Gigatoken.from_tiktoken(file.name, "gpt2", {})
    else:
        # It takes a special token's name in a text for the token; without them, it is only text.
        content = spec["json"]
        kept = [token for token in added_tokens(content) if not token.get("special")]
        plain = {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
        encoder = Gigatoken.from_json(json.dumps({**content, **plain}))

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            layout = encoder.encode_batch(texts, parallel=threads > 1).layout
        except TypeError:  # half a surrogate pair, which tiktoken, too, reads as U+FFFD
            utf16 = (text.encode("utf-16", "surrogatepass") for text in texts)
            return encode([text.decode("utf-16", "replace") for text in utf16])
        offsets, ids = layout.offsets.data, layout.content.data
        return ids[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]

    return encode


def _samples(tokenizer: Tokenizer) -> Iterable[str]:
    """Yield texts in which tokenizers differ: characters of each class beside others, and marks."""
    marks = [token["content"] for token in added_tokens(tokenizer.spec().get("json", {}))]
    yield "".join(f"a{chr(i)}1{chr(i)} {chr(i)}\n" for i in range(0x3100))
    yield f"{' '.join(marks)} <|endoftext|>{''.join(marks)}"
    yield "don't WE'LL 'S 12345 \r\n\r\n \t x\u00a0\u00a0 y   \n\n  z\ufeff\0\U0001f600e\u0301"
    yield from ("", " ", "\n \n", "a" * 1000, " " * 1000)
