"""Rows of conversations, as others write them, become messages for the template of `chat`.

A file has one JSON value a line, or is one array of them. The keys of the first row tell the format
of all. Every fault is a Mistake that says what is wrong with a row; who reads it adds the place.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from scalegpt.data.chat import ROLES
from scalegpt.data.tokenizer import MARKS
from scalegpt.errors import Mistake
from scalegpt.files import json_files, text_files
from scalegpt.files.text_files import decoded, parts

Message = dict[str, Any]
SYSTEM = "system"  # rows of every format may have a system message under this key
# Formats by the keys that a row needs. Where a row has those of several, the first counts.
FORMATS: dict[str, frozenset[str]] = {
    "preferences": frozenset({"chosen", "rejected"}),
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "question": frozenset({"question", "answer"}),
    "completion": frozenset({"prompt", "completion"}),
    "response": frozenset({"prompt", "response"}),
    "prompts": frozenset({"prompt"}),
    "text": frozenset({"text"}),
    "list": frozenset(),  # a row that is no object, but the list of messages itself
}
_REFUSED = {
    "prompts": "a prompt without completion or response holds no answer to learn; --prompts makes "
    "data of it for a run that writes the answers itself",
    "text": "text is no conversation: data/text/prepare.py makes data of plain text",
}
READ = (*(name for name in FORMATS if name not in _REFUSED),)
# Where prompts alone are asked for: formats, and the key under which a row has its prompt.
PROMPTS = {"messages": "messages", "question": "question", "prompts": "prompt"}
_PROMPT_OF_PAIR = ("prompt", "messages", "question")  # the first that a row has
_ALSO_READ = {"alpaca": {"input"}, "preferences": {*_PROMPT_OF_PAIR}}
_OF_A_MESSAGE = {"role", "content", "weight", "tool_calls", "tool_call_id", "from", "value"}
_SHAREGPT = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "model", "bot", "chatgpt")},
    **{"system": "system", "function_call": "function_call"},
    **{"observation": "tool", "tool": "tool"},
}
# Ends of answers that other programs have left in the text.
_FOREIGN = r"<\|endoftext\|>|</s>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>"
_END = re.compile(rf"(?:(?:{_FOREIGN})\s*)+\Z")
SPELT = re.compile(rf"{_FOREIGN}|<\|(?:im_start|{'|'.join(MARKS)})\|>")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf
_CALCULATED = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")  # GSM8K's
_SPACE = re.compile(r"\s*")


def rows(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and JSON text of each row of a file, which may be packed.

    A byte that is not UTF-8 is in it as Python's lone surrogate. Raises Mistake for a file that is
    no text, and for an array that is no JSON.
    """
    lines = enumerate(parts(path, decoded(path, "surrogateescape"), "\n"), 1)
    number, line = next((pair for pair in lines if pair[1].strip()), (0, ""))
    if line.lstrip()[:1] == "[" and not _is_conversation(line):
        held, size = ["\n" * (number - 1), line], len(line)
        for _, line in lines:
            held += ["\n", line]
            size += len(line)
            if size > text_files.MOST_HELD:
                raise Mistake(
                    f"{path} is an array of more than {text_files.MOST_HELD:,} characters: make it "
                    "JSON lines, jq -c '.[]'"
                )
        yield from _elements(path, "".join(held))
        return
    if number:
        yield number, line
    yield from ((number, line) for number, line in lines if line.strip())


def _is_conversation(line: str) -> bool:
    """Tell whether a line is the list of a conversation's messages, and not an array of rows."""
    try:
        value = json_files.parse(line)
    except ValueError:
        return False
    return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)


