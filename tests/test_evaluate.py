"""The evaluate command: its figures against transformers and NumPy, the same on any mesh, in two
processes, and what it says to mistakes."""

import json
import math

import jax
import numpy as np
import processes
import pytest
import tiny_gpt2
from test_tasks import TINY, placed, tiny_steps, write

from scalegpt import evaluate
from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.config import Config
from scalegpt.data import tokenizer
from scalegpt.data.batches import EvalBatches
from scalegpt.inference import text_loss
from scalegpt.step import sharding

TEXT = "Of what a man has, the half is 他的; naïve, and so on.\n" * 40


def figures(capsys, *argv):
    assert evaluate.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- loss


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return tiny_gpt2.save(folder), folder


def window_losses(model, ids):
    """(sums of cross-entropy, counts) of the windows of `ids`, by transformers."""
    block, sums, counts = tiny_gpt2.BLOCK, [], []
    for start in range(0, len(ids) - 1, block):
        part = [int(i) for i in ids[start : start + block + 1]]
        scores = tiny_gpt2.log_probabilities(model, part[:-1], len(part) - 1)
        sums.append(-scores[np.arange(len(part) - 1), part[1:]].sum(dtype=np.float64))
        counts.append(len(part) - 1)
    return np.array(sums), np.array(counts)


@pytest.mark.slow
def test_loss_over_a_text_is_transformers(gpt2, shared_data, tmp_path, capsys):
    """And bits/byte, perplexity and their errors follow from it."""
    model, folder = gpt2
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:9000] + "Ça va — 好.\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    found = figures(capsys, "--hf", folder, "--text", tmp_path / "text", "--microbatch", 1)
    ids = [50256, *tokenizer.load("gpt2").encode(text)]
    sums, counts = window_losses(model, ids)
    loss = sums.sum() / counts.sum()
    # By the jackknife, another way to the error of a ratio than the formula's.
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    n = len(sums)
    error = math.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    assert abs(found["text/loss"] - loss) < 1e-5
    assert found["text/loss_stderr"] == pytest.approx(error, rel=0.05)
    assert found["text/tokens"] == len(ids) - 1 == counts.sum() and counts[-1] < counts[0]
    bits = sums.sum() / math.log(2) / len(text.encode())
    assert found["text/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert found["text/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    for key in ("perplexity", "bits_per_byte"):  # at first order the same relative change
        slope = found["text/perplexity"] if key == "perplexity" else bits / loss
        error = found["text/loss_stderr"] * slope
        assert found[f"text/{key}_stderr"] == pytest.approx(error, rel=1e-6)
    assert found["model"] == str(folder) and found["step"] is None

    few = figures(capsys, "--hf", folder, "--text", tmp_path / "text", "--windows", 3)
    assert abs(few["text/loss"] - sums[:3].sum() / counts[:3].sum()) < 1e-5

    # The same text as a token file: there the first token has nothing to be predicted from.
    np.array(ids, "<u2").tofile(tmp_path / "some.bin")
    np.array(ids[::-1], "<u2").tofile(tmp_path / "val.bin")
    bins = figures(capsys, "--hf", folder, "--data", tmp_path / "some.bin")
    assert bins["some/loss"] == pytest.approx(found["text/loss"], abs=1e-6)
    assert "some/bits_per_byte" not in bins, "nobody knows the bytes"
    other = figures(capsys, "--hf", folder, "--data", tmp_path, "--windows", 2)
    sums, counts = window_losses(model, ids[::-1])
    assert abs(other["val/loss"] - sums[:2].sum() / counts[:2].sum()) < 1e-5


def test_loss_does_not_depend_on_mesh_and_microbatch():
    weights = jax.tree.map(np.asarray, tiny_steps({}, 1).init().params)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), weights)
    tokens = rng.integers(0, 257, 64 * 37 + 5).astype(np.uint16)

    def loss(mesh, microbatch, devices=None):
        steps = tiny_steps(mesh, microbatch, devices)
        rows = sharding.local_rows(steps.mesh, steps.layout[1])
        batches = EvalBatches(tokens, 64, steps.layout[1], rows)
        return text_loss.mean_loss(steps, placed(steps, weights), batches)

    want = loss({"data": 1}, 8, jax.devices()[:1])
    for mesh, microbatch in (
        ({"data": 8}, 1),
        ({"data": 1, "fsdp": 8}, 3),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    ):
        assert loss(mesh, microbatch) == pytest.approx(want, abs=1e-6), mesh


