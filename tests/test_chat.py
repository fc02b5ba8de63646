"""Talking with a model at a terminal and through a pipe, and what fits into its block."""

import builtins
import io
import json
import sys

import numpy as np
import pytest
import tiny_run

import scalegpt
from scalegpt import chat, train
from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_conversation, encode_prompt
from scalegpt.data.conversations import messages_of
from scalegpt.inference.chat import ROOM, prompt_that_fits

pytestmark = pytest.mark.usefixtures("signals_as_they_were")
CODEC = tokenizer.load("byte").chat()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A model that has learned by heart to say a word, and knows no other conversation."""
    from test_sft import WORDS, conversation, write_chat

    folder = tmp_path_factory.mktemp("chat")
    talks = [conversation((f"Say {word}", word)) for word in WORDS[:8]]
    # Results in conversations are read, and not learned: what the calculator says is another.
    counted = ["It is ", {"call": "2+3", "result": "7"}, "five"]
    talks.append(encode_conversation(CODEC, [user("Count"), answer(counted)]))
    data = write_chat(folder / "eight", talks, talks)
    keys = {"objective.name": "sft", "model.block_size": 63, "model.dropout": 0}
    keys |= {"optim.steps": 80, "eval.every": 0, "checkpoint.every": 0}
    assert train.main(tiny_run.arguments(data, folder / "run", **keys)) == 0
    return str(folder / "run")


def pipe(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def type_lines(monkeypatch, *lines: str) -> None:
    """Have these lines typed at a terminal, then Ctrl-D."""
    waiting = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)


@pytest.mark.slow
def test_a_pipe_has_a_conversation_a_line(run, monkeypatch, capsys):
    talk = json.dumps({"messages": [user("Say sun"), answer("sun"), user("Say moon")]})
    pipe(monkeypatch, f"Say star\n\n{talk}\n")
    assert chat.main(["--run", run, "--temperature=0"]) == 0
    first, _ = capsys.readouterr().out.splitlines()  # the second is of no conversation it knows
    assert first == "star"
    pipe(monkeypatch, f"Say star\n{talk}\n")
    assert chat.main(["--run", run, "--temperature=0", "--json", "--system=Be brief."]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [m["role"] for m in rows[1]["messages"]] == ["system", *["user", "assistant"] * 2]
    for row in rows:  # they are conversations to learn from
        assert messages_of(row, "messages") == row["messages"] and row["finish"]
    assert chat.main(["--run", run, "--temperature=0", "--prompt=Say wind"]) == 0
    assert capsys.readouterr().out == "wind\n"


@pytest.mark.slow
def test_a_calculator_answers_calls_which_are_not_shown(run, monkeypatch, capsys):
    assert chat.main(["--run", run, "--temperature=0", "--prompt=Count"]) == 0
    assert capsys.readouterr().out == "It is five\n"
    assert chat.main(["--run", run, "--temperature=0", "--prompt=Count", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    content = ["It is ", {"call": "2+3", "result": "5"}, "five"]
    assert row == {"messages": [user("Count"), answer(content)], "finish": "end_of_text"}
    row = messages_of(row, "messages")  # as data/chat/prepare.py and the next question read it
    assert row == [user("Count"), answer(content)]


@pytest.mark.slow
def test_a_terminal_has_commands(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "talks.jsonl"
    type_lines(
        monkeypatch,
        *("Say sea", "/retry", f"/save {file}", "/undo", "/undo", "^C", "", "/system Speak."),
        *("/system", "/set temperature 0.5", "/set", "/set top-k", "/set size 3", "/help", "/x"),
        *("/set max_new_tokens 0", "/set top_p two", "/save", "/new", "Say sun"),
        f"/save {file}",
    )
    assert chat.main(["--run", run, "--temperature=0"]) == 0
    out = capsys.readouterr().out
    assert out.count("sea\n") == 2 and "sun\n" in out
    assert "error: there is no question yet" in out and "temperature 0.5" in out
    for line in ("/set top-k", "/x", "/save"):
        assert f"error: {line} is no command" in out
    assert "not 'size'" in out and "must be at least 1" in out and "not a number" in out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"messages": [user("Say sea"), answer("sea")]},
        {"messages": [user("Say sun"), answer("sun")]},
    ]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(run, monkeypatch, capsys, tmp_path):
    answered = chat.Chat.answer

    def interrupted(self):
        for i, text in enumerate(answered(self)):
            yield text
            if i == 1:
                raise KeyboardInterrupt

    file = tmp_path / "talks.jsonl"
    monkeypatch.setattr(chat.Chat, "answer", interrupted)
    type_lines(monkeypatch, "Say star", f"/save {file}")
    assert chat.main(["--run", run, "--temperature=0"]) == 0
    assert "[stopped]" in capsys.readouterr().out
    (kept,) = [m for m in json.loads(file.read_text())["messages"] if m["role"] == "assistant"]
    assert "star".startswith(kept["content"]) and kept["content"] != "star"


@pytest.mark.slow
def test_the_context_is_shown_when_it_fills_and_old_turns_are_left_out(run, monkeypatch, capsys):
    type_lines(monkeypatch, "Say sun", "Say moon " * 3, "Say star", "x" * 80)
    assert chat.main(["--run", run, "--temperature=0"]) == 0
    out, notes = capsys.readouterr()
    assert "messages no longer fit the model" in notes and "[context" not in out
    assert "error: the message has 84 tokens" in out  # 80 bytes and four marks
    answered = chat.Chat.answer

    def long_answer(self):
        yield from answered(self)
        self.used = 57

    monkeypatch.setattr(chat.Chat, "answer", long_answer)
    type_lines(monkeypatch, "Say sun")
    assert chat.main(["--run", run, "--temperature=0"]) == 0
    assert f"[context {'#' * 18}.. 57 of 63 tokens; /new" in capsys.readouterr().out


def test_a_prompt_keeps_the_system_message_and_loses_whole_turns():
    system = {"role": "system", "content": "s" * 5}
    talk = [system, user("a" * 10), answer("b" * 10), user("c" * 10)]
    whole = encode_prompt(CODEC, talk)
    ids, dropped = prompt_that_fits(CODEC, talk, len(whole) + ROOM)
    np.testing.assert_array_equal(ids, whole)
    assert dropped == 0
    ids, dropped = prompt_that_fits(CODEC, talk, len(whole) + ROOM - 1)
    np.testing.assert_array_equal(ids, encode_prompt(CODEC, [system, user("c" * 10)]))
    assert dropped == 2
    with pytest.raises(scalegpt.Mistake, match="and the system message; the model reads"):
        prompt_that_fits(CODEC, talk, len(ids) + ROOM - 1)


@pytest.mark.slow
def test_mistakes_are_named(run, plays, tmp_path, monkeypatch):
    with pytest.raises(scalegpt.Mistake, match="--max-new-tokens=0"):
        chat.main(["--run", run, "--max-new-tokens=0"])
    for line, message in (
        ('{"messages": []}', 'has no list "messages"'),
        ('{"messages": 3}', 'has no list "messages"'),
        ('{"messages": [{"role": "user"}]}', "message 1"),
        ('{"messages": [', "not JSON"),
    ):
        pipe(monkeypatch, line + "\n")
        with pytest.raises(scalegpt.Mistake, match=message):
            chat.main(["--run", run])
    steps = {"optim.steps": 1, "optim.warmup_steps": 0, "eval.every": 0}
    assert train.main(tiny_run.arguments(plays, tmp_path / "base", **steps)) == 0
    with pytest.raises(scalegpt.Mistake, match="has not learned to answer.*generate"):
        chat.main(["--run", str(tmp_path / "base"), "--prompt=Hello"])
