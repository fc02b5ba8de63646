"""CORE: every prompt, span and figure against a second writing of nanochat's definition, which asks
the same model for one prompt after the other, and the same on any mesh."""

import json
import math
import random
import zlib
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_tasks import TINY, placed, tiny_steps, weights  # noqa: F401

from scalegpt.data import tokenizer
from scalegpt.inference import core, likelihood, tasks
from scalegpt.inference.likelihood import Row
from scalegpt.model.gpt import head_table, logits

BYTES = tokenizer.load("byte")
WORDS = "ant bee cow dog elk fox gnu hen".split()
BASELINES = {"letters": 25.0, "endings": 50, "who": 50, "copy": 0}


def bundle(folder, rows=14):
    """A bundle of all three kinds: choices of a letter and of a text, a schema, and a copy."""
    rng = random.Random(0)
    data = {"letters": [], "endings": [], "who": [], "copy": []}
    for i in range(rows):
        query = f"{rng.choice(WORDS)} {rng.choice(WORDS)}?"
        data["letters"].append({"query": query, "choices": [*"ABCD"], "gold": i % 4})
        endings = rng.sample(WORDS, 2)
        if i % 5 == 0:  # one is the beginning of the other, and has no token of its own
            endings = sorted([endings[0], " ".join(endings)], reverse=i % 10 == 0)
        data["endings"].append({"query": query, "choices": endings, "gold": i % 2})
        options = [f"the {word} saw it and" for word in rng.sample(WORDS, 2)]
        ending = rng.choice(WORDS)
        data["who"].append({"context_options": options, "continuation": ending, "gold": i % 2})
        word = "".join(rng.sample("abcdefghijk", 7))
        data["copy"].append({"context": f" {word} {word} ", "continuation": word})
    kinds = ["multiple_choice", "multiple_choice", "schema", "language_modeling"]
    shots, listed = (3, 0, 1, 2), []
    for (label, examples), kind, count in zip(data.items(), kinds, shots, strict=True):
        file = folder / "eval_data" / kind / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in examples))
        listed.append(
            {
                "label": label,
                "dataset_uri": f"{kind}/{label}.jsonl",
                "num_fewshot": [count],
                "icl_task_type": kind,
                "has_categories": True,
            }
        )
    listed[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))  # which is YAML too
    table = [f'{label},x,{value},"of\nguessing"' for label, value in BASELINES.items()]
    columns = "Eval Task,Task Category,Random baseline,Description"
    (folder / "eval_meta_data.csv").write_text("\n".join([columns, *table]))
    return folder


# --- the definition, written again: text by text, and one prompt after the other


def reference(folder, logits_after, block, limit=None):
    """{label: (accuracy, centred, error, prompts cut)}; logits_after: (ids) -> logits [T, V]."""
    found = {}
    for task in json.loads((folder / "core.yaml").read_text())["icl_tasks"]:
        kind, delimiter = task["icl_task_type"], task.get("continuation_delimiter", " ")
        text = (folder / "eval_data" / task["dataset_uri"]).read_text()
        data = [json.loads(line) for line in text.splitlines()]
        random.Random(1337).shuffle(data)
        data, right, cut = data[:limit], [], 0
        for i, item in enumerate(data):
            drawn = random.Random(1234 + i).sample(
                [row for j, row in enumerate(data) if j != i],
                min(task["num_fewshot"][0], len(data) - 1),
            )
            before, prompts, spans = "", [], []
            if kind == "multiple_choice":
                for row in drawn:
                    before += row["query"] + delimiter + row["choices"][row["gold"]] + "\n\n"
                prompts = [before + item["query"] + delimiter + c for c in item["choices"]]
            elif kind == "schema":
                for row in drawn:
                    before += row["context_options"][row["gold"]]
                    before += delimiter + row["continuation"] + "\n\n"
                ending = delimiter + item["continuation"]
                prompts = [before + option + ending for option in item["context_options"]]
            else:
                for row in drawn:
                    before += row["context"].strip() + delimiter + row["continuation"] + "\n\n"
                before += item["context"].strip() + delimiter
                prompts = [before.strip(), before + item["continuation"]]
            ids = [[0, *prompt.encode()] for prompt in prompts]  # of bytes, the mark is 0
            if kind == "multiple_choice":
                same = 0
                while all(x[: same + 1] == ids[0][: same + 1] for x in ids) and all(
                    same < len(x) for x in ids
                ):
                    same += 1
                spans = [(same, len(x)) for x in ids]
            elif kind == "schema":
                same = 0
                while all(x[-same - 1 :] == ids[0][-same - 1 :] for x in ids):
                    same += 1
                spans = [(len(x) - same, len(x)) for x in ids]
            else:
                assert ids[1][: len(ids[0])] == ids[0]
                spans, ids = [(len(ids[0]), len(ids[1]))], ids[1:]
            losses = []
            for x, (start, end) in zip(ids, spans, strict=True):
                less = max(0, len(x) - block)
                cut += less > 0 and start < end
                x, start, end = x[less:], start - less, end - less
                scores = np.asarray(logits_after(x), np.float64)[start - 1 : end - 1]
                targets = x[start:end]
                if kind == "language_modeling":
                    right.append((scores.argmax(-1) == targets).all())
                    continue
                norm = np.log(np.exp(scores).sum(-1))
                loss = norm - scores[np.arange(len(targets)), targets]
                losses.append(float(loss.mean()) if len(loss) else math.nan)
            if losses:
                right.append(losses.index(min(losses)) == item["gold"])
        acc, n = np.mean(right), len(right)
        baseline = BASELINES.get(task["label"], 0)
        centred = (acc - 0.01 * baseline) / (1.0 - 0.01 * baseline)
        found[task["label"]] = (acc, centred, math.sqrt(acc * (1 - acc) / (n - 1)), cut)
    return found


