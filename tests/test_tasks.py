"""Tasks: every log-likelihood against transformers, every figure against the harness's definition,
and the same on any mesh."""

import gzip
import json
import lzma
import math

import jax
import numpy as np
import pytest
import tiny_gpt2

from scalegpt import evaluate, train
from scalegpt.config import BatchConfig, Config, MeshConfig
from scalegpt.config.command_line import parse
from scalegpt.data import tokenizer
from scalegpt.inference import likelihood, tasks
from scalegpt.inference.likelihood import Row
from scalegpt.run import resume
from scalegpt.step import build
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import trained

BYTES = tokenizer.load("byte")


def lines(path, count, packed=True):
    with (lzma.open if packed else open)(path, "rt") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- against transformers


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, shared_data):
    """(torch's model, rows -> the figures of ours)"""
    folder = tmp_path_factory.mktemp("gpt2")
    model = tiny_gpt2.save(folder)
    ours = trained.from_hugging_face(str(folder), make_mesh(MeshConfig()), 1)
    score = likelihood.scorer(ours.steps)
    return model, lambda rows: score(ours.params, rows, "")


def reference(model, context_ids, continuation_ids):
    """(log-likelihood, greedy) of one example, the beginning cut off where it is too long."""
    ids = [*context_ids, *continuation_ids][-(tiny_gpt2.BLOCK + 1) :]
    scores = tiny_gpt2.log_probabilities(model, ids[:-1], len(continuation_ids))
    right = scores[np.arange(len(scores)), continuation_ids]
    return right.sum(dtype=np.float64), (scores.argmax(-1) == continuation_ids).all()


def cleaned(text):
    """HellaSwag's cleaning, another way than with an expression."""
    text, out = text.strip().replace(" [title]", ". "), ""
    while "[" in text and "]" in text[text.index("[") :]:
        begin = text.index("[")
        out, text = out + text[:begin], text[text.index("]", begin) + 1 :]
    return (out + text).replace("  ", " ")


@pytest.mark.slow
def test_hellaswag_is_transformers_and_the_harness(gpt2, shared_data, tmp_path):
    """100 rows each of its two sources, ActivityNet and, with marks to clean, WikiHow."""
    model, score = gpt2
    rows = lines(shared_data / "evals" / "hellaswag_val.jsonl.xz", 10_042)
    rows = rows[:100] + [row for row in rows if "[" in row["ctx"]][:100]
    task = tasks.open_task(
        "hellaswag", write(tmp_path / "h", rows), tokenizer.load("gpt2"), tiny_gpt2.BLOCK
    )
    sums, greedy = score(task.rows)

    # A space begins a token of GPT-2, so here the ids of the parts are those of the whole.
    encode = tokenizer.load("gpt2").encode
    want, acc, acc_norm, cut = [], [], [], 0
    for row in rows:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        context_ids = encode(cleaned(context)).tolist()
        choices = [cleaned(ending) for ending in row["endings"]]
        ids = [encode(" " + choice).tolist() for choice in choices]
        scores = [reference(model, context_ids, choice)[0] for choice in ids]
        want += scores
        cut += max(map(len, ids)) + len(context_ids) > tiny_gpt2.BLOCK + 1
        acc.append(int(np.argmax(scores)) == int(row["label"]))
        norm = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        acc_norm.append(int(np.argmax(norm)) == int(row["label"]))
    assert cut > 20 and np.std(want) > 10, "nothing is cut, or all is the same"
    np.testing.assert_allclose(sums, want, rtol=0, atol=1e-3)
    assert not greedy.any()

    found = tasks.figures(task, sums, greedy)
    for key, right in (("acc", acc), ("acc_norm", acc_norm)):
        p, n = np.mean(right), len(right)
        assert found[key] == pytest.approx((p, math.sqrt(p * (1 - p) / (n - 1))), rel=1e-12)
    assert acc != acc_norm


