"""Tasks that are asked in a chat: prompts, figures, answers in batches of one length; then a model
that learns one and is measured."""

import itertools
import json
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
import tiny_run
from test_prepare import module
from test_tasks import TINY, placed, tiny_steps, write

from scalegpt import evaluate
from scalegpt.config.schema import FileTask, GeneratedTask
from scalegpt.data import asked, generated, tokenizer
from scalegpt.data.token_files import open_dataset
from scalegpt.errors import Mistake
from scalegpt.inference import chat_tasks, tasks
from scalegpt.inference.decode import decoder
from scalegpt.inference.sampling import Sampler
from scalegpt.train import main

BYTES = tokenizer.load("byte").chat()
END = BYTES.end


# --- figures


def test_pass_at_k_is_the_share_of_all_draws():
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = [min(d) < correct for d in itertools.combinations(range(n), k)]
            assert chat_tasks.pass_at(k, n, correct) == pytest.approx(np.mean(draws))


def test_figures_are_over_examples():
    """Two examples, four answers each: 4 and 1 right, 4 and 2 ended."""
    task = chat_tasks.ChatTask("reverse", [{"answer": "ab"}, {"answer": "cd"}], [], 9)
    ids = [[97, 98, END]] * 4 + [[99, 100, END], [99, END], [99, 101], [99] * 9]
    found = chat_tasks.figures(task, BYTES, list(map(np.array, ids)), 4)
    assert list(found) == ["pass@1", "pass@2", "pass@4", "maj@4", "ended", "length"]
    assert found["maj@4"] == (1, 0)  # of four answers of the second one each is given once
    assert found["pass@1"] == pytest.approx((0.625, 0.375))  # |1 - 1/4| / 2 is its error
    assert found["pass@2"] == pytest.approx((0.75, 0.25)) and found["pass@4"] == (1, 0)
    assert found["ended"] == pytest.approx((0.75, 0.25))
    assert found["length"] == pytest.approx(((2 + 14 / 4) / 2, (14 / 4 - 2) / 2))
    one = chat_tasks.ChatTask("gsm8k", [{"answer": "1"}], [], 9)
    found = chat_tasks.figures(one, BYTES, [np.array([*b"it is 1", END])], 1)
    assert found["pass@1"] == (0, 0) and found["flexible_pass@1"] == (1, 0)
    assert not any("maj" in key for key in found)


@pytest.mark.parametrize(
    ("texts", "maj", "flexible"),
    [
        (["#### 1", "#### 2", "#### 1.0"], 1, 1),  # numbers vote by their value
        (["#### 2", "#### 2", "#### 1"], 0, 0),
        (["it is 1", "so", "", "#### 1"], 1, 1),  # what states no number has no vote
        (["2", "2", "#### 1"], 1, 0),
        (["2", "x", ""], 0, 0),
        (["#### 2", "#### 1"], 0, 0),
        (["#### 1", "#### 2"], 1, 1),
    ],
)
def test_most_answers_decide(texts, maj, flexible):
    task = chat_tasks.ChatTask("gsm8k", [{"answer": "#### 1"}], [], 9)
    found = chat_tasks.figures(
        task, BYTES, [np.array([*t.encode(), END]) for t in texts], len(texts)
    )
    assert found[f"maj@{len(texts)}"] == (maj, 0)
    assert found[f"flexible_maj@{len(texts)}"] == (flexible, 0)


# --- tasks


def test_the_configuration_names_the_tasks():
    assert tuple(generated.TASKS) == get_args(GeneratedTask)
    assert {*get_args(FileTask)} == {*tasks.NAMES, *chat_tasks.NAMES} - {*generated.TASKS}


ROW = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


def test_prompts_are_those_of_a_chat(tmp_path):
    file = write(tmp_path / "g", [ROW, ROW | {"system": "Be brief.", "answer": "#### 1,000"}])
    task = chat_tasks.open_task("gsm8k", str(file), BYTES, 99)
    texts = [BYTES.decode(ids, marks=True) for ids in task.ids]
    assert texts[0] == "<|bos|><|user|>How many?<|end|><|assistant|>"
    assert texts[1].startswith("<|bos|><|system|>Be brief.<|end|><|user|>")
    assert task.count == 2 and task.new_tokens == 2 * len("2 + 3 = .2+3=5.5\n#### 5.")
    assert chat_tasks.open_task("gsm8k", str(file), BYTES, 99, 1).count == 1
    made = chat_tasks.open_task("sort", None, BYTES, 99)
    assert made.count == 200 and made.examples == generated.examples("sort", 0, 200, "test")
    assert made.new_tokens == 2 * 9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"question": "Why?"}], "line 2, is no example of gsm8k: no answer among its keys"),
        ([ROW, ROW | {"answer": "many"}], "line 2, is no example of gsm8k: its answer has no numb"),
        ([ROW, ROW | {"answer": 3}], "line 2, is no example of gsm8k: message 2"),
        ([ROW, ROW | {"question": "?" * 96}], "line 2, .*: the prompt has 100 tokens, which leave"),
        ([], "g is empty"),
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        chat_tasks.open_task("gsm8k", str(write(tmp_path / "g", rows)), BYTES, 99)