# --- a run, several processes, a config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run leaves it, with its data: bytes, whose mark is 0."""
    folder = tmp_path_factory.mktemp("a") / "run"
    data = folder.parent / "data"
    data.mkdir()
    ids = {"train": TEXT[::-1].encode() + b"more" * 9, "val": TEXT.encode()}
    meta = {"format": 1, "tokenizer": {"kind": "byte"}, "vocab_size": 256, "dtype": "uint16"}
    for split, text in ids.items():
        np.frombuffer(text, np.uint8).astype("<u2").tofile(data / f"{split}.bin")
        meta[split] = {"tokens": len(text), "bytes": len(text)}
    (data / "meta.json").write_text(json.dumps(meta))
    config = Config(model=TINY, data={"path": str(data)}, run={"out_dir": str(folder)})
    params = tiny_steps({}, 1).init().params
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    checkpoints = Checkpoints(folder)
    meta = {"config": config.model_dump(), "tokenizer": {"kind": "byte"}, "best_loss": 1.0}
    checkpoints.save_weights(params, meta)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    rows = [
        {
            "query": TEXT[i : i + 9],
            "choices": [TEXT[i + 9 : i + 20], "other", "more"],
            "gold": i % 3,
        }
        for i in range(13)
    ]
    return write(tmp_path_factory.mktemp("tasks") / "choices.jsonl", rows)


