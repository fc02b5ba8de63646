"""What a request asks for, from the JSON of OpenAI's clients to the ids that are read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from scalegpt.data import conversations
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.inference.chat import ROOM, TooLong, prompt_that_fits
from scalegpt.inference.continuation import Continuation, prompt_ids
from scalegpt.inference.sampling import Sampler
from scalegpt.server.slots import ALTERNATIVES

MOST_MESSAGES, MOST_CHARACTERS = 256, 100_000
MOST_STOPS, LONGEST_STOP = 4, 256
# What would change an answer and is not there; clients send many of these with such values.
_NEUTRAL: dict[str, Any] = {
    **{"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "echo": False},
    **{"tools": [], "functions": [], "logit_bias": {}, "suffix": ""},
    **{"response_format": {"type": "text"}},
}


class Refusal(Exception):
    """A request that is answered with an error. code: a word for programs; param: the field."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Body(BaseModel):
    """The fields that both kinds of requests have; null is as if left out."""

    model_config = ConfigDict(strict=True)

    answer_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None


class ChatBody(Body):
    messages: list[Any]


class TextBody(Body):
    prompt: str


class FeedbackBody(BaseModel):
    model_config = ConfigDict(strict=True)

    messages: list[Any]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Asked:
    """A request that can be served. ids: what is read, whose end is `begun`, what there is of the
    text. top: the number of alternatives to show, or None for no probabilities at all."""

    ids: np.ndarray
    text: Continuation
    max_tokens: int
    sampler: Sampler
    seed: int | None
    top: int | None
    stream: bool
    include_usage: bool
    dropped_messages: int = 0
    dropped_tokens: int = 0


@dataclass(frozen=True)
class Reader:
    """What reads requests: the tokenizer, and what holds where a request says nothing."""

    codec: Tokenizer
    block_size: int
    sampler: Sampler
    max_tokens: int

    def chat(self, raw: bytes) -> Asked:
        """Read a request of /v1/chat/completions. Raises Refusal, or Mistake for its messages."""
        body = _parsed(raw, ChatBody)
        messages, begun = self._messages(body.messages)
        answer = self._ids_so_far(body, begun)
        try:
            prompt, dropped = prompt_that_fits(self.codec, messages, self.block_size, len(answer))
        except TooLong as error:
            raise Refusal(400, str(error), "context_length_exceeded", "messages") from None
        return self._asked(body, prompt, answer, dropped_messages=dropped)

    def text(self, raw: bytes) -> Asked:
        """Read a request of /v1/completions. Raises Refusal, or Mistake for its prompt."""
        body = _parsed(raw, TextBody)
        _short_enough([body.prompt], "prompt")
        prompt, answer = prompt_ids(self.codec, body.prompt), self._ids_so_far(body, "")
        most = self.block_size - ROOM - len(answer)
        if most < 1:
            raise Refusal(
                400,
                f"answer_ids has {len(answer)} ids; the model reads block_size={self.block_size}, "
                f"of which a text needs {ROOM}: make them part of the prompt",
                "context_length_exceeded",
                "answer_ids",
            )
        return self._asked(body, prompt[-most:], answer, dropped_tokens=max(0, len(prompt) - most))

    def _messages(self, messages: list[Any]) -> tuple[list[conversations.Message], str]:
        """Return checked messages that end with a question, and the beginning of its answer."""
        _few_enough(messages)
        last, begun = messages[-1] if messages else None, ""
        if isinstance(last, dict) and last.get("role") == "assistant":
            messages = messages[:-1]
            begun = last.get("content") or ""
            if not isinstance(begun, str):
                raise Refusal(400, "the answer to continue is no text", param="messages")
        # They can be answered if with an answer they are a conversation.
        row = {"messages": [*messages, {"role": "assistant", "content": "-"}]}
        checked = conversations.messages_of(row, "messages")[:-1]
        _short_enough([begun, *(text for m in checked for text in _texts(m))], "messages")
        return checked, begun

    def _ids_so_far(self, body: Body, begun: str) -> list[int]:
        """Return the ids of what there is of the text."""
        if body.answer_ids is None:
            return self.codec.encode(begun).tolist() if begun else []
        for i in body.answer_ids:
            if not 0 <= i < self.codec.vocab_size:
                last = self.codec.vocab_size - 1
                raise Refusal(400, f"id {i} is outside 0..{last}", param="answer_ids")
        return body.answer_ids

    def _asked(self, body: Body, prompt: np.ndarray, answer: list[int], **dropped: int) -> Asked:
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > MOST_STOPS or any(not 0 < len(s) <= LONGEST_STOP for s in stops):
            what = f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"
            raise Refusal(400, f"stop: {what}", param="stop")
        text = Continuation(self.codec, stops, prompt, answer[:-1])
        for token in answer[-1:]:
            text.add(token)
        if text.finish or {self.codec.eot, *self.codec.ends} & {*answer}:
            what = "the answer so far has ended: it holds an end mark or a stop string"
            raise Refusal(400, what, param="answer_ids")
        most = _given(body.max_completion_tokens, body.max_tokens)
        if most is not None and not 1 <= most <= self.block_size:
            what = f"max_tokens={most} must be from 1 to block_size={self.block_size}"
            raise Refusal(400, what, param="max_tokens")
        room = self.block_size - len(prompt) - len(answer)
        return Asked(
            np.array([*prompt, *answer], np.int32),
            text,
            min(_given(most, self.max_tokens), room),
            self._sampler(body),
            None if body.seed is None else body.seed % 2**32,
            _alternatives(body),
            bool(body.stream),
            bool((body.stream_options or {}).get("include_usage")),
            **dropped,
        )

    def _sampler(self, body: Body) -> Sampler:
        names = [option.name for option in fields(Sampler) if hasattr(body, option.name)]
        values = {n: _given(getattr(body, n), getattr(self.sampler, n)) for n in names}
        try:
            return Sampler(**values | {"top_k": min(values["top_k"], self.codec.vocab_size)})
        except Mistake as error:
            flag, _, rest = str(error).removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            raise Refusal(400, f"{name}={rest}", param=name) from None


