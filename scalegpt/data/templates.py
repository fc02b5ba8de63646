"""Chat templates of others' weights: a conversation becomes the ids that transformers gives it.

A template is a program in Jinja's language and comes with the weights, so it runs in Jinja's
sandbox, for a limited time, and makes texts of a limited size.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np

from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake

SECONDS = 5.0  # that a template may take for a conversation
MOST = 2**25  # characters in all the texts that it may make, and items in its lists
_NO_CHARACTER = "\ufdd0"  # which Unicode keeps free for a program's own use


def encode(codec: Tokenizer, messages: Sequence[dict[str, Any]], prompt: bool) -> np.ndarray:
    """Return the ids of a conversation, int32 [n], as transformers' `apply_chat_template` does.

    prompt: with what begins the next answer. Special tokens are those that the template writes; in
    a message they are only text, which is as transformers with `sanitize_control_tokens`, if not
    to the id. Raises Mistake for a conversation that the template refuses.
    """
    texts = [message["content"] for message in messages]
    if not all(isinstance(text, str) for text in texts):
        raise Mistake("a call of a tool is in a message, and the model's chat template has none")
    # A mark that no message has splits each token that a message spells, until it is rendered.
    mark = _NO_CHARACTER * (1 + "".join(texts).count(_NO_CHARACTER))
    # After each character, as one token may be a part of another.
    split = [codec.spelt.sub(lambda m: mark.join(m[0]) + mark, text) for text in texts]
    roles = [message["role"] for message in messages]
    talk = [{"role": r, "content": text} for r, text in zip(roles, split, strict=True)]
    whole = rendered(codec, talk, prompt)
    if codec.encode_special and mark not in whole:
        return np.asarray(codec.encode_special(whole), np.int32)
    parts = re.split(f"{codec.spelt.pattern}(?!{mark})", whole)
    ids = [codec.encode(text.replace(mark, "")) for text in parts]
    ids[1::2] = [np.array([codec.special[token]], np.int32) for token in parts[1::2]]
    return np.concatenate(ids)


def with_end(codec: Tokenizer) -> Tokenizer:
    """Return a tokenizer for conversations, whose `ends` have what its template, if it has one,
    writes after an answer. Raises Mistake for a template that is broken."""
    if not codec.template:
        return codec
    _compiled(codec.template["source"])
    try:
        talk = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _NO_CHARACTER}]
        after = rendered(codec, talk, False).rpartition(_NO_CHARACTER)[2].lstrip()
    except Mistake:  # such a conversation is not what it takes
        return codec
    ends = [i for token, i in codec.special.items() if after.startswith(token)]
    template = {**codec.template, "ends": [*codec.template["ends"], *ends]}
    return replace(codec, template=template)


def rendered(codec: Tokenizer, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    """Return the text that the template makes of a conversation. Raises Mistake as `encode`."""
    template = _compiled(codec.template["source"])
    values = {**codec.template["variables"], "messages": messages, "add_generation_prompt": prompt}
    try:
        with _at_most(SECONDS):
            text = template.render(**values, tools=None, documents=None)
            text.encode()  # half a surrogate pair is no text
    except Mistake:
        raise
    except Exception as error:  # a program may fail in any way
        raise Mistake(f"the model's chat template refuses the conversation: {error}") from None
    if not text:  # nothing could be answered
        raise Mistake("the model's chat template makes nothing of the conversation")
    return text


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise Mistake in Python code of this thread that runs for longer, or returns too much."""
    until, before, made = time.monotonic() + seconds, sys.gettrace(), 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal made
        if event == "return" and isinstance(argument, str | list | tuple):
            made += len(argument)
            if made > MOST:
                raise Mistake(f"the model's chat template makes more than {MOST:,} characters")
        if time.monotonic() > until:
            raise Mistake(f"the model's chat template takes more than {seconds:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@cache
def _compiled(source: str) -> Any:
    """Return the program of a template, with the names that transformers gives to templates."""
    try:
        from jinja2 import TemplateError, ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
        from jinja2.utils import Namespace
    except ImportError:
        raise Mistake(
            "this model's conversations have a template, which needs jinja2: pip install "
            "'scalegpt[chat]'"
        ) from None

    class Generation(ext.Extension):
        """Tells trainers which part the model writes; to others its content is all there is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class Names(Namespace):
        """A namespace without names of Python's own, by which templates have left the sandbox."""

        def __init__(self, *arguments: Any, **values: Any) -> None:
            super().__init__()
            for name, value in dict(*arguments, **values).items():
                self[name] = value

        def __setitem__(self, name: Any, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace may not have {name}")
            super().__setitem__(name, value)

    class Sandbox(ImmutableSandboxedEnvironment):
        """The sandbox, with operators as functions, so that what they return is counted."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            match left, right:  # what would be there before it could be counted
                case (str() | list() | tuple(), int()):
                    made = len(left) * right
                case (int(), str() | list() | tuple()):
                    made = len(right) * left
                case (int(), int()):  # bits
                    bits = left.bit_length()
                    made = bits * right if operator == "**" else bits + right.bit_length()
                case _:
                    made = 0
            if operator in ("*", "**") and made > MOST:
                raise SecurityError(f"{operator} would make more than {MOST:,} characters")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Names,
    }
    try:
        return environment.from_string(source)
    except Exception as error:  # what no template is may fail in any way
        raise Mistake(f"the model's chat template is broken: {error}") from None
