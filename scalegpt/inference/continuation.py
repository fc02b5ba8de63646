"""A continuation is the text that a model writes after a prompt, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scalegpt.data.chat import content_of, spoken
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.inference.decode import Decoder


@dataclass
class Continuation:
    """A continuation holds what has been written after a prompt, whose ids are `prompt`.

    text: the part that no later token can change, without calls of tools. finish: why the text
    ended, which is end_of_text (or the end of an answer), stop (a stop string, which is not part of
    the text) or length; None while it goes on.
    """

    codec: Tokenizer
    stops: Sequence[str] = ()
    prompt: Sequence[int] | np.ndarray = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None

    def __post_init__(self) -> None:
        # A SentencePiece-like tokenizer drops the space before a text's first word. So the text is
        # decoded after some tokens of prompt, less what these are by themselves.
        self._before = list(self.prompt[-16:])
        marks = {self.codec.bos, self.codec.eot, *self.codec.marks.values()}
        marks.update(self.codec.special.values() if self.codec.template else ())
        for i in [i for i, token in enumerate(self._before) if token in marks][-1:]:
            del self._before[: i + 1]  # a new text begins after a mark
        self._known = len(self.codec.decode(self._before))

    def add(self, token: int) -> None:
        """Append a token, unless the text has ended."""
        if self.finish:
            return
        if token == self.codec.eot or token in self.codec.ends:
            self.end("end_of_text")
            return
        self.ids.append(token)
        text = self._decoded()
        if places := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.text, self.finish = text[: min(places)], "stop"
            return
        # The next token may complete half a UTF-8 character, or the beginning of a stop string.
        text = text.rstrip("\ufffd")
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self.text = text[: len(text) - max(begun, default=0)]

    def end(self, finish: str) -> None:
        """End the text for this reason, unless it has ended."""
        if self.finish is None:
            self.text, self.finish = self._decoded(), finish

    def _decoded(self) -> str:
        return spoken(content_of(self.codec, [*self._before, *self.ids]))[self._known :]


def continued(
    write: Decoder,
    codec: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    seed: int | Sequence[int] = 1337,
    stops: Sequence[str] = (),
) -> Iterator[list[Continuation]]:
    """Continue each prompt until end of text, a stop string or max_new_tokens.

    Yields all texts after each token; the same objects, which grow. seed: as of `Decoder.ids`.
    Every process of a run must call this together.
    """
    texts = [Continuation(codec, stops, prompt) for prompt in prompts]
    for ids in write.ids(prompts, max_new_tokens, seed, codec):
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.add(token)
        yield texts
        if all(text.finish for text in texts):
            break
    for text in texts:
        text.end("length")
    yield texts


def continuations(*arguments: Any, **options: Any) -> list[Continuation]:
    """Return the texts of `continued` when they have ended; its arguments."""
    *_, texts = continued(*arguments, **options)
    return texts


def prompt_ids(codec: Tokenizer, text: str) -> np.ndarray:
    """Encode a prompt; an empty one becomes the mark that begins a text.

    Raises Mistake for a prompt that is not UTF-8, or empty where the tokenizer has no mark.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line or a pipe that Python could not decode
        raise Mistake(f"the prompt {text[:20]!r} is not UTF-8 text") from None
    ids = codec.encode_prompt(text)
    if len(ids):
        return ids
    if codec.begin is None:
        raise Mistake("the prompt is empty, and this tokenizer has no mark to start from")
    return np.array([codec.begin])