def parse(raw: bytes) -> dict[str, Any]:
    """Return the object in a request's body. Raises Mistake or Refusal."""
    values = conversations.parse(raw.decode("utf-8", "surrogateescape"))
    if not isinstance(values, dict):
        raise Refusal(400, "the body is no JSON object")
    return values


def feedback(raw: bytes) -> dict[str, Any]:
    """Return the pair of preferences in a request's body. Raises Mistake or Refusal."""
    body = _valid(parse(raw), FeedbackBody)
    texts = [body.chosen, body.rejected]
    _few_enough(body.messages)
    for text in texts:  # each answers the messages
        row = {"messages": [*body.messages, {"role": "assistant", "content": text}]}
        messages = conversations.messages_of(row, "messages")[:-1]
    if body.chosen == body.rejected:
        raise Refusal(400, "chosen and rejected are the same", param="rejected")
    _short_enough([*texts, *(text for m in messages for text in _texts(m))], "messages")
    return {"messages": messages, "chosen": body.chosen, "rejected": body.rejected}


def _parsed(raw: bytes, kind: type[Any]) -> Any:
    values = parse(raw)
    for name, neutral in _NEUTRAL.items():
        if values.get(name) not in (None, neutral):
            raise Refusal(400, f"{name} is not supported; leave it out", "unsupported", name)
    return _valid(values, kind)


def _valid(values: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise Refusal(400, f"{field}: {first['msg']}", param=str(first["loc"][0])) from None


def _alternatives(body: Body) -> int | None:
    """Return how many alternatives to show; OpenAI has a number in logprobs for plain texts."""
    numbered = body.logprobs is not None and not isinstance(body.logprobs, bool)
    top = _given(body.top_logprobs, body.logprobs if numbered else 0)
    if not 0 <= top <= ALTERNATIVES:
        raise Refusal(400, f"top_logprobs={top}: 0 to {ALTERNATIVES}", param="top_logprobs")
    wanted = body.logprobs if not numbered else True
    if top and not wanted:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return top if wanted else None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _texts(message: conversations.Message) -> list[str]:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return [t for p in parts for t in ([p] if isinstance(p, str) else p.values())]


def _few_enough(messages: list[Any]) -> None:
    if (n := len(messages)) > MOST_MESSAGES:
        raise Refusal(400, f"{n} messages are more than {MOST_MESSAGES}", param="messages")


def _short_enough(texts: Sequence[str], param: str) -> None:
    if (n := sum(map(len, texts))) > MOST_CHARACTERS:
        what = f"{n:,} characters are more than {MOST_CHARACTERS:,}"
        raise Refusal(400, what, "context_length_exceeded", param)