def check(results, want):
    *parts, (name, overall, counts) = results
    assert [part[0] for part in parts] == [f"core/{label}" for label in want]
    errors = []
    for (_, found, counts_), (label, right) in zip(parts, want.items(), strict=True):
        acc, centred, error, cut = right
        room = 1 - 0.01 * BASELINES.get(label, 0)
        assert found["acc"] == pytest.approx((acc, error), rel=1e-12), label
        assert found["centered"] == pytest.approx((centred, error / room), rel=1e-12), label
        assert counts_["cut"] == cut, label
        errors.append(error / room)
    mean = np.mean([right[1] for right in want.values()])
    error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    assert (name, counts) == ("core", {"tasks": len(want)})
    assert overall["mean"] == pytest.approx((mean, error), rel=1e-12)


# --- a model of NumPy: what it predicts depends on all ids before, and often repeats the 8th last


def pretended(ids):
    scores = []
    for end in range(1, len(ids) + 1):
        seed = zlib.crc32(bytes(x % 256 for x in ids[:end]))
        scores.append(np.random.default_rng(seed).normal(size=256))
        if end >= 8 and seed % 9:
            scores[-1][ids[end - 8]] += 9
    return np.array(scores)


def pretended_scorer(rows):
    sums, greedy = [], []
    for row in rows:
        scores = pretended(row.ids[:-1].tolist())[-row.scored :]
        targets = row.ids[-row.scored :]
        right = scores[np.arange(row.scored), targets]
        sums.append((right - np.log(np.exp(scores).sum(-1))).sum())
        greedy.append((scores.argmax(-1) == targets).all())
    return np.array(sums), np.array(greedy)


@pytest.mark.parametrize(("block", "limit"), [(300, None), (45, None), (45, 3)])
def test_core_is_a_second_writing_of_its_definition(tmp_path, block, limit):
    folder = bundle(tmp_path)
    opened = tasks.open_task("core", folder, BYTES, block, limit)
    want = reference(folder, pretended, block, limit)
    check(opened.results(*pretended_scorer(opened.rows)), want)
    cut = sum(x[3] for x in want.values())
    assert cut == 0 if block == 300 else cut > 3
    if limit is None:
        assert 0 < want["copy"][0] < 1 and len({x[0] for x in want.values()}) > 2
        assert any(None in rows for part in opened.parts for rows in part.answers)


def test_the_mean_of_the_22_tasks_alone_is_called_core(tmp_path):
    folder = bundle(tmp_path)
    task = json.loads((folder / "core.yaml").read_text())["icl_tasks"][1]
    listed = [{**task, "label": label} for label in core.LABELS]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))
    table = [f"{label},{i}" for i, label in enumerate(core.LABELS)]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Random baseline", *table]))
    opened = tasks.open_task("core", folder, BYTES, 99, 6)
    results = opened.results(*pretended_scorer(opened.rows))
    accs = [found["acc"][0] for _, found, _ in results[:-1]]
    assert len(accs) == 22 and len({*accs}) == 1
    want = np.mean([(accs[0] - 0.01 * i) / (1 - 0.01 * i) for i in range(22)])
    assert results[-1][1]["score"][0] == pytest.approx(want) and results[-1][2] == {"tasks": 22}


def test_rows_of_one_question_that_differ_in_their_last_id_are_one(tmp_path):
    """The four letters of a question, but no two of the rows that have other inputs."""
    opened = tasks.open_task("core", bundle(tmp_path, 4), BYTES, TINY["block_size"])
    groups = likelihood._groups(opened.rows, 3, tiny_steps({}, 1).model)
    lists = [same for _, group in groups for same in group]
    assert sorted(i for same in lists for i in same) == [*range(len(opened.rows))]
    letters = opened.parts[0].answers
    assert all(rows in lists for rows in letters)
    assert len(lists) == len(opened.rows) - 3 * len(letters)
    ids = np.arange(9, dtype=np.int32)
    many = [Row(np.append(ids, i).astype(np.int32), 9) for i in range(4)]
    (_, [one, other]), *_ = likelihood._groups(many, 2, tiny_steps({}, 1).model)
    assert (one, other) == ([0, 1, 2], [3])  # 27 ids are scored in a line of 32, 36 do not fit