def test_lambada_is_transformers_and_the_harness(gpt2, shared_data, tmp_path):
    model, score = gpt2
    rows = lines(shared_data / "evals" / "lambada_openai.jsonl.xz", 200)
    codec = tokenizer.load("gpt2")
    as_text = [{"text": f"{row['context']} {row['continuation']}"} for row in rows]
    task, same = (
        tasks.open_task("lambada", write(tmp_path / name, form), codec, tiny_gpt2.BLOCK)
        for name, form in (("pairs", rows), ("texts", as_text))
    )
    for one, other in zip(task.rows, same.rows, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.scored == other.scored
    sums, greedy = score(task.rows)
    want = [
        reference(model, codec.encode(row["context"]), codec.encode(" " + row["continuation"]))[0]
        for row in rows
    ]
    np.testing.assert_allclose(sums, want, rtol=0, atol=1e-3)
    found = tasks.figures(task, sums, greedy)
    assert found["acc"] == (0.0, 0.0)
    perplexity = math.exp(-np.mean(want))
    error = perplexity * np.std(want, ddof=1) / math.sqrt(len(want))
    assert found["perplexity"] == pytest.approx((perplexity, error), rel=1e-3)
    # Right is what greedy decoding gives, whatever its likelihood.
    assert tasks.figures(task, sums, np.arange(200) < 50)["acc"][0] == 0.25


def test_greedy_means_that_every_token_is_the_likeliest(gpt2):
    model, score = gpt2
    rng, rows, want = np.random.default_rng(0), [], []
    for length, new in ((3, 1), (9, 4), (20, 40), (90, 6)):
        ids = rng.integers(0, 50257, length).tolist()
        for _ in range(new):
            ids.append(int(tiny_gpt2.log_probabilities(model, ids, 1).argmax()))
        for wrong in (None, -1, length):
            other = np.array(ids, np.int32)
            if wrong is not None:
                other[wrong] = (other[wrong] + 1) % 50257
            rows.append(Row(other, new))
            want.append(wrong is None)
    greedy = score(rows)[1]
    assert greedy.tolist() == want


# --- on any mesh


TINY = {
    "n_layer": 1,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 64,
    "vocab_size": 257,
    "vocab_multiple": 16,
    "dtype": "float32",
    "loss_chunk": 24,
}


def tiny_steps(mesh, microbatch, devices=None, model=TINY):
    config = Config(model=model, data={"path": ""}, run={"out_dir": "none"}, batch=BatchConfig())
    return build.build_for_use(config, make_mesh(MeshConfig(**mesh), devices), microbatch)


@pytest.fixture(scope="module")
def weights():
    """Of a model that is not indifferent, as NumPy's."""
    params = tiny_steps({}, 1).init().params
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape), params)


def placed(steps, weights):
    return jax.tree.map(
        lambda x, like: jax.device_put(x.astype(np.float32), like.sharding),
        weights,
        steps.abstract.params,
    )


@pytest.mark.slow
def test_figures_do_not_depend_on_mesh_and_microbatch(weights):
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(37):
        scored = int(rng.integers(1, 65))
        length = int(rng.integers(scored + 1, 34 if scored <= 32 else 66))
        rows.append(Row(rng.integers(0, 257, length).astype(np.int32), scored))
    task = tasks.Task("multiple_choice", [0, 1] * 6, [[3, 4, 5]] * 11 + [[3, 4, 5, 6]], rows)
    words = tasks.Task("lambada", [0] * 37, [[1]] * 37, rows)

    def run(mesh, microbatch, devices=None):
        steps = tiny_steps(mesh, microbatch, devices)
        sums, greedy = likelihood.scorer(steps)(placed(steps, weights), rows, "")
        found = tasks.figures(task, sums, greedy) | {"lambada": tasks.figures(words, sums, greedy)}
        return sums, greedy, found

    sums, greedy, found = run({"data": 1}, 8, jax.devices()[:1])
    assert np.std(sums) > 10
    for mesh, microbatch in (
        ({"data": 8}, 1),
        ({"data": 1, "fsdp": 8}, 3),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    ):
        other = run(mesh, microbatch)
        np.testing.assert_allclose(other[0], sums, rtol=1e-6)
        assert (other[1] == greedy).all()
        assert other[2]["acc"] == found["acc"] and other[2]["acc_norm"] == found["acc_norm"]
        ours, theirs = (x["lambada"]["perplexity"] for x in (other[2], found))
        assert math.log(ours[0]) == pytest.approx(math.log(theirs[0]), rel=1e-6)