CHOICES = {"context": "2 + 3?", "choices": ["five", "six", "ten"], "label": 0}


def test_choices_have_letters_in_a_chat(tmp_path):
    file = write(tmp_path / "m", [CHOICES])
    task = tasks.open_task("multiple_choice", file, BYTES, 99)
    asked = "2 + 3?\n- five=A\n- six=B\n- ten=C\nAnswer with the letter alone."
    for row, letter in zip(task.rows, "ABC", strict=True):
        text = BYTES.decode(row.ids, marks=True)
        assert text == f"<|bos|><|user|>{asked}<|end|><|assistant|>{letter}" and row.scored == 1
    assert tasks.figures(task, np.array([-1, -2, -3.0]), np.zeros(3, bool))["acc"] == (1, 0)
    base = tasks.open_task("multiple_choice", file, tokenizer.load("byte"), 99)
    assert BYTES.decode(base.rows[0].ids) == "2 + 3? five"
    letters = tokenizer.char_tokenizer(sorted({*asked, "B", "C"} - {"A"})).chat()
    for row, size, codec, message in (
        (CHOICES, 63, BYTES, "line 1, .* the question has 65 tokens with its choices"),
        (CHOICES | {"choices": ["x"] * 27}, 999, BYTES, "27 choices, and there are 26 letters"),
        (CHOICES, 99, letters, "no 'A'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.open_task("multiple_choice", write(tmp_path / "m", [row]), codec, size)


@pytest.mark.parametrize("kind", ["chat", "pairs", "prompts"])
def test_questions_that_were_trained_on_are_refused(tmp_path, kind):
    rows = [{"question": f"n {i}", "answer": "#### 1"} for i in range(40)]
    if kind == "pairs":
        rows = [{"prompt": r["question"], "chosen": "a", "rejected": "b"} for r in rows]
    if kind == "chat":  # a later question of a conversation counts, too
        hi = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        said = [{"role": "user", "content": "n 0"}, {"role": "assistant", "content": "1"}]
        rows = [{"messages": [*hi, *said]}] * 3 + [{"messages": said}] * 3
    argv = [f"--input={write(tmp_path / 'rows', rows)}", f"--out={tmp_path / 'data'}"]
    argv += ["--tokenizer=byte", "--val-fraction=.3", *["--prompts"] * (kind == "prompts")]
    assert module("chat").main(argv) == 0
    data = open_dataset(tmp_path / "data")
    assert data.kind == kind

    def task(*numbers):
        asked = [{"messages": [{"role": "user", "content": f"n {i}"}]} for i in numbers]
        return chat_tasks.ChatTask("gsm8k", asked, [], 9)

    assert asked.asked(data) >= {asked.encoded(BYTES, "n 0")}
    facts = json.loads((tmp_path / "data/meta.json").read_text())["train"]
    n_trained = 1 if kind == "chat" else facts.get("pairs", facts["documents"])
    assert len(asked.seen(BYTES, [f"n {i}" for i in range(40)], data)) == n_trained
    with pytest.raises(ValueError, match=r"1 of 2 questions of gsm8k are trained on .*'n 0'"):
        chat_tasks.refuse_seen(task(0, 99), BYTES, [data])
    chat_tasks.refuse_seen(task(98, 99), BYTES, [data])  # nor are those of validation


def test_a_base_model_is_not_asked():
    with pytest.raises(ValueError, match="task sort is asked in a conversation.*no marks"):
        chat_tasks.open_task("sort", None, tokenizer.load("byte"), 99)


def test_prompts_of_about_one_length_are_answered_together():
    """Each gets its own answer, up to its end, to new_tokens or to the end of the block."""
    batches = []

    def ids(prompts, most, seed, codec):
        batches.append([len(p) for p in prompts])
        lengths = np.array(
            [int(p[0]) for p in prompts]
        )  # of its answer, which a prompt begins with
        for i in range(most):
            yield np.where(i == lengths, END, lengths)

    config = SimpleNamespace(block_size=20)
    steps = SimpleNamespace(model=SimpleNamespace(config=config), layout=(1, 3))
    write = SimpleNamespace(steps=steps, ids=ids)
    sizes = {17: 3, 3: 0, 12: 2, 4: 6, 2: 1, 16: 30, 11: 30, 20: 5, 19: 1}
    prompts = [np.full(n, answer) for n, answer in sizes.items()]
    found = chat_tasks.answers(write, BYTES, prompts, 7)
    for (n, answer), row in zip(sizes.items(), found, strict=True):
        whole = [*[answer] * answer, END] if answer < 7 else [answer] * 7
        assert row.tolist() == whole[: min(7, 21 - n)], n
    assert batches == [[2, 2, 2], [3, 4, 3], [11, 12, 16], [17, 19, 20]]


@pytest.mark.slow
def test_greedy_answers_do_not_depend_on_mesh_and_microbatch():
    shape = TINY | {"vocab_size": 263, "block_size": 40}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 256, n) for n in (5, 38, 9, 33, 12, 7, 30, 20, 17, 8, 36)]
    weights = None

    def run(mesh, microbatch, devices=None):
        nonlocal weights
        steps = tiny_steps(mesh, microbatch, devices, shape)
        if weights is None:
            weights = jax.tree.map(np.asarray, steps.init().params)
            weights = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), weights)
        write = decoder(steps, placed(steps, weights), Sampler(0), 263)
        return [ids.tolist() for ids in chat_tasks.answers(write, BYTES, prompts, 12)]

    alone = run({"data": 1}, 1, jax.devices()[:1])
    assert {*map(len, alone)} >= {12, 3, 5} and len({*map(tuple, alone)}) > 8
    for mesh, microbatch, devices in (
        ({"data": 1}, 4, jax.devices()[:1]),
        ({"data": 8}, 1, None),
        ({"data": 1, "fsdp": 4, "tensor": 2}, 3, None),
    ):
        assert run(mesh, microbatch, devices) == alone