LETTERS, COPY = "eval_data/multiple_choice/letters.jsonl", "eval_data/language_modeling/copy.jsonl"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("core.yaml", None, "there is no .*core.yaml; core wants the folder of https://.*unpacked"),
        ("eval_meta_data.csv", None, "there is no .*eval_meta_data.csv; core wants"),
        (LETTERS, None, "there is no .*letters.jsonl, of letters in core.yaml"),
        ("core.yaml", "{", "core.yaml is not valid YAML"),
        ("core.yaml", "[1]", r"core.yaml: =\[1\]: Input should be"),
        ("core.yaml", "icl_tasks: []", "core.yaml: icl_tasks=.* at least 1 item"),
        ("core.yaml", {"icl_task_type": "chat"}, "icl_tasks.0.icl_task_type='chat'.*'schema'"),
        ("core.yaml", {"num_fewshot": []}, "icl_tasks.0.num_fewshot=.* at least 1 item"),
        ("core.yaml", {"num_fewshot": [-1]}, "icl_tasks.0.num_fewshot.0=-1: .*greater than or"),
        ("core.yaml", {"label": "who"}, "core.yaml lists who twice"),
        ("core.yaml", {"label": "x"}, "csv has no 'Random baseline' of 0 up to 100 for x, a task"),
        ("eval_meta_data.csv", "Eval Task\nletters", "csv has no column Random baseline"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nletters,y", "up to 100 for letters"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nletters,100", "up to 100 for letters"),
        (
            "eval_meta_data.csv",
            "x" * 200_000,
            "csv is no table of values with commas: field larger",
        ),
        (LETTERS, "\n", "letters.jsonl is empty"),
        (LETTERS, "[1]", "letters.jsonl, line 1, is no example of letters: it holds a list"),
        (LETTERS, {"gold": 4}, "letters.jsonl, line 2, .*gold is 4, not the index of one of 4"),
        (LETTERS, {"gold": "²"}, "line 2, .*gold is '²', not the index of one of 4"),
        (LETTERS, {"query": 3}, "letters.jsonl, line 2, .*query is 3, not a text"),
        (LETTERS, {"choices": ["A"]}, "line 2, .*not a list of two texts or more"),
        (
            LETTERS,
            {"choices": ["A" * 3, "B" * 60]},
            "line 2, .*60 tokens are to be scored, and the",
        ),
        (COPY, {"continuation": None}, "copy.jsonl, line 2, .*continuation is None"),
    ],
)
def test_a_bad_bundle_is_named(tmp_path, file, change, message):
    path = bundle(tmp_path) / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    elif path.name == "core.yaml":
        listing = json.loads(path.read_text())
        listing["icl_tasks"][0] |= change
        path.write_text(json.dumps(listing))
    else:
        first, second, *rest = path.read_text().splitlines()
        path.write_text("\n".join([first, json.dumps(json.loads(second) | change), *rest]))
    with pytest.raises(ValueError, match=message):
        tasks.open_task("core", tmp_path, BYTES, 50)


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its continuation has no token"):
        core._rows("language_modeling", [np.arange(3), np.arange(3)], 50)
    with pytest.raises(ValueError, match="tokenizer char has none: take a model"):
        tasks.open_task("core", bundle(tmp_path), tokenizer.char_tokenizer(["abc"]), 99)


def test_a_prompt_begins_with_the_token_that_begins_a_text(tmp_path):
    for codec, first in ((BYTES, 0), (replace(BYTES, bos=7), 7)):
        rows = tasks.open_task("core", bundle(tmp_path, 3), codec, 300).rows
        assert {int(row.ids[0]) for row in rows} == {first}


@pytest.mark.slow
def test_a_model_has_its_figures_on_any_mesh(tmp_path, weights):  # noqa: F811
    """Against its logits after each prompt alone; prompts are cut, and letters share a line."""
    folder = bundle(tmp_path, 24)
    steps = tiny_steps({"data": 1}, 1, jax.devices()[:1])
    params, block = placed(steps, weights), TINY["block_size"]
    model = steps.model

    @jax.jit
    def all_logits(ids):
        hidden = model.apply({"params": params}, ids)
        return logits(hidden[0], head_table(params), model.config)

    def logits_after(ids):
        padded = np.zeros((1, block), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(all_logits(padded))[: len(ids), : TINY["vocab_size"]]

    want = reference(folder, logits_after, block)
    assert sum(right[3] for right in want.values()) > 20
    opened = tasks.open_task("core", folder, BYTES, block)
    for mesh, microbatch, devices in (
        ({"data": 1}, 8, jax.devices()[:1]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 3, None),
    ):
        other = tiny_steps(mesh, microbatch, devices)
        score = likelihood.scorer(other)
        check(tasks.run(opened, score, placed(other, weights)), want)