# --- what a text is cut into


def test_a_pair_is_encoded_as_the_harness_does(gpt2_tokenizer):
    gpt2 = gpt2_tokenizer
    # The space at the end of a context belongs to what follows; "space" alone is another token.
    row = tasks.encode_pair(gpt2, "outer ", "space", 8)
    assert row.ids.tolist() == gpt2.encode("outer space").tolist() and row.scored == 1
    # Ids of the whole beyond as many as the context has alone, after the context's own.
    row = tasks.encode_pair(gpt2, "I don", "'t", 8)
    whole, alone = gpt2.encode("I don't").tolist(), gpt2.encode("I don").tolist()
    assert row.ids.tolist() == alone + whole[len(alone) :]
    # Without a context there is the mark.
    for context in ("", "  "):
        row = tasks.encode_pair(gpt2, context, "a b", 8)
        assert row.ids.tolist() == [50256, *gpt2.encode(context + "a b")]
    # What is too long loses its beginning, and keeps one token to predict from.
    row = tasks.encode_pair(BYTES, "abcdef", "ghi", 4)
    assert bytes(row.ids.tolist()) == b"efghi" and row.scored == 3
    row = tasks.encode_pair(BYTES, "abcdef", "ghij", 4)
    assert bytes(row.ids.tolist()) == b"fghij" and row.scored == 4
    with pytest.raises(ValueError, match="5 tokens, the model room for 4"):
        tasks.encode_pair(BYTES, "abcdef", "ghijk", 4)
    with pytest.raises(ValueError, match="no mark"):
        tasks.encode_pair(tokenizer.char_tokenizer(["ab"]), "", "a", 4)


def test_hellaswag_is_cleaned_as_in_the_harness(tmp_path):
    row = {
        "activity_label": "Home [x]",
        "ctx_a": "[header] How to sit [title] Sit.  Down.",
        "ctx_b": "the CAT",
        "endings": [" is [step] on [title] it ", "b"],
        "label": "1",
    }
    task = tasks.open_task("hellaswag", write(tmp_path / "h", [row]), BYTES, 99)
    texts = [bytes(row.ids.tolist()).decode() for row in task.rows]
    context = "Home : How to sit. Sit. Down. The cat"
    assert texts == [f"{context} is on. it", f"{context} b"]
    assert (task.gold, task.lengths) == ([1], [[9, 1]])
    assert [row.scored for row in task.rows] == [10, 2]


def test_the_first_of_equal_choices_wins_and_length_is_in_characters():
    task = tasks.Task("multiple_choice", [0, 1], [[2, 4], [2, 4]], [])
    found = tasks.figures(task, np.array([-4.0, -4.0, -3.0, -4.0]), np.zeros(4))
    assert found["acc"] == (0.5, 0.5) and found["acc_norm"] == (0.5, 0.5)
    both = tasks.Task("multiple_choice", [1], [[2, 4]], [])
    assert tasks.figures(both, np.array([-2.0, -4.0]), np.zeros(2))["acc_norm"][0] == 0  # equal


GOOD = {"context": "a", "choices": ["b", "c"], "label": 0}


