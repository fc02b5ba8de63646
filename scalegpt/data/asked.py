"""Which questions a data set trains on: a test that asks one of them would measure memory."""

from collections.abc import Iterable

import numpy as np

from scalegpt.data import tokenizer
from scalegpt.data.packing import PackedRows, mark_id
from scalegpt.data.token_files import Dataset


def encoded(codec: tokenizer.Tokenizer, text: str) -> bytes:
    """Return a message of the user as it is in a token file, where it is only read."""
    return (~codec.encode(text)).astype("<i4").tobytes()


def asked(dataset: Dataset) -> set[bytes]:
    """Return all messages of the user in train.bin or train.jsonl; none of plain text."""
    if dataset.kind == "text":
        return set()
    if dataset.kind == "prompts":
        codec = tokenizer.load(dataset.tokenizer)
        messages = (m for example in dataset.train for m in example["messages"])
        return {encoded(codec, m["content"]) for m in messages if m["role"] == "user"}
    rows = dataset.train
    tokens = np.asarray(rows.tokens if isinstance(rows, PackedRows) else rows)
    begins = np.flatnonzero(tokens == ~mark_id(dataset.vocab_size, "user")) + 1
    ends = np.flatnonzero(tokens == ~mark_id(dataset.vocab_size, "end"))
    ends = ends[np.searchsorted(ends, begins)]
    return {tokens[a:b].tobytes() for a, b in zip(begins, ends, strict=True)}


def seen(codec: tokenizer.Tokenizer, texts: Iterable[str], dataset: Dataset) -> list[str]:
    """Return those of the user's texts that a data set trains on."""
    known = asked(dataset)
    return [text for text in texts if encoded(codec, text) in known]