# --- a model


@pytest.mark.slow
def test_a_model_learns_a_task_and_is_measured(tmp_path, capsys):
    """Of numbers that it has not seen, with the figures of its own evaluations."""
    data, run = tmp_path / "digits", str(tmp_path / "run")
    assert module("tasks").main(["--tasks=sort", "--count=3000", f"--out={data}"]) == 0
    keys = {"objective.name": "sft", "model.preset": "modern", "model.n_embd": 64}
    keys |= {"model.n_head": 4, "model.block_size": 63, "model.dropout": None}
    keys |= {"optim.name": "muon", "optim.lr": None, "optim.min_lr": None, "optim.steps": 140}
    keys |= {"batch.sequences": 32, "batch.microbatch": 4, "eval.every": 0, "log.every": 50}
    keys |= {"eval.tasks": "{sort: null}", "eval.task_examples": 64, "checkpoint.every": 0}
    assert main(tiny_run.arguments(data, run, **keys)) == 0
    rows = {key: tiny_run.rows(tmp_path / "run", f"sort/{key}") for key in ("pass@1", "ended")}
    assert rows["pass@1"][0] == rows["ended"][0] == 0
    assert rows["pass@1"][140] > 0.6 and rows["ended"][140] > 0.9
    capsys.readouterr()

    def measured(*argv):
        command = ["--run", run, "--checkpoint", "latest", "--json", "--task", "sort", *argv]
        assert evaluate.main(command) == 0
        return json.loads(capsys.readouterr().out)

    found = measured("--limit", "64")
    assert found["sort/examples"] == 64
    for key, figures in rows.items():
        assert found[f"sort/{key}"] == pytest.approx(figures[140])
    file = str(write(tmp_path / "gsm8k", [ROW]))
    drawn = measured(
        *("--task", "gsm8k", "--file", file, "--samples", "4", "--temperature", "1.5"),
        *("--limit", "16"),
    )
    assert {"gsm8k/pass@1", "gsm8k/flexible_pass@4", "sort/ended"} < drawn.keys()
    question = generated.example("sort", 1, 0)["messages"][0]["content"]
    seen = [
        "--task",
        "gsm8k",
        "--file",
        str(write(tmp_path / "s", [ROW, ROW | {"question": question}])),
    ]
    with pytest.raises(Mistake, match="1 of 2 questions of gsm8k are trained on in .* digits"):
        measured(*seen)
    assert measured(*seen, "--seen", "--limit", "16")["gsm8k/examples"] == 2
    assert 0 < drawn["sort/maj@4"] <= 1
    assert 0 < drawn["sort/pass@1"] < drawn["sort/pass@2"] < drawn["sort/pass@4"]
