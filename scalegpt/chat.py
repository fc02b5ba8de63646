"""This command talks with a model that was trained on conversations:
`python -m scalegpt.chat --run out/sft`. With --serve others do, on a page or by programs.
"""

if __name__ == "__main__":
    import gc

    from scalegpt.processes.exits import leave_on_interrupt

    gc.disable()  # until `run_command`: nothing that is imported is garbage
    leave_on_interrupt()

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from scalegpt.config import command_line
from scalegpt.data import conversations
from scalegpt.data.chat import content_of
from scalegpt.data.conversations import Message
from scalegpt.data.templates import with_end
from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.cache import keep_compiled
from scalegpt.inference import sampling
from scalegpt.inference.chat import answer, prompt_that_fits
from scalegpt.inference.continuation import Continuation
from scalegpt.inference.decode import Decoder, decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.processes import startup, streams
from scalegpt.processes.command import run_command
from scalegpt.weights import trained

COMMANDS = """\
/new            begin a new conversation
/system TEXT    begin a new one with this system message; without TEXT, with none
/retry          answer the last question again
/undo           take the last question and its answer back
/save FILE      append the conversation to FILE, as data/chat/prepare.py reads it
/set NAME VALUE temperature, top_k, top_p, min_p, repetition_penalty, prompt_lookup,
                max_new_tokens
/help           this list; Ctrl-C stops an answer, Ctrl-D leaves"""


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    sampler = sampling.from_flags(flags)
    if flags.max_new_tokens < 1:
        raise Mistake(f"--max-new-tokens={flags.max_new_tokens} must be at least 1")
    serving, prepared = _server(flags)
    keep_compiled()
    with startup.start(trained.machine(flags).distributed) as group:
        if group.count > 1:
            raise Mistake("chat is of one process: start it once, on one machine")
        trained.self_check(flags, group)
        if serving:
            model = trained.load(flags, microbatch=1)
            write = decoder(model.steps, model.params, sampler, model.codec().vocab_size)
            serving.serve(flags, prepared, model, write)
            return group.farewell(0)
        chat = Chat.load(flags, sampler)
        if flags.prompt is not None:
            chat.messages.append({"role": "user", "content": flags.prompt})
            _print_answer(chat, flags.json)
        elif not sys.stdin.isatty():
            for line in _lines():
                chat.begin(_conversation(line, chat.system))
                _print_answer(chat, flags.json)
        else:
            _talk(chat)
        return group.farewell(0)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="scalegpt.chat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Talk with a model. From a pipe, each line is a conversation: a question, or "
        'JSON as {"messages": [...]}.\n\n' + COMMANDS,
    )
    trained.add_flags(parser)
    parser.add_argument("--system", help="system message of each conversation")
    parser.add_argument("--prompt", help="answer this, and leave")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="of an answer, at most (default: 512)"
    )
    sampling.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print conversations, as /save does")
    parser.add_argument("--serve", action="store_true", help="serve a page, and OpenAI's API")
    server = parser.add_argument_group("with --serve")
    server.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: %(default)s)"
    )
    server.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    server.add_argument("--parallel", type=int, default=4, help="texts written at once (default 4)")
    server.add_argument("--api-key-file", metavar="FILE", help="holds the key that requests need")
    server.add_argument("--no-api-key", action="store_true", help="other machines need no key")
    server.add_argument("--open", action="store_true", help="open the page in a browser")
    server.add_argument(
        "--collect", action="store_true", help="the page's preferences go to RUN/feedback.jsonl"
    )
    return parser


def _server(flags: argparse.Namespace) -> tuple[Any, Any]:
    """Return the module that serves, and what it has prepared; (None, None) without --serve."""
    of_the_server = ("api_key_file", "no_api_key", "open", "collect")
    unread = ("prompt", "system", "json") if flags.serve else of_the_server
    if given := [name for name in unread if getattr(flags, name)]:
        option = given[0].replace("_", "-")
        raise Mistake(f"--{option} is of a chat {'without' if flags.serve else 'with'} --serve")
    if not flags.serve:
        return None, None
    if flags.prompt_lookup:
        raise Mistake(
            f"--prompt-lookup={flags.prompt_lookup} is of a chat without --serve: a server writes "
            "one token of each text at a time"
        )
    try:
        serving = importlib.import_module("scalegpt.server.serving")
    except ImportError as error:
        raise Mistake(f"--serve needs {error.name}: pip install 'scalegpt[chat]'") from None
    return serving, serving.prepare(flags)


