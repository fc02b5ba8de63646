"""Questions with answers that can be checked: these on every machine, words of tests held out, and
what counts as right."""

import string
import sys
import textwrap

import numpy as np
import pytest
from terminal import Screen
from test_prepare import bins, module

from scalegpt.data import generated, rewards, tokenizer
from scalegpt.data.prepare import stable_fraction
from scalegpt.data.token_files import open_dataset
from scalegpt.errors import Mistake

BYTES = tokenizer.load("byte").chat()
END = BYTES.end


def pairs(task, count, split="train", seed=0):
    """(question, answer) of generated examples"""
    made = generated.examples(task, seed, count, split)
    assert all([m["role"] for m in x["messages"]] == ["user"] for x in made)
    return [(x["messages"][0]["content"], x["answer"]) for x in made]


def test_examples_are_these_on_every_machine():
    assert {task: pairs(task, 1)[0] for task in generated.TASKS} == {
        "reverse": ("Reverse the word breekea.", "aekeerb"),
        "sort": ("Sort the digits 501400.", "000145"),
        "add": ("What is 95 + 19?", "114"),
        "spell": ("Spell the word fle.", "f-l-e"),
        "count": ("How many r are in praplo?", "1"),
    }
    assert pairs("reverse", 3) == pairs("reverse", 5)[:3]
    assert len({*pairs("sort", 5), *pairs("sort", 5, seed=1), *pairs("sort", 5, "test")}) == 15


def solved(task, question):
    """The answer, from the question alone."""
    *_, last = words = question.rstrip(".?").split()
    match task:
        case "reverse":
            return "".join(reversed(last))
        case "sort":
            return "".join(d * last.count(d) for d in string.digits)
        case "add":
            return str(int(words[2]) + int(last))
        case "spell":
            return "-".join(last)
        case "count":
            return str(len(last.split(words[2])) - 1)


@pytest.mark.parametrize("task", generated.TASKS)
def test_answers_are_right_and_no_word_of_a_test_is_trained_on(task):
    train, test = pairs(task, 1500), pairs(task, 300, "test")
    assert all(solved(task, question) == answer for question, answer in train + test)
    subjects = [
        {
            "+".join(sorted(q[8:-1].split(" + "), key=int)) if task == "add" else q.split()[-1][:-1]
            for q, _ in part
        }
        for part in (train, test)
    ]
    assert not subjects[0] & subjects[1]
    for part, of_test in zip(subjects, (False, True), strict=True):
        assert all((stable_fraction(s) < generated.TEST_SHARE) == of_test for s in part)
    if task not in ("sort", "add"):
        words = subjects[0]
        assert len(words) > 1200 and {*map(len, words)} == {*range(3, 9)}
        assert {*"".join(words)} == {*string.ascii_lowercase}
    if task == "count":
        assert {"0", "1", "2"} < {answer for _, answer in train}


def test_another_task_is_a_mistake():
    with pytest.raises(ValueError, match="no task 'revers': there are reverse, sort"):
        generated.examples("revers", 0, 1)


def test_prepare_writes_conversations_with_tests_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    argv = ["--tasks=spell,add", "--count=60", f"--out={tmp_path / 'x'}"]
    assert module("tasks").main(argv) == 0
    assert "/126 [" in screen.getvalue() and screen.lines == [""], "a bar of one line, then none"
    ids, meta = bins(tmp_path / "x")
    assert meta["kind"] == "chat" and meta["dtype"] == "int32" and meta["vocab_size"] == 263
    assert meta["train"]["documents"] == 120 and meta["val"]["documents"] == 6
    text = {}
    for split, signed in ids.items():
        learned = signed[signed >= 0]
        assert meta[split]["trained"] == len(learned)
        assert meta[split]["bytes"] == (learned != END).sum()
        text[split] = BYTES.decode(np.where(signed < 0, ~signed, signed), marks=True)
    for split, source in (("train", "train"), ("val", "test")):
        question, answer = pairs("spell", 1, source, seed=1)[0]
        begin = f"<|bos|><|user|>{question}<|end|><|assistant|>{answer}<|end|><|bos|>"
        assert text[split].startswith(begin)
    assert module("tasks").main(argv) == 0  # nothing to do
    for wrong, message in (
        ("--tasks=spell,ad", "no task 'ad'"),
        ("--tasks=add,add", "names a task twice"),
        ("--count=0", "--count=0 must be at least 1"),
        ("--count=61", "holds 'tasks=.*count=60"),
    ):
        with pytest.raises(ValueError, match=message):
            module("tasks").main([wrong, argv[-1]])


