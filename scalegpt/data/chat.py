"""The template of a chat: how messages become the ids that a model reads and learns to write.

A conversation is <|bos|>, then of each message the mark of its role, its text and <|end|>. Texts go
in as they are, and each is encoded by itself, so that the ids of a prompt begin those of the whole.
A message is {"role": ..., "content": ...}, where content is a text, or a list of texts and of calls
of a tool: {"call": "12/60", "result": "0.2"} becomes <|call|>12/60<|result|>0.2<|back|>. An answer
with "weight": 0 is read, but not learned.

Weights of others were taught with a template of their own (`templates.py`): prompts follow it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from scalegpt.data import templates
from scalegpt.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Messages = Sequence[dict[str, Any]]
Piece = tuple[str, str, bool]  # a mark's name or "", a text or "", and whether it is learned


def encode_conversation(codec: Tokenizer, messages: Messages, train: str = "all") -> np.ndarray:
    """Return signed ids, int32 [n]: an id that is learned is itself, one that is only read is ~id.

    train: "all" answers, or only the "last". An answer is learned with its <|end|>, and with its
    calls up to <|result|>; what a tool gave is read. Raises Mistake as `Tokenizer.encode`.
    """
    ids = _encoded(codec, pieces(messages, train))
    return np.concatenate([part if learned else ~part for part, learned in ids])


def encode_prompt(codec: Tokenizer, messages: Messages) -> np.ndarray:
    """Return ids, int32 [n], after which a model writes its answer; they end with <|assistant|>.

    Raises Mistake as `Tokenizer.encode` or `templates.encode`.
    """
    if codec.template:
        return templates.encode(codec, messages, prompt=True)
    prompt = [*pieces(messages), ("assistant", "", False)]
    return np.concatenate([part for part, _ in _encoded(codec, prompt)])


def pieces(messages: Messages, train: str = "all") -> Iterator[Piece]:
    """Yield the marks and texts of a conversation, and whether each is learned."""
    yield "bos", "", False
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant" and message.get("weight") != 0
        learned = answer and (train == "all" or i == last)
        yield message["role"], "", False
        content = message["content"]
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, str):
                yield "", part, learned
            else:
                yield "call", "", learned
                yield "", part["call"], learned
                yield "result", "", learned
                yield "", part["result"], False
                yield "back", "", False
        yield "end", "", learned


def _encoded(codec: Tokenizer, parts: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
    for mark, text, learned in parts:
        ids = np.array([codec.marks[mark]], np.int32) if mark else codec.encode(text)
        yield ids, learned


def content_of(codec: Tokenizer, ids: Sequence[int] | np.ndarray) -> Any:
    """Return the content of an answer that a model has written as these ids, up to <|end|>.

    `pieces` gives the same ids for it, unless a call was cut short: that is left out. Of others'
    weights it is the text without special tokens, as transformers' pipelines have it.
    """
    if codec.template:
        written = list(takewhile(lambda i: i not in codec.ends, np.asarray(ids).tolist()))
        special = {*codec.special.values()}
        return codec.decode([i for i in written if i not in special])
    names, texts = {i: name for name, i in codec.marks.items()}, [("", list[int]())]
    for token in np.asarray(ids).tolist():
        if token in names:
            texts.append((names[token], []))
        else:
            texts[-1][1].append(token)
    content, call = [""], dict[str, str]()
    for mark, part in texts:
        text = codec.decode(part)
        if mark == "end":
            break
        if mark in ("call", "result"):
            call |= {mark: text}
            continue
        if mark == "back" and len(call) == 2:
            content += [call, ""]
        call = {}
        content[-1] += text
    content = [part for part in content if part]
    return content if any(isinstance(part, dict) for part in content) else "".join(content)


def spoken(content: Any) -> str:
    """Return the text of a message's content, without calls and their results."""
    parts = [content] if isinstance(content, str) else content
    return "".join(part for part in parts if isinstance(part, str))