def _elements(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and JSON text of each element of an array."""
    decoder, number, counted = json.JSONDecoder(), 1, 0

    def fault(at: int, what: str) -> Mistake:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return Mistake(
            f"{path}, line {line}: this array is not JSON: {what} at column {column}; mend it, or "
            "write one row a line"
        )

    at, mark = text.index("["), "["
    while mark != "]":
        at = _SPACE.match(text, at + 1).end()
        if mark == "[" and text[at : at + 1] == "]":  # an empty array
            break
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", "a number too long, or what is nested too deeply,")
            raise fault(getattr(error, "pos", at), what) from None
        number, counted = number + text.count("\n", counted, at), at
        yield number, text[at:end]
        at = _SPACE.match(text, end).end()
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise fault(at, "no comma or ]")
    if (at := _SPACE.match(text, at + 1).end()) < len(text):
        raise fault(at, "more after its end")


def parse(text: str) -> Any:
    """Return the value of a row's JSON text. Raises Mistake."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte, column = ord(text[error.start]) - 0xDC00, error.start + 1
        raise Mistake(
            f"byte 0x{byte:02x} at column {column} is not UTF-8; iconv -f LATIN1 -t UTF-8 converts "
            "Latin-1"
        ) from None
    try:
        value = json_files.parse(text)
    except json.JSONDecodeError as error:
        raise Mistake(
            f"not JSON: {error.msg} at column {error.colno} in {_shown_text(text)}; one row is one "
            "JSON value on one line"
        ) from None
    except ValueError as error:
        raise Mistake(f"not JSON: {error}") from None
    if "\\ud" in text.lower():  # JSON can spell half a surrogate pair, which UTF-8 cannot
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise Mistake(f"{half} is half a character: write it whole") from None
    return value


def format_of(row: Any, prompts: bool = False) -> str:
    """Return the format of a row, one of READ, or for prompts alone one of PROMPTS.

    Raises Mistake for a row of no such format.
    """
    if isinstance(row, list) and not prompts:
        return "list"
    if not isinstance(row, dict):
        raise Mistake(f"{_shown(row)} is neither an object nor a list of messages")
    names = [*PROMPTS] if prompts else [name for name in FORMATS if FORMATS[name]]
    name = next((name for name in names if FORMATS[name] <= row.keys()), None)
    if not prompts and name in _REFUSED:
        raise Mistake(_REFUSED[name])
    if name is None:
        names = [name for name in names if prompts or name not in _REFUSED]
        known = ", ".join("+".join(sorted(FORMATS[name])) for name in names)
        raise Mistake(f"its keys {_keys(row)} are of no known format; there are {known}")
    return name


def unread(row: Any, name: str, prompts: bool = False) -> set[str]:
    """Return the keys of a row, and those of its messages as "message.name", that are not read.

    prompts: as for a row of `prompt_of`, which keeps all keys of the row itself.
    """
    read = {SYSTEM, *FORMATS[name], *_ALSO_READ.get(name, ())}
    values = row if isinstance(row, dict) else {}
    more = () if prompts else values.keys() - read
    keys = {key for key in more if values[key] is not None}
    for messages in [row] if name == "list" else [values.get(key) for key in read]:
        for message in messages if isinstance(messages, list) else ():
            more = message.keys() - _OF_A_MESSAGE if isinstance(message, dict) else ()
            keys |= {f"message.{key}" for key in more if message[key] is not None}
    return keys


def messages_of(row: Any, name: str, tools: bool = True) -> list[Message]:
    """Return the messages of a row of this format, which end with an answer.

    tools: whether calls of tools stay in answers. Raises Mistake for a row that is no conversation
    to learn from.
    """
    messages = _checked(_messages(row, name))
    if not tools:
        messages = [m | {"content": _joined(m["content"], calls=False)} for m in messages]
    return messages


def pair_of(row: Any, tools: bool = True) -> tuple[list[Message], list[Message]]:
    """Return the conversations with the chosen and the rejected answer of a row of preferences.

    tools: as for `messages_of`. Raises Mistake for a row that is no such pair.
    """
    prompt = _prompt_of_pair(_of_format(row, "preferences"))
    both = []
    for side in ("chosen", "rejected"):
        whole = {"messages": _with_answer(row, side, prompt), SYSTEM: row.get(SYSTEM)}
        try:
            both.append(messages_of(whole, "messages", tools))
        except Mistake as error:
            raise Mistake(f"{side}: {error}") from None
    return both[0], both[1]


def check_pair(chosen: list[Message], rejected: list[Message]) -> None:
    """Raise Mistake unless two conversations differ in their last answer, and only there."""
    pairs = enumerate(zip_longest(chosen, rejected), 1)
    number = next((number for number, (a, b) in pairs if a != b), None)
    if number is None:
        raise Mistake("chosen and rejected are the same: leave the row out")
    if number == len(chosen) == len(rejected):
        return
    if chosen[-1] == rejected[-1]:
        raise Mistake(
            f"chosen and rejected have one answer, only what is before it differs, from message "
            f"{number} on: an answer is compared with another to the same prompt"
        )
    raise Mistake(
        f"chosen and rejected differ from message {number} on, before their last answers: give "
        "both the same prompt, or leave the row out"
    )


def prompt_of(row: Any, name: str) -> dict[str, Any]:
    """Return a row of this format, one of PROMPTS, as {"messages": ..., ...}.

    The messages end with the user's; other keys are kept for a reward, the answer to a question
    among them. Raises Mistake for a row that is no prompt.
    """
    messages = _messages(row, name)
    asked = _checked(messages[:-1] if name == "question" else messages, answered=False)
    kept = {key: row[key] for key in row if key not in (SYSTEM, "messages", PROMPTS[name])}
    if not isinstance(answer := kept.get("answer", ""), str):
        raise Mistake(f"its answer is {_shown(answer)}, not text: write a text, or rename the key")
    return {"messages": asked, **kept}


def _messages(row: Any, name: str) -> list[Any]:
    """Return what a row of this format has for messages. Raises Mistake for another row."""
    messages = _READERS[name](_of_format(row, name))
    if not isinstance(messages, list):
        raise Mistake(f"{_shown(messages)} where the list of messages should be")
    if isinstance(row, dict) and (system := row.get(SYSTEM)) not in (None, ""):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _of_format(row: Any, name: str) -> Any:
    """Return a row. Raises Mistake if it is not of this format."""
    if not isinstance(row, list if name == "list" else dict):
        what = _keys(row) if isinstance(row, dict) else _shown(row)
        raise Mistake(
            f"{what} is not of format {name}, as the first row is: rows of one format go together"
        )
    if missing := [key for key in sorted(FORMATS[name]) if key not in row]:
        raise Mistake(
            f"no {' and no '.join(missing)} among its keys {_keys(row)}, which rows of "
            f"format {name} have, as the first: rows of one format go together"
        )
    return row


def without_end_marks(messages: list[Message]) -> tuple[list[Message], int]:
    """Return messages whose answers do not spell an end, as </s>, and how many answers did.

    Learned as text, such a mark would be spelt after each answer, which then would not end. Raises
    Mistake for an answer that is nothing else.
    """
    kept, n_lost = [], 0
    for number, message in enumerate(messages, 1):
        content = message["content"]
        text = content if isinstance(content, str) else content[-1]
        if message["role"] == "assistant" and isinstance(text, str) and (end := _END.search(text)):
            text = text[: end.start()]
            n_lost += 1
            if not text.strip() and isinstance(content, str):
                raise Mistake(
                    f"message {number} (assistant) is empty but for {end[0].strip()}: write an "
                    "answer, or leave the row out"
                )
            parts = [] if isinstance(content, str) else content[:-1]
            message = message | {"content": _joined([*parts, text])}
        kept.append(message)
    return kept, n_lost


def _sharegpt(row: dict[str, Any]) -> Any:
    messages = row["conversations"]
    if not isinstance(messages, list) or any("role" in m for m in messages if isinstance(m, dict)):
        return messages
    return [_of_sharegpt(number, message) for number, message in enumerate(messages, 1)]


def _of_sharegpt(number: int, message: Any) -> Message:
    if not isinstance(message, dict) or "from" not in message:
        raise Mistake(f"message {number} is {_shown(message)}, no object with from and value")
    if (sender := message["from"]) not in (*_SHAREGPT,):
        known = ", ".join(_SHAREGPT)
        raise Mistake(f"message {number} is from {_shown(sender)}; known are {known}: rename it")
    role, value = _SHAREGPT[sender], message.get("value")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    if role == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": [value], **weight}
    return {"role": role, "content": value, **weight}


def _alpaca(row: dict[str, Any]) -> Any:
    question, more = row["instruction"], row.get("input")
    if not isinstance(more, str | None):
        raise Mistake(f"its input is {_shown(more)}, not text: write a text, or leave it out")
    if isinstance(question, str) and question.strip() and more:
        question = f"{question}\n\n{more}"
    return _pair(question, row["output"])


def _question(row: dict[str, Any]) -> Any:
    answer = row["answer"]
    if isinstance(answer, str):
        texts = _CALCULATED.split(answer)
        calls = [{"call": c, "result": r} for c, r in zip(texts[1::3], texts[2::3], strict=True)]
        answer = [part for pair in zip(texts[::3], [*calls, ""], strict=True) for part in pair]
    return _pair(row["question"], answer)


def _completion(key: str, row: dict[str, Any]) -> Any:
    """Return messages of prompt and completion, each of which may be a list of messages."""
    answer = row[key]
    return _asked(row["prompt"]) + (answer if isinstance(answer, list) else _pair("", answer)[1:])


def _prompt_of_pair(row: dict[str, Any]) -> list[Any]:
    """Return the messages before the answers that a row compares, or [] where these have them."""
    prompt = next((row[key] for key in _PROMPT_OF_PAIR if row.get(key)), None)
    return [] if prompt is None else _asked(prompt)


def _asked(prompt: Any) -> list[Any]:
    """Return the messages of a prompt: a list of them, hh-rlhf's text, or the user's text."""
    if isinstance(prompt, str) and _SPEAKER.match(prompt):
        messages = _transcript(prompt)
        return messages[:-1] if not messages[-1]["content"] else messages
    return prompt if isinstance(prompt, list) else _pair(prompt, "")[:1]


def _with_answer(row: dict[str, Any], side: str, prompt: list[Any]) -> list[Any]:
    """Return the messages up to the answer that is chosen or rejected. Raises Mistake."""
    answer = row[side]
    # Beside messages, as feedback has them, an answer is text, even if it spells speakers.
    if isinstance(answer, str) and _SPEAKER.match(answer) and not row.get("messages"):
        answer = _transcript(answer)
    if not isinstance(answer, list):
        if not prompt:
            raise Mistake(
                f"{side} is {_shown(answer)}, and no prompt is beside: add it as prompt, or begin "
                'both texts with it, as "\\n\\nHuman: Why?\\n\\nAssistant: So."'
            )
        return [*prompt, *_pair("", answer)[1:]]
    # A system message may stand before the question that a row has beside.
    if not prompt or prompt in (answer[: len(prompt)], answer[-2:-1]):
        return answer
    if any(isinstance(m, dict) and m.get("role") in ("system", "user") for m in answer):
        raise Mistake(f"{side} does not begin with the row's prompt: leave one of them out")
    return [*prompt, *answer]


def _transcript(text: str) -> list[Message]:
    """Return the messages of hh-rlhf's text."""
    parts = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _pair(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_READERS: dict[str, Callable[[Any], Any]] = {
    "messages": lambda row: row["messages"],
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "question": _question,
    "completion": lambda row: _completion("completion", row),
    "response": lambda row: _completion("response", row),
    "list": lambda row: row,
    "prompts": lambda row: _asked(row["prompt"]),
}


def _checked(messages: list[Any], answered: bool = True) -> list[Message]:
    """Return messages in the form that `chat` takes; each is checked. Raises Mistake.

    answered: whether the last of them is an answer, or else the user's.
    """
    if not messages:
        raise Mistake("it has no messages: leave the row out")
    checked: list[Message] = []
    calls: dict[str, str] = {}  # called, and not answered yet, by their ids
    before = None  # the role of the message before
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message:
            raise Mistake(f"message {number} is {_shown(message)}, no object with role and content")
        role = message["role"]
        if role not in (*ROLES, "tool"):
            raise Mistake(
                f"message {number} has the role {_shown(role)}; known are {', '.join(ROLES)} and "
                "tool: rename it"
            )
        name = f"message {number} ({role})"
        if (weight := message.get("weight")) not in (None, 0, 1) or isinstance(weight, bool):
            raise Mistake(f"{name} has the weight {_shown(weight)}: 1 is learned, 0 only read")
        if calls and role != "tool":
            call = _shown_text(next(iter(calls.values())))
            raise Mistake(f"{name} comes before the result of {call}, which role tool gives")
        if role == "system" and checked:
            raise Mistake(f"{name} is not the first: make it the first, or a user's")
        if role == before == "user":
            raise Mistake(f"{name} follows another of the user: join them, or add the answer")
        if role == before == "assistant":
            raise Mistake(f"{name} follows another answer: join them, or add the question")
        if role == "assistant" and before in (None, "system"):
            raise Mistake(f"{name} answers before any question: leave it out, or add the question")
        called = message.get("tool_calls") or []
        content = _parts(message.get("content"), name, role == "tool" or bool(called))
        if role != "assistant" and (called or not all(isinstance(p, str) for p in content)):
            raise Mistake(f"{name} calls a tool: only an assistant does")
        if role == "tool":
            if not calls:
                raise Mistake(f"{name} is a result, but the answer before it calls nothing")
            key = str(message.get("tool_call_id") or next(iter(calls)))
            if key not in calls:
                raise Mistake(f"{name} has the tool_call_id {_shown(key)}, which was not called")
            content = [{"call": calls.pop(key), "result": "".join(content)}]
        else:
            calls = _calls(called, name)
        if role == "tool" or before == "tool" and role == "assistant":  # the answer goes on
            checked[-1]["content"] += content
        else:
            checked.append({"role": role, "content": content})
        if weight == 0:
            checked[-1]["weight"] = 0
        before = role
    if not answered and before != "user":
        raise Mistake(
            f"its last message, of {before}, is not the user's, which the run shall answer: leave "
            "it out"
        )
    if answered and (before != "assistant" or calls):
        raise Mistake(f"its last message, of {before}, is no answer: add one, or leave the row out")
    return [m | {"content": _joined(m["content"])} for m in checked]


def _parts(content: Any, name: str, may_be_empty: bool) -> list[Any]:
    """Return the texts and calls of a message's content. Raises Mistake."""
    parts = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case str() | {"call": str(), "result": str()}:
                parts.append(part)
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case None if may_be_empty:
                pass
            case {"type": kind}:
                raise Mistake(f"{name} has a part of type {_shown(kind)}: only text can be learned")
            case _:
                raise Mistake(
                    f"{name} has the content {_shown(part)}, not text: write one, or leave it out"
                )
    texts = [t for p in parts for t in ([p] if isinstance(p, str) else [p["call"], p["result"]])]
    if not may_be_empty and not "".join(texts).strip():
        raise Mistake(f"{name} is empty: write a text, or leave it out")
    return parts


def _calls(called: Any, name: str) -> dict[str, str]:
    """Return the text of each of OpenAI's tool_calls by its id, or place. Raises Mistake."""
    if not isinstance(called, list):
        raise Mistake(f"{name} has the tool_calls {_shown(called)}, no list")
    texts = {}
    for place, call in enumerate(called):
        match call:
            case str():
                texts[str(place)] = call
            case {"function": {"name": str(function), "arguments": arguments}}:
                if isinstance(arguments, str):  # JSON, as OpenAI writes it
                    try:
                        arguments = json_files.parse(arguments)
                    except ValueError:
                        raise Mistake(
                            f"{name} calls {function} with {_shown(arguments)}, which is not JSON"
                        ) from None
                value = {"name": function, "arguments": arguments}
                texts[str(call.get("id") or place)] = json.dumps(value, ensure_ascii=False)
            case _:
                raise Mistake(
                    f"{name} has the tool call {_shown(call)}, no function with name and arguments"
                )
    if len(texts) < len(called):
        raise Mistake(f"{name} has two tool calls with the id {_shown(call.get('id'))}")
    return texts


def _joined(content: Any, calls: bool = True) -> Any:
    """Return content as one text if it is one; neighbouring texts are joined. Raises Mistake."""
    joined: list[Any] = []
    for part in [content] if isinstance(content, str) else content:
        if not isinstance(part, str):
            joined += [part] if calls else []
        elif joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    if not joined:
        raise Mistake("an answer is nothing but calls: leave out --tools drop, or the row")
    return joined[0] if len(joined) == 1 and isinstance(joined[0], str) else joined


def _keys(row: dict[str, Any]) -> str:
    return _shown_text(", ".join(map(str, row)) or "(none)")


def _shown(value: Any) -> str:
    return _shown_text(json.dumps(value))


def _shown_text(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