def test_prepare_writes_prompts_alone(tmp_path, capsys):
    argv = ["--prompts", "--tasks=spell,add", "--count=60", f"--out={tmp_path / 'x'}"]
    assert module("tasks").main(argv) == 0
    data = open_dataset(tmp_path / "x")
    for split, source in ((data.train, "train"), (data.val, "test")):
        made = [generated.examples(task, 1, len(split) // 2, source) for task in ("spell", "add")]
        assert [*split] == [x for both in zip(*made, strict=True) for x in both]
    assert (len(data.train), len(data.val)) == (120, 6)
    train = f"scalegpt.train --config grpo --data.path={tmp_path / 'x'} --run.init_from=...\n"
    assert capsys.readouterr().out.endswith(train)
    with pytest.raises(ValueError, match="prompts=True"):
        module("tasks").main(argv[1:])
    (tmp_path / "x" / "val.jsonl").unlink()
    with pytest.raises(Mistake, match=r"no val.jsonl; .* val.jsonl, .*chat/prepare.py .*--prompts"):
        open_dataset(tmp_path / "x")


# --- what counts as right


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "flexible"),
    [
        ("So 9 and 9.\n#### 18", "18", 1, 1),
        ("####18", "18", 1, 1),
        ("#### 18.00", "9 + 9 = <<9+9=18>>18.\n#### 18", 1, 1),
        ("#### 1,000.", "1000", 1, 1),
        ("#### $1,000,000", "1000000.0", 1, 1),
        ("#### -3", "-3", 1, 1),
        ("#### -$3", "-3", 1, 1),
        ("#### 3", "-3", 0, 0),
        ("It is 18.", "18", 0, 1),
        ("18 or 19", "18", 0, 0),
        ("9-18", "18", 0, 1),
        ("#### 18\n#### 19", "18", 1, 0),
        ("#### 17, no: 18", "18", 0, 1),
        ("#### .5", "0.50", 1, 1),
        ("#### eighteen", "18", 0, 0),
        ("", "18", 0, 0),
        ("#### 1 8", "18", 0, 0),
    ],
)
def test_numbers_are_compared_by_value(answer, gold, strict, flexible):
    example = {"answer": gold}
    assert rewards.number(example, answer) == strict
    assert rewards.last_number(example, answer) == flexible


def test_texts_are_compared_as_they_are():
    example = {"answer": "tenalp"}
    for answer in ("tenalp", " tenalp\n", "Tenalp", "It is tenalp.", ""):
        assert rewards.exact(example, answer) == (answer.strip() == "tenalp")


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("0123", 1),
        (" 0123\n", 1),
        ("012", 3 / 4),
        ("0132", 2 / 4),
        ("01234", 4 / 5),
        ("123", 0),
        ("", 0),
    ],
)
def test_characters_in_place_are_a_share(answer, share):
    assert rewards.in_place({"answer": "0123"}, answer) == share
    assert rewards.in_place({"answer": ""}, "") == 0


def test_rewards_are_loaded_by_name_or_from_a_users_module(tmp_path, monkeypatch):
    assert rewards.load("in_place")({"answer": "ab"}, "ac") == 0.5
    code = """
    import numpy as np

    def brevity(example, answer):
        return np.float32(1 / len(answer))

    def lost(example, answer):
        return float("nan") if answer else None

    def taker(example, answer):
        return float(example["messages"].pop()["content"] == "Why?")

    constant = 5
    """
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(code))
    (tmp_path / "my_broken.py").write_text("x = 1\n\ny = x.z")
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"messages": [{"role": "user", "content": "Why?"}], "answer": "many"}
    assert rewards.load("my_rewards:brevity")(asked, "four") == 0.25
    taker = rewards.load("my_rewards:taker")
    assert taker(asked, "") == taker(asked, "") == 1  # which changes a copy
    for name, answer, *words in (
        ("my_rewards:brevity", "", "ZeroDivisionError", "my_rewards.py, line 5", "Why?"),
        ("my_rewards:lost", "five", "is nan, of the answer 'five'", "Why?", "a finite number"),
        ("my_rewards:lost", "", "TypeError", "Why?"),
        ("number", "5", 'no number in its "answer"', "Why?"),
    ):
        with pytest.raises(Mistake) as error:
            rewards.load(name)(asked, answer)
        assert all(word in str(error.value) for word in (f"reward {name}", *words)), error.value
    with pytest.raises(Mistake, match='no text under "answer"'):
        rewards.load("exact")({"messages": []}, "5")
    for name, message in (
        ("exakt", "no reward 'exakt': there are exact, in_place, number, last_number, and your"),
        ("my_rewards:length", "my_rewards has no function 'length'"),
        ("my_rewards:constant", "my_rewards has no function 'constant'"),
        ("my_reward:brevity", "cannot import 'my_reward'.*current folder"),
        ("my_broken:f", "cannot import 'my_broken'.*AttributeError.*my_broken.py, line 3"),
        (":f", "cannot import ''"),
    ):
        with pytest.raises(Mistake, match=message):
            rewards.load(name)