def test_files_are_read_packed_and_plain(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="a .zst file needs zstandard")
    text = (json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "context": "z\u2028"}) + "\n").encode()
    rename = {"query": "z\u2028", "choices": ["b", "c"], "gold": "0"}
    frames = zstandard.compress(text[:9]) + zstandard.compress(text[9:])
    for name, data in (
        ("a.jsonl", text),
        ("a.gz", gzip.compress(text)),
        ("a.xz", lzma.compress(text)),
        ("a.zst", frames),
        ("b.jsonl", (json.dumps(GOOD) + "\n" + json.dumps(rename)).encode()),
    ):
        (tmp_path / name).write_bytes(data)
        task = tasks.open_task("multiple_choice", tmp_path / name, BYTES, 9)
        assert task.gold == [0, 0] and bytes(task.rows[3].ids.tolist()).decode() == "z\u2028 c"
        assert len(tasks.open_task("multiple_choice", tmp_path / name, BYTES, 9, 1).rows) == 2
        if name in ("a.gz", "a.xz", "a.zst"):
            (tmp_path / name).write_bytes(data[:-5])
            with pytest.raises(ValueError, match=f"cannot read .*{name}"):
                tasks.open_task("multiple_choice", tmp_path / name, BYTES, 9)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("multiple_choice", "{", "line 2, is no example of multiple_choice: not JSON"),
        ("multiple_choice", "[1]", "a list, not an object"),
        ("multiple_choice", "{}", "no 'choices', only nothing"),
        ("multiple_choice", {**GOOD, "label": 2}, "label is 2, not the index of one of 2"),
        ("multiple_choice", {**GOOD, "label": -1}, "label is -1"),
        ("multiple_choice", {**GOOD, "label": "A"}, "label is 'A'"),
        ("multiple_choice", {**GOOD, "label": True}, "label is True"),
        ("multiple_choice", {**GOOD, "label": None}, "label is None"),
        ("multiple_choice", {**GOOD, "choices": "bc"}, "not a list of two texts or more"),
        ("multiple_choice", {**GOOD, "choices": ["b", 3]}, "not a list of two texts or more"),
        ("multiple_choice", {**GOOD, "choices": ["b", ""]}, "a choice is empty"),
        ("multiple_choice", {**GOOD, "context": 3}, "context is 3, not a text"),
        ("multiple_choice", {**GOOD, "choices": ["b", "c" * 9]}, "10 tokens, .* room for 9"),
        ("hellaswag", GOOD, "line 2, is no example of hellaswag: it has no 'endings'|'ctx_a'"),
        ("lambada", GOOD, "neither 'text' nor 'context' and 'continuation'"),
        ("lambada", {"context": "a", "continuation": " "}, "a choice is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, row, message):
    good = {
        "hellaswag": {
            "activity_label": "a",
            "ctx_a": "b",
            "ctx_b": "c",
            "endings": ["d", "e"],
            "label": 0,
        },
        "lambada": {"text": "a b"},
    }.get(task, GOOD)
    text = json.dumps(good) + "\n" + (row if isinstance(row, str) else json.dumps(row))
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        tasks.open_task(task, tmp_path / "f.jsonl", BYTES, 9)
    assert f"{tmp_path / 'f.jsonl'}, line 2," in str(error.value)


def test_a_bad_file_is_named(tmp_path):
    for name, data, message in (
        ("none", None, "cannot read .*none"),
        ("empty", b"", "empty is empty"),
        ("blank", b"\n \n", "blank is empty"),
        ("latin", b"\xe9", "latin is not UTF-8"),
        ("not.xz", b"\xfd7zXZ\0text", "cannot read .*not.xz"),
        ("not.gz", b"\x1f\x8btext", "cannot read .*not.gz"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            tasks.open_task("lambada", tmp_path / name, BYTES, 9)
    (tmp_path / "char").write_text('{"text": "a c"}')
    with pytest.raises(ValueError, match="line 1, .*char tokenizer has no 'c'"):
        tasks.open_task("lambada", tmp_path / "char", tokenizer.char_tokenizer(["ab "]), 9)


# --- while training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    text = np.frombuffer(b"the cat sat on the mat. " * 60, np.uint8).astype("<u2")
    meta = {"format": 1, "tokenizer": {"kind": "byte"}, "vocab_size": 256, "dtype": "uint16"}
    for split in ("train", "val"):
        text.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(text), "bytes": len(text)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def arguments(data, out_dir, **keys):
    keys = {
        "data.path": data,
        "run.out_dir": out_dir,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 16,
        "model.block_size": 32,
        "batch.sequences": 8,
        "optim.steps": 4,
        "optim.warmup_steps": 0,
        "eval.every": 2,
        "checkpoint.every": 0,
        "log.tensorboard": "true",
        **keys,
    }
    return [f"--{key}={value}" for key, value in keys.items()]


def all_rows(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def small_bundle(folder):
    """A bundle of two tasks of core, whose prompts fit into 32 tokens and do not."""
    near = [
        {"query": "cat sat", "choices": ["on", "xz"], "gold": 0},
        {"query": "sat on", "choices": ["zx", "the"], "gold": 1},
    ]
    far = [{**row, "query": f"{row['query']}, the cat sat on the mat"} for row in near]
    table, listed = ["Eval Task,Random baseline"], []
    (folder / "eval_data").mkdir()
    for label, examples in (("near", near), ("far", far)):
        write(folder / "eval_data" / f"{label}.jsonl", examples * 2)
        table.append(f"{label},50")
        listed.append(
            {
                "label": label,
                "dataset_uri": f"{label}.jsonl",
                "num_fewshot": [1],
                "icl_task_type": "multiple_choice",
            }
        )
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))
    (folder / "eval_meta_data.csv").write_text("\n".join(table))
    return folder


@pytest.mark.slow
def test_eval_tasks_are_scored_at_each_evaluation(data, tmp_path, capsys):
    """With the figures of the command, and without being part of what must stay as it was."""
    choices = [
        {"context": "the cat sat on the", "choices": [" mat.", "xyz" * 5], "label": i % 2}
        for i in range(5)
    ]
    words = [{"text": "the cat sat"}, {"text": "on the mat."}]
    files = {
        "multiple_choice": str(write(tmp_path / "choices", choices)),
        "lambada": str(write(tmp_path / "words", words)),
        "core": str(small_bundle(tmp_path)),
    }
    keys = {"eval.tasks": json.dumps(files), "eval.task_examples": 3}
    out_dir = tmp_path / "run"
    assert train.main(arguments(data, out_dir, **keys)) == 0
    shown = capsys.readouterr().out
    assert "multiple_choice/acc_norm" in shown and "core/mean" in shown
    assert "core/near/acc" not in shown, "core's tasks fill the console"
    rows = [row for row in all_rows(out_dir) if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    asked = ["--run", str(out_dir), "--checkpoint", "latest", "--limit", "3", "--json"]
    for name, file in files.items():
        asked += ["--task", name, "--file", file]
    assert evaluate.main(asked) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["multiple_choice/examples"] == found["core/near/examples"] == 3
    assert (found["core/near/cut"], found["core/far/cut"], found["core/tasks"]) == (0, 6, 2)
    assert "note: these are not the 22 tasks of CORE" in err
    assert found["core/mean"] == (found["core/near/centered"] + found["core/far/centered"]) / 2
    assert {key for key in rows[-1] if key.startswith("core/")} == {
        "core/mean",
        "core/near/acc",
        "core/far/acc",
    }
    for key in (
        "multiple_choice/acc",
        "multiple_choice/acc_norm",
        "lambada/acc",
        "lambada/perplexity",
        "core/mean",
        "core/near/acc",
        "core/far/acc",
    ):
        assert rows[-1][key] == pytest.approx(found[key], rel=1e-6), key
        assert all(key in row for row in rows)
    assert rows[0]["lambada/perplexity"] != rows[-1]["lambada/perplexity"]
    assert not any(key.startswith("val/") for key in found), "only the tasks were asked for"

    plain = tmp_path / "plain"
    assert train.main(arguments(data, plain, **{"eval.every": 0})) == 0
    losses = [
        [r["train/loss"] for r in all_rows(folder) if "train/loss" in r]
        for folder in (out_dir, plain)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    without = parse(arguments(data, out_dir), "test", {})[0].with_vocab(256)
    assert resume.stored_config(without).eval.tasks == files, "other tasks are not refused"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lambada": "/nowhere/x.jsonl"}, "cannot read /nowhere/x.jsonl"),
        ({"lambda": "x"}, "eval.tasks.lambda.*'hellaswag', 'lambada', 'mul.* 'spell' or 'count'"),
        ({"lambada": 3}, "eval.tasks.lambada"),
        ({"core": "/nowhere"}, "there is no /nowhere/core.yaml; core wants the folder of https://"),
        ({"lambada": None}, "lambada needs a file, {lambada: FILE}"),
        ({"sort": "x"}, "sort has no file; write {sort: null}, not x"),
        ({"sort": None}, "task sort is asked in a conversation"),
        ("lambada", "eval.tasks"),
    ],
)
def test_a_mistake_in_eval_tasks_stops_the_run_before_it_is_one(data, tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        train.main(arguments(data, tmp_path / "run", **{"eval.tasks": json.dumps(value)}))
    assert not (tmp_path / "run" / "config.yaml").exists()