@dataclass
class Chat:
    """A conversation with a model. messages: so far, those of `system` included."""

    model: trained.Trained
    codec: Tokenizer
    write: Decoder
    max_new_tokens: int
    seed: int
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    used: int = 0  # tokens of the last prompt and its answer

    @classmethod
    def load(cls, flags: argparse.Namespace, sampler: Sampler) -> "Chat":
        """Load the model that the flags name. Raises Mistake for one that knows no conversation."""
        model = trained.load(flags, microbatch=1)
        codec = with_end(model.codec())
        if not codec.chats:
            raise Mistake(
                f"{model.name} has not learned to answer: it continues texts, by python -m "
                "scalegpt.generate. To teach it: data/chat/prepare.py, then configs/sft.yaml"
            )
        write = decoder(model.steps, model.params, sampler, codec.vocab_size)
        chat = cls(model, codec, write, flags.max_new_tokens, flags.seed, flags.system)
        chat.begin()
        return chat

    @property
    def block_size(self) -> int:
        return self.model.config.model.block_size

    def begin(self, messages: list[Message] | None = None) -> None:
        """Begin a conversation: with the system message alone, or with these messages."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages, self.used = system if messages is None else messages, 0

    def answer(self) -> Iterator[Continuation]:
        """Yield the growing answer to the last message; each question gets a seed of its own.

        What there is of the answer becomes a message, also if the caller stops reading.
        """
        prompt, dropped = prompt_that_fits(self.codec, self.messages, self.block_size)
        if dropped:
            print(f"[the first {dropped} messages no longer fit the model]", file=sys.stderr)
        seed, text = self.seed + len(self.messages), None
        try:
            for text in answer(self.write, self.codec, prompt, self.max_new_tokens, seed):
                yield text
        finally:
            content = content_of(self.codec, text.ids) if text else ""
            if isinstance(content, str):  # a text that was stopped may end in half a character
                content = text.text if text else ""
            self.messages.append({"role": "assistant", "content": content})
            self.used = len(prompt) + (len(text.ids) if text else 0)

    def undo(self) -> Message | None:
        """Take the last question and its answer back; return the question, or None."""
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]
        del self.messages[asked[-1] :]
        return question

    def save(self, file: str) -> None:
        """Append the conversation to a file, a line. Raises Mistake."""
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise Mistake(f"cannot write {file}: {error.strerror}") from None

    def set(self, name: str, value: str) -> None:
        """Change an option of sampling, or max_new_tokens. Raises Mistake."""
        kinds = {option.name: option.type for option in fields(Sampler)} | {"max_new_tokens": int}
        name = name.replace("-", "_")
        if name not in kinds:
            raise Mistake(f"/set knows {', '.join(kinds)}, and not {name!r}")
        try:
            number = kinds[name](value)
        except ValueError:
            raise Mistake(f"/set {name} {value}: this is not a number") from None
        if name == "max_new_tokens":
            if number < 1:
                raise Mistake(f"/set {name} {value}: it must be at least 1")
            self.max_new_tokens = number
        else:
            sampler = replace(self.write.sampler, **{name: number})
            self.write = decoder(
                self.model.steps, self.model.params, sampler, self.codec.vocab_size
            )


def _print_answer(chat: Chat, as_json: bool) -> None:
    """Print the answer to the conversation's last message, for a pipe or --prompt."""
    printed = ""
    for text in chat.answer():
        if not as_json:
            print(text.text[len(printed) :], end="", flush=True)
            printed = text.text
    row = {"messages": chat.messages, "finish": text.finish}
    print(json.dumps(row, ensure_ascii=False) if as_json else "")


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that hold something."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise Mistake(f"standard input is not UTF-8 text: {error}; convert it first") from None


def _conversation(line: str, system: str | None) -> list[Message]:
    """Return the messages of a line: JSON with "messages", or else the text of a question."""
    row: Any = {"messages": [{"role": "user", "content": line}]}
    if line.lstrip().startswith("{"):
        row = conversations.parse(line)
    if not (isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]):
        raise Mistake(f'the line {line[:40]!r} has no list "messages"')
    # It may be answered if it is a conversation with an answer.
    answered = {"messages": [*row["messages"], {"role": "assistant", "content": "-"}]}
    messages = conversations.messages_of(answered, "messages")[:-1]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _talk(chat: Chat) -> None:
    """Read questions and commands at a terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):  # Windows
        importlib.import_module("readline")  # editing and history for input()
    print(f"{chat.model.name}, step {chat.model.step}; /help lists commands, Ctrl-D leaves")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:  # what was typed is thrown away
            print()
            continue
        except UnicodeDecodeError as error:
            print(f"error: that is not UTF-8 text: {error}")
            continue
        try:
            if line.startswith("/"):
                _command(chat, line)
            elif line.strip():
                chat.messages.append({"role": "user", "content": line})
                _show_answer(chat)
        except Mistake as error:
            print(f"error: {error}")


def _show_answer(chat: Chat) -> None:
    """Show the answer while it is written; Ctrl-C keeps what there is of it."""
    printed, text = "", None
    try:
        for text in (answers := chat.answer()):
            print(streams.visible(text.text[len(printed) :]), end="", flush=True)
            printed = text.text
    except KeyboardInterrupt:
        answers.close()
        print(" [stopped]", end="")
    except Mistake:
        chat.undo()  # the question cannot be answered
        raise
    print(f" [cut at {len(text.ids)} tokens]" if text and text.finish == "length" else "")
    if chat.used > 0.8 * chat.block_size:
        filled = round(20 * chat.used / chat.block_size)
        bar = "#" * filled + "." * (20 - filled)
        print(f"[context {bar} {chat.used} of {chat.block_size} tokens; /new begins anew]")


def _command(chat: Chat, line: str) -> None:
    """Do what a line that begins with / says. Raises Mistake."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name, rest.split():
        case "/new", []:
            chat.begin()
        case "/system", _:
            chat.system = rest or None
            chat.begin()
        case "/retry" | "/undo", []:
            if not (question := chat.undo()):
                raise Mistake("there is no question yet")
            if name == "/retry":
                chat.seed += 1_000_003  # another answer than before
                chat.messages.append(question)
                _show_answer(chat)
        case "/save", [_, *_]:
            chat.save(os.path.expanduser(rest))
            print(f"added to {rest}")
        case "/set", [key, value]:
            chat.set(key, value)
        case "/set", []:
            options = asdict(chat.write.sampler) | {"max_new_tokens": chat.max_new_tokens}
            print(", ".join(f"{name} {value}" for name, value in options.items()))
        case "/help", []:
            print(COMMANDS)
        case _:
            raise Mistake(f"{line} is no command; /help lists them")


if __name__ == "__main__":
    run_command(main)