def test_a_table_for_a_person(run, choices, capsys):
    argv = ["--run", run, "--data", run.parent / "data", "--task", "multiple_choice"]
    assert evaluate.main([*map(str, argv), "--file", str(choices)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"{run}, step 0, on data, choices.jsonl"
    assert [line.split()[0] for line in lines] == [
        "val/loss",
        "val/perplexity",
        "val/bits_per_byte",
        "multiple_choice/acc",
        "multiple_choice/acc_norm",
    ]
    assert all(line.split()[2] == "±" for line in lines)
    assert lines[0].endswith(f"{len(TEXT.encode()) - 1:,} tokens")
    assert lines[-1].endswith("13 examples")


def test_the_splits_of_a_run_and_the_same_text_as_a_file(run, tmp_path, capsys):
    val = figures(capsys, "--run", run)
    data = run.parent / "data"
    assert val == figures(capsys, "--run", run, "--data", data / "val.bin")
    train = figures(capsys, "--run", run, "--split", "train")
    assert train == figures(capsys, "--run", run, "--data", data / "train.bin")
    assert train["train/bits_per_byte"] == pytest.approx(train["train/loss"] / math.log(2))
    assert abs(train["train/loss"] - val["val/loss"]) > 1e-4
    # As a text it begins with the mark, so one more byte is predicted.
    (tmp_path / "text").write_bytes(TEXT.encode())
    text = figures(capsys, "--run", run, "--text", tmp_path / "text")
    assert text["text/tokens"] == val["val/tokens"] + 1 == len(TEXT.encode())
    assert text["text/bits_per_byte"] == pytest.approx(text["text/loss"] / math.log(2), rel=1e-9)
    assert val["val/bits_per_byte"] == pytest.approx(val["val/loss"] / math.log(2), rel=1e-9)


def test_without_a_mark_the_first_token_and_its_bytes_do_not_count(tmp_path, gpt2_tokenizer):
    (tmp_path / "text").write_text("éaé", encoding="utf-8")
    split = text_loss.text_split(str(tmp_path / "text"), tokenizer.char_tokenizer(["aé"]))
    assert split.tokens.tolist() == [1, 0, 1] and split.bytes_per_token == 3 / 2
    split = text_loss.text_split(str(tmp_path / "text"), gpt2_tokenizer)
    assert split.tokens[0] == 50256 and split.bytes_per_token == 5 / (len(split.tokens) - 1)
    numbers = tokenizer.load({"kind": "ids", "vocab_size": 9})  # of which no text is known
    assert text_loss.encoded_text("5 1 7", numbers, "x").bytes_per_token is None


def test_each_part_of_a_mixture_has_bits_where_its_bytes_are_known():
    none = np.zeros(0)
    known, other, unknown = (
        text_loss.Split(name, "byte", 256, none, rate)
        for name, rate in (("a", 2.0), ("b", 4.0), ("c", None))
    )
    losses = np.array([[math.log(4), 0.1], [math.log(16), 0.2]])
    found = text_loss.text_figures([known, other], [0.25, 0.75], losses)
    assert found["a/bits_per_byte"] == pytest.approx((1.0, 0.1 / math.log(2) / 2))
    assert found["b/bits_per_byte"][0] == pytest.approx(1.0) == found["bits_per_byte"][0]
    found = text_loss.text_figures([known, unknown], [0.25, 0.75], losses)
    assert "a/bits_per_byte" in found and {"bits_per_byte", "c/bits_per_byte"}.isdisjoint(found)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one_and_the_first_prints(run, choices, capsys):
    argv = [
        "--run",
        run,
        "--data",
        run.parent / "data",
        "--json",
        "--microbatch",
        "3",
        "--task",
        "multiple_choice",
        "--file",
        choices,
    ]
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    first, second = (out for out, _ in processes.run("scalegpt.evaluate", *argv, *mesh))
    assert second == ""
    found, alone = json.loads(first), figures(capsys, *argv)
    assert found.keys() == alone.keys() and found["multiple_choice/examples"] == 13
    for key, value in alone.items():
        if isinstance(value, float):
            # A standard error is what is left of sums that nearly cancel.
            near = 1e-5 if key.endswith("_stderr") else 1e-6
            assert found[key] == pytest.approx(value, rel=near), key


def test_what_the_processes_have_read_must_agree(run, choices, tmp_path, monkeypatch):
    """Other text, another task file or another checkpoint on one host would end in JAX's abort."""
    shorter = tmp_path / "task.jsonl"
    shorter.write_text("".join(choices.read_text().splitlines(True)[:-1]))
    seen = []
    monkeypatch.setattr(evaluate.startup, "same_everywhere", seen.append)
    monkeypatch.setattr(evaluate, "_results", lambda *a: [])
    task = ["--run", str(run), "--data", str(run.parent / "data"), "--task", "multiple_choice"]
    for file, split in ((choices, "val"), (shorter, "val"), (choices, "train")):
        assert evaluate.main([*task, "--file", str(file), "--split", split]) == 0
    whole, other_task, other_text = seen
    differ = [{k for k in whole if whole[k] != x[k]} for x in (other_task, other_text)]
    assert differ == [{"task multiple_choice"}, {"text of data"}]
    assert (whole["checkpoint"], whole["model.n_layer"]) == ("0", "1")


def config_file(path, source, **keys):
    sections = {
        "data": {"path": str(source.parent / "data")},
        "run": {"out_dir": "o", "init_from": str(source)},
        "eval": {"windows": 7},
        "batch": {"microbatch": 2},
        "mesh": {"data": 2, "fsdp": -1},
        **keys,
    }
    path.write_text(json.dumps(sections))  # which is YAML too
    return path


def test_a_config_names_weights_data_windows_tasks_and_mesh(run, choices, tmp_path, capsys):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        load = evaluate.trained.load
        patch.setattr(evaluate.trained, "load", lambda *a: seen.append(load(*a)) or seen[-1])
        by_config = figures(capsys, "--config", config_file(tmp_path / "c.yaml", run))
    assert seen[0].steps.layout == (1, 16)
    assert {k: n for k, n in seen[0].steps.mesh.shape.items() if n > 1} == {"data": 2, "fsdp": 4}
    by_flags = figures(capsys, "--run", run, "--windows", 7, "--microbatch", 1)
    assert by_config.keys() == by_flags.keys() and by_config["val/tokens"] == 7 * 64
    assert by_config["val/loss"] == pytest.approx(by_flags["val/loss"], abs=1e-6)
    tasks = {"windows": 2, "tasks": {"multiple_choice": str(choices)}, "task_examples": 5}
    file = config_file(tmp_path / "t.yaml", run, eval=tasks, model={"n_layer": 1})
    row = figures(capsys, "--config", file, "--windows", 1)
    assert row["multiple_choice/examples"] == 5 and row["val/tokens"] == 64
    for keys, message in (
        ({"model": {"n_layer": 3}}, "model.n_layer=3, but .*run of run.init_from has 1"),
        ({"run": {"out_dir": "o"}}, "has no run.init_from"),
        ({"run": {"out_dir": "o", "init_from": str(run), "init_checkpoint": "7"}}, "steps 0"),
        ({"data": {"path": "/nowhere"}}, "there is no folder /nowhere"),
        ({"model": {"n_layr": 3}}, "did you mean model.n_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(["--config", str(config_file(tmp_path / "d.yaml", run, **keys))])


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "/nowhere"], "there is no folder /nowhere"),
        (["--text", "/nowhere"], "there is no file /nowhere"),
        (["--text", "{empty}"], "holds no text to predict"),
        (["--task", "lambada"], "each --task needs its --file"),
        (["--task", "lambada", "--file", "/nowhere"], "there is no file /nowhere"),
        (["--task", "lambada", "--file", "{choices}"], "line 1, is no example of lambada"),
        (["--task", "lambada", "--file", "x", "--task", "lambada", "--file", "y"], "once"),
        (["--windows", "0"], "--windows=0 must be at least 1"),
        (["--limit", "3"], "--limit=3 is of a --task"),
        (["--task", "gsm8k"], "each --task needs its --file.* without a file are reverse, sort"),
        (["--task", "sort", "--file", "{choices}"], "each --task needs its --file"),
        (["--task", "sort"], "sort is asked in a conversation, and the model has not learned"),
        (["--task", "sorty"], "invalid choice: 'sorty'"),
        (["--task", "sort", "--samples", "2"], "--samples=2 would all be the same greedy answer"),
        (["--task", "sort", "--temperature", "-1"], "--temperature=-1.0 must be from 0"),
        (["--samples", "2"], "--samples and --temperature are of --task gsm8k, reverse"),
        (["--data", "{gpt2}"], "gpt2.bin has 50257 token ids, the model only 257"),
        (["--data", "{chars}"], "made with tokenizer char, the model with another, byte"),
        (["--checkpoint", "7"], "there are steps 0"),
        (["--mesh.data", "3"], "does not fit 8 cpu"),
        (["--mesh.data", "x"], "mesh.data='x'"),
    ],
)
def test_a_mistake_is_one_message(run, choices, tmp_path, argv, message):
    (tmp_path / "empty").touch()
    np.arange(99, dtype="<u2").tofile(tmp_path / "gpt2.bin")
    (tmp_path / "chars").mkdir()
    meta = {
        "format": 1,
        "tokenizer": {"kind": "char", "chars": "ab"},
        "vocab_size": 2,
        "dtype": "uint16",
        "train": {"tokens": 9},
        "val": {"tokens": 9},
    }
    (tmp_path / "chars" / "meta.json").write_text(json.dumps(meta))
    np.ones(9, "<u2").tofile(tmp_path / "chars" / "val.bin")
    names = {
        "choices": choices,
        "empty": tmp_path / "empty",
        "gpt2": tmp_path / "gpt2.bin",
        "chars": tmp_path / "chars",
    }
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--run", str(run), *(a.format(**names) for a in argv)])


def test_a_model_of_hugging_face_has_no_data_and_no_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="gpt2 has no data of its own; give --data, --text or"):
        evaluate.main(["--hf", "gpt2"])
    (tmp_path / "t").write_text("text")
    with pytest.raises(ValueError, match="--checkpoint=best is of a run, and gpt2 is none"):
        evaluate.main(["--hf", "gpt2", "--text", str(tmp_path / "t"), "--checkpoint", "best"])


def test_broken_weights_are_told(run, tmp_path, capsys):
    source = open_checkpoints(run)
    steps = tiny_steps({}, 1)
    params = source.restore_params(0, steps.abstract.params)
    broken = Checkpoints(tmp_path / "run")
    params = {**params, "wte": params["wte"] * math.nan}
    broken.save_weights(params, source.meta(0))
    broken.close()
    with pytest.raises(ValueError, match="a figure of .* over val is not finite"):
        evaluate.main(["--run", str(tmp_path / "run"), "--json"])
    assert capsys.readouterr().out == ""
