"""Preferences: pairs in rows, the loss over them, the reference, runs that learn from them."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny_run
from test_sft import (
    END,
    conversation,
    model_and_params,
    scores_of,
    write_chat,
)

from scalegpt import train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import BatchConfig, Config, DpoConfig
from scalegpt.config.command_line import parse
from scalegpt.config.differences import curve_diff
from scalegpt.data.batches import EvalBatches, TrainBatches, TrainOrder
from scalegpt.data.datasets import open_datasets, resolved
from scalegpt.data.packing import one_in_each_row
from scalegpt.inference.answers import held_out
from scalegpt.inference.preferences import log_probabilities
from scalegpt.run import reference, reports
from scalegpt.run.feed import batches_from
from scalegpt.step import build_for_training, sharding
from scalegpt.step.objective import pair_count, pair_figures, preference_loss

WORDS = ("sun", "moon", "star", "sky", "sea", "wind", "rain", "snow", "fire", "stone")


def pair(word, n=1):
    """The right answer to a question, and the same written backwards; only it is learned."""
    history = [("Hello", "Yes?")] * (n % 2)
    rows = [conversation(*history, (f"Say {word}{n}", x)) for x in (f"{word}{n}", word[::-1])]
    if not history:
        return rows
    first = int(np.flatnonzero(rows[0] == END)[0]) + 1  # the earlier answer is only read
    return [np.where(np.arange(len(x)) < first, np.minimum(x, ~x), x) for x in rows]


FIGURES = ("train/loss", "dpo/margin", "dpo/accuracy", "dpo/chosen", "dpo/rejected")
PAIRS = [row for n in range(6) for word in WORDS for row in pair(word, n)]


def write_pairs(folder, train=PAIRS[:-24], val=PAIRS[-24:], **changes):
    data = write_chat(folder, train, val, kind="pairs", **changes)
    meta = json.loads((data / "meta.json").read_text())
    for split, rows in (("train", train), ("val", val)):
        meta[split]["pairs"] = len(rows) // 2
    (data / "meta.json").write_text(json.dumps(meta))
    return data


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "chosen")


def given(data, out="out", **changes):
    keys = {"objective.name": "dpo", "model.block_size": 63, "model.dropout": 0}
    keys |= {"batch.microbatch": 2, "run.init_from": "source", **changes}
    return parse(tiny_run.arguments(data, out, **keys), "test", {})[0]


# --- rows


def test_held_out_prompts_are_those_of_the_chosen_answers():
    found = one_in_each_row("x", np.concatenate([*pair("sun"), *pair("moon", 2)]), 63)
    assert np.isnan(found.reference).all() and found.reference.shape == (4,)
    (_, first), (prompt, second) = held_out(found, 5)
    assert first.tolist() == [*b"sun1", END] and second.tolist() == [*b"moon2", END]
    assert bytes(i for i in prompt.tolist() if 0 < i < 256) == b"Say moon2"


def test_an_epoch_has_each_pair_once_together_whatever_the_hosts():
    packed = one_in_each_row("x", np.concatenate(PAIRS), 63)
    packed.reference[:] = np.arange(len(packed))
    batch = BatchConfig(sequences=len(packed))

    def epoch(step, rows, seed=1):
        source = TrainBatches([packed], [1.0], packed.width - 1, seed, batch, len(packed), rows)
        read = source[step]
        for tokens, number in zip(read["tokens"][0], read["reference"][0], strict=True):
            np.testing.assert_array_equal(tokens, packed[int(number)])
        return read["reference"][0].astype(int)

    everything = np.arange(len(packed))
    first, second = (epoch(step, everything) for step in (0, 1))
    assert sorted(first) == sorted(second) == everything.tolist()
    assert (first[::2] % 2 == 0).all() and (first[1::2] == first[::2] + 1).all()
    assert (first != second).any() and (first != epoch(0, everything, seed=2)).any()
    halves = [epoch(1, part) for part in np.split(everything, 2)]
    np.testing.assert_array_equal(np.concatenate(halves), second)
    plain = TrainOrder(len(packed) // 2 + 1, 1, 1).window(np.arange(len(packed) // 2))
    np.testing.assert_array_equal(first[::2] // 2, plain)


def test_validation_reads_both_rows_of_the_pairs_asked_for():
    packed = one_in_each_row("x", np.concatenate(PAIRS), 63)
    few = EvalBatches(packed, packed.width - 1, 4, np.arange(4), windows=3, spread=True)
    assert few.windows == 6 and len(few) == 2 and few.tokens == sum((b >= 0).sum() for b in few)
    assert [few.start(i) for i in range(6)] == [0, 1, 40, 41, 80, 81]
    np.testing.assert_array_equal(few[1][0], packed[80])
    assert EvalBatches(packed, packed.width - 1, 4, np.arange(4)).windows == len(packed)


# --- the configuration


def test_what_does_not_go_together_is_named(chosen, plays):
    for changes, problem in (
        ({"run.init_from": None}, "run.init_from is missing: name a run that answers"),
        ({"model.dropout": 0.1}, "model.dropout=0.1: .* set --model.dropout=0"),
        ({"dpo.label_smoothing": 0.5}, "dpo.label_smoothing"),
        ({"dpo.beta": 0}, "dpo.beta"),
        (
            {"objective.name": "sft", "dpo.beta": 0.2},
            "dpo.beta=0.2 is read with obj",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            given(chosen, **changes)
    with pytest.raises(ValueError, match="=sft, but .* chosen holds pairs of preferences"):
        open_datasets(given(chosen, **{"objective.name": "sft"}))
    with pytest.raises(ValueError, match="=dpo, but the data set plays holds plain text: set"):
        open_datasets(given(plays))


def test_a_batch_has_whole_pairs():
    mesh = SimpleNamespace(shape={"replica": 1, "data": 4, "fsdp": 1, "tensor": 1})

    def layout(sequences, microbatch=None, most=None):
        batch = BatchConfig(sequences=sequences, microbatch=microbatch)
        return sharding.batch_layout(batch, mesh, most, 2)

    assert layout(24) == (1, 24) and layout(24, 2) == (3, 8) and layout(24, most=1) == (3, 8)
    with pytest.raises(ValueError, match="batch.sequences=12 .* in pairs; the nearest .* is 16"):
        layout(12)
    with pytest.raises(ValueError, match="batch.microbatch=3 would part .*; it could be 2, 6"):
        layout(24, 3)
    with pytest.raises(ValueError, match="batch.microbatch=4 does not divide the 6"):
        layout(24, 4)


def test_what_follows_from_pairs_is_stored_and_the_curve_s_keys_are_compared(chosen, tmp_path):
    asked = given(chosen, **{"optim.steps": None, "optim.epochs": 2, "batch.sequences": 6})
    datasets = open_datasets(asked)
    config = resolved(asked, datasets)
    n = len(PAIRS[:-24])
    assert len(datasets[0].train) == n and config.optim.steps == math.ceil(2 * n / 6)
    width = datasets[0].train.width - 1
    assert config.objective.width == config.row_width == width == 48 and config.model.bos is None
    assert curve_diff(Config.model_validate(config.model_dump()), resolved(asked, datasets)) == []
    other = resolved(given(chosen, **{"dpo.beta": 0.5, "optim.steps": 36}), datasets)
    assert "dpo.beta: 0.1 -> 0.5" in curve_diff(config, other)


# --- the loss


def numpy_loss(logits, tokens, reference, dpo):
    """The formula, from logits [M, T, V]."""
    read = logits.astype(np.float64)
    log_p = read - np.log(np.exp(read - read.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= read.max(-1, keepdims=True)
    targets = tokens[:, 1:]
    picked = np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    answers = np.where(targets >= 0, picked, 0).sum(-1)
    gain = answers - reference
    margin = dpo.beta * (gain[::2] - gain[1::2])
    e = dpo.label_smoothing
    loss = (1 - e) * np.log1p(np.exp(-margin)) + e * np.log1p(np.exp(margin))
    length = (targets >= 0).sum(-1)
    return loss - dpo.chosen_weight * (answers / length)[::2], margin, gain


ROWS = np.random.default_rng(3).integers(1, 20, (4, 13)).astype(np.int32)
ROWS[:, :5] = ~ROWS[:, :5]  # a prompt
ROWS[1, 9:], ROWS[2, 11:] = -1, -1
REFERENCE = np.array([-20.0, -17.5, -30.0, -16.0], np.float32)


@pytest.mark.parametrize("keys", [(0.1, 0, 0), (0.5, 0.1, 0), (0.3, 0.2, 0.7)])
def test_loss_and_figures_are_the_formula_s_in_numpy(keys):
    dpo = DpoConfig(beta=keys[0], label_smoothing=keys[1], chosen_weight=keys[2])
    model, params = model_and_params("learned")
    read = np.where(ROWS < 0, ~ROWS, ROWS)
    losses, margin, gain = numpy_loss(
        np.asarray(scores_of("learned")(read[:, :-1])), ROWS, REFERENCE, dpo
    )
    batch = {"tokens": ROWS, "reference": REFERENCE}
    loss, figures = jax.jit(lambda p, b: preference_loss(dpo, model, p, b, None))(params, batch)
    np.testing.assert_allclose(loss, losses.sum(), rtol=1e-6)
    expected = {"margin": margin, "accuracy": margin > 0}
    expected |= {"chosen": keys[0] * gain[::2], "rejected": keys[0] * gain[1::2]}
    for name, values in expected.items():
        total, count = figures[f"dpo/{name}"]
        np.testing.assert_allclose(total, values.sum(), rtol=2e-6, atol=1e-6)
        assert count == pair_count(batch) == 2
    assert {0, 1} == set((margin > 0).astype(int)), "both kinds of pairs are in the test"


def test_the_gradient_is_that_of_the_loss_written_out():
    dpo = DpoConfig(beta=0.05, label_smoothing=0.1, chosen_weight=0.3)
    model, params = model_and_params("learned")
    read, targets = np.where(ROWS < 0, ~ROWS, ROWS), ROWS[:, 1:]

    def written_out(params):
        hidden = model.apply({"params": params}, read[:, :-1])
        scores = hidden @ params["wte"].T
        scores = jnp.where(jnp.arange(scores.shape[-1]) < 20, scores, -1e30)
        log_p = jax.nn.log_softmax(scores)
        answers = sum(
            jnp.where(targets[:, t] >= 0, log_p[jnp.arange(4), t, targets[:, t]], 0)
            for t in range(targets.shape[1])
        )
        total = 0.0
        for i in (0, 2):
            d = answers[i] - REFERENCE[i] - answers[i + 1] + REFERENCE[i + 1]
            right = 1 / (1 + jnp.exp(-dpo.beta * d))
            total -= 0.9 * jnp.log(right) + 0.1 * jnp.log(1 - right)
            total -= 0.3 * answers[i] / (targets[i] >= 0).sum()
        return total

    def loss(params):
        batch = {"tokens": jnp.asarray(ROWS), "reference": jnp.asarray(REFERENCE)}
        return preference_loss(dpo, model, params, batch, None)[0]

    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, written_out))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    for x, y in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale)


def test_a_swap_flips_the_margin_and_the_start_is_ln_2():
    dpo, sums = DpoConfig(), np.array([3.0, 5.0, 2.0, 9.0], np.float32)
    counts, given_reference = np.array([3, 4, 2, 5]), -sums + np.array([0.5, -1, 2, 3], np.float32)
    swap = [1, 0, 3, 2]
    one = pair_figures(dpo, sums, given_reference, counts)
    two = pair_figures(dpo, sums[swap], given_reference[swap], counts[swap])
    np.testing.assert_allclose(one["margin"], -two["margin"], rtol=1e-6)
    assert (one["accuracy"] + two["accuracy"] == 1).all()
    start = pair_figures(dpo, sums, -sums, counts)
    np.testing.assert_allclose(start["loss"], math.log(2), rtol=1e-6)
    assert (start["margin"] == 0).all()


# --- runs


@pytest.fixture(scope="module")
def answering(chosen, tmp_path_factory):
    """A run that has learned from conversations: from the chosen ones of the pairs."""
    talks = [PAIRS[i] for i in range(0, len(PAIRS), 2)]
    data = write_chat(tmp_path_factory.mktemp("data") / "talks", talks[:-12], talks[-12:])
    out = tmp_path_factory.mktemp("runs") / "sft"
    keys = {"objective.name": "sft", "model.block_size": 63, "model.dropout": 0}
    assert train.main(tiny_run.arguments(data, out, **keys)) == 0
    return out


def argv(data, out, source, **changes):
    keys = {"objective.name": "dpo", "model.block_size": 63, "model.dropout": 0}
    keys |= {"batch.microbatch": 2, "run.init_from": source, "optim.lr": 1e-3, **changes}
    return tiny_run.arguments(data, out, **keys)


KEYS = {"eval.train_windows": 8, "eval.answers": 4, "optim.steps": 20, "eval.every": 10}


@pytest.fixture(scope="module")
def whole(chosen, answering, tmp_path_factory):
    """A run that learns from pairs, and what it has said."""
    out, said = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main(argv(chosen, out, answering, **KEYS)) == 0
    return out, said.getvalue()


@pytest.mark.slow
def test_losses_and_weights_do_not_depend_on_mesh_accumulation_or_backend(chosen):
    noise = np.random.default_rng(0).normal(size=len(PAIRS))

    def trained(backend, mesh, accumulation):
        shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
        keys = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
        keys |= {"run.backend": backend, "batch.microbatch": 16 // shards // accumulation}
        keys |= {"model.dtype": "float32", "optim.lr": 1e-3, "dpo.chosen_weight": 0.1}
        asked = given(chosen, **keys)
        datasets = open_datasets(asked)
        config = resolved(asked, datasets)
        devices = jax.devices()[: math.prod(mesh.values())]
        steps = build_for_training(config, sharding.make_mesh(config.mesh, devices))
        state, rows = steps.init(), datasets[0].train
        rows.reference[:] = log_probabilities(steps, state.params, rows) + noise[: len(rows)]
        batches, history = batches_from(config, datasets, steps, 0), []
        for _ in range(4):
            state, metrics = steps.train(state, next(batches))
            history.append([float(metrics[name]) for name in FIGURES])
        return history, jax.tree.map(np.asarray, state.params)

    history, params = trained("jit", {}, 1)
    assert len({row[0] for row in history}) == 4 and 0 < history[0][2] < 1
    for case in (
        ("jit", {}, 4),
        ("jit", {"data": 8}, 1),
        ("jit", {"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ("pmap", {"data": 4}, 2),
    ):
        others, weights = trained(*case)
        np.testing.assert_allclose(others, history, rtol=0, atol=1e-5, err_msg=str(case))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), weights, params)


@pytest.mark.slow
def test_a_run_learns_from_pairs_and_is_the_same_after_a_kill(
    chosen, answering, whole, tmp_path, capfd
):
    (whole, said), parts, keys = whole, tmp_path / "parts", KEYS
    assert "48 pairs in rows of" in said and "reference" in said
    losses = tiny_run.rows(whole)
    val, accuracy, margin = (
        tiny_run.rows(whole, f"val/{key}") for key in ("loss", "accuracy", "margin")
    )
    assert losses[1] == pytest.approx(math.log(2), abs=1e-5)
    assert val[0] == pytest.approx(math.log(2), abs=1e-5) and abs(margin[0]) < 1e-5
    assert losses[20] < 0.4 and val[20] < 0.4 and accuracy[20] > 0.9 and margin[20] > 0.7
    assert tiny_run.rows(whole, "train/eval_loss")[20] < 0.4
    row = {key: tiny_run.rows(whole, key)[20] for key in FIGURES}
    assert row["dpo/margin"] == pytest.approx(row["dpo/chosen"] - row["dpo/rejected"], abs=1e-5)
    assert tiny_run.rows(whole, "train/tokens")[20] == 20 * 16 * 48
    assert tiny_run.rows(whole, "train/epoch")[20] == pytest.approx(20 * 8 / 48)
    kept = (whole / "reference.npz").read_bytes()

    # Killed, continued with the reference of before, killed again and without it.
    process = tiny_run.start(argv(chosen, parts, answering, **keys), JAX_NUM_CPU_DEVICES="8")
    tiny_run.wait_for_step(process, parts, 6)
    process.kill()
    process.communicate()
    assert (parts / "reference.npz").read_bytes() == kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "log_probabilities", None)
        tiny_run.stop_after(patch, 14)
        assert train.main(argv(chosen, parts, answering, **keys)) == 3
    (parts / "reference.npz").unlink()
    capfd.readouterr()
    assert train.main(argv(chosen, parts, answering, **keys)) == 0
    said = capfd.readouterr().err
    assert f"what the weights of {answering} think of 120 answers" in said
    assert (parts / "reference.npz").read_bytes() == kept
    for key in ("train/loss", "dpo/margin", "val/loss", "val/margin", "val/accuracy"):
        assert tiny_run.rows(parts, key) == tiny_run.rows(whole, key), key
    ours, theirs = (open_checkpoints(run).read_item(20, "params") for run in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    assert train.main([*argv(chosen, whole, answering, **keys), "--run.replay=14"]) == 0
    said = capfd.readouterr().out
    assert f"loss {losses[14]:.6f}" in said and "margin    data set" in said
    shown = [float(x) for x in re.findall(r"^(-?[\d.]+) +chosen:\d+", said, re.MULTILINE)]
    assert len(shown) == 8 and shown == sorted(shown)
    assert np.mean(shown) == pytest.approx(tiny_run.rows(whole, "dpo/margin")[14], abs=1e-3)
    assert said.count("Say ") == 8 and "<|" not in said

    # Not another run's reference, and no other weights than the run's first.
    other = write_pairs(tmp_path / "chosen", PAIRS[::-1][:-24], PAIRS[-24:])
    short = keys | {"optim.steps": 2, "eval.train_windows": None}
    assert train.main(argv(other, tmp_path / "other", answering, **short)) == 0
    again = argv(chosen, whole, answering, **keys | {"optim.steps": 21})
    again += ["--run.allow_config_change=optim.steps"]
    (whole / "reference.npz").write_bytes((tmp_path / "other" / "reference.npz").read_bytes())
    with pytest.raises(ValueError, match="reference.npz is the reference of other data or weights"):
        train.main(again)
    (whole / "reference.npz").write_bytes(kept[:100])
    with pytest.raises(ValueError, match="reference.npz is damaged .*: remove it"):
        train.main(again)
    (whole / "reference.npz").unlink()
    needed = "weights that the run began with are needed .* has others"
    with pytest.raises(ValueError, match=needed):
        train.main([*again, "--run.init_checkpoint=8"])
    assert train.main(again) == 0


@pytest.mark.slow
def test_two_processes_learn_what_one_does(chosen, answering, whole, tmp_path):
    run, alone = tmp_path / "run", whole[0]
    processes.run("scalegpt.train", *argv(chosen, run, answering, **KEYS))
    for key in (*FIGURES, "val/loss", "val/margin"):
        one, two = (tiny_run.rows(folder, key) for folder in (alone, run))
        assert two.keys() <= one.keys()  # another test may have gone on with the first
        expected = [one[step] for step in two]
        np.testing.assert_allclose([*two.values()], expected, rtol=0, atol=1e-5)
    with np.load(alone / "reference.npz") as one, np.load(run / "reference.npz") as two:
        assert one["facts"] == two["facts"]
        values = [x["log_probabilities"] for x in (one, two)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_signal_while_the_reference_is_computed_leaves_at_once(chosen, answering, tmp_path):
    program = """
import os, signal, time
from scalegpt import train
from scalegpt.processes.command import run_command
from scalegpt.run import reference, reports
def signalled(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
reference.log_probabilities = signalled
run_command(train.main)
"""
    command = [sys.executable, "-c", program, *argv(chosen, tmp_path / "run", answering)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "nothing new to save" in done.stderr
    assert not (tmp_path / "run" / "reference.npz").exists()


@pytest.mark.slow
def test_lora_learns_from_pairs_too(chosen, answering, tmp_path, monkeypatch):
    """Its reference is the base, also where that is computed again in the midst of the run."""
    keys = {"lora.rank": 4, "optim.lr": 1e-2, "optim.steps": 4, "eval.every": 0}
    assert train.main(argv(chosen, whole := tmp_path / "whole", answering, **keys)) == 0
    losses = tiny_run.rows(whole)
    assert losses[1] == pytest.approx(math.log(2), abs=1e-5) and losses[4] < 0.6
    with monkeypatch.context() as patch:
        tiny_run.stop_after(patch, 2)
        assert train.main(argv(chosen, parts := tmp_path / "parts", answering, **keys)) == 3
    (parts / "reference.npz").unlink()
    assert train.main(argv(chosen, parts, answering, **keys)) == 0
    assert tiny_run.rows(parts) == losses


@pytest.mark.parametrize(
    ("objective", "explained", "measured"),
    [("sft", None, True), ("dpo", "margin   ", False), ("grpo", "reward   in_place", False)],
)
def test_a_run_explains_its_figures_and_names_commands_that_work(objective, explained, measured):
    config = parse(["--config", objective, "--data.path=x", "--run.out_dir=y"], "", {})[0]
    lines = reports._objective_lines(config)
    assert [line[: len(explained)] for line in lines] == [explained] if explained else not lines
    said = []
    metrics = SimpleNamespace(on_terminal=False, say=said.append)
    reports.finish(config, SimpleNamespace(find=lambda _: 1), 0.5, metrics)
    assert ("scalegpt.evaluate" in said[0]) == measured and "scalegpt.chat" in said[0]
