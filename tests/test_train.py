"""A run end to end: it survives interruption bit for bit, and says what went wrong."""

import json
import math
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import (
    ROWS,
    STEPS,
    TEXT,
    T,
    arguments,
    rows,
    run_with_signal,
    start,
    stop_after,
    wait_for_step,
    write_data,
)

import scalegpt
from scalegpt import evaluate, generate, train
from scalegpt.checkpoints import manifest, writing
from scalegpt.checkpoints.checkpoints import Checkpoints, open_checkpoints
from scalegpt.config import LogConfig, RunConfig
from scalegpt.config.command_line import parse
from scalegpt.data.batches import EvalBatches, TrainBatches
from scalegpt.data.datasets import open_datasets
from scalegpt.errors import Mistake
from scalegpt.files.folder import open_folder
from scalegpt.processes import stop_request
from scalegpt.processes.command import python
from scalegpt.processes.phases import Phases
from scalegpt.run import resume
from scalegpt.run.history import read_history
from scalegpt.run.metrics import Metrics
from scalegpt.step import build as step
from scalegpt.step.sharding import make_mesh
from scalegpt.weights import init_from, trained

pytestmark = pytest.mark.usefixtures("signals_as_they_were")


@pytest.fixture(scope="module")
def data(plays) -> Path:
    return plays


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """The finished run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert train.main(arguments(data, out_dir)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    assert list(rows(out_dir)) == list(range(1, STEPS + 1))
    return out_dir


# --- interruption


def test_fault_07_interrupted_at_five_steps_and_continued_is_bitwise_the_same_run(
    data, unbroken, tmp_path, monkeypatch, capsys
):
    """Adam's moments, schedule, dropout keys, data order and best loss all continue."""
    for at in (1, 2, 5, 7, 11):
        stop_after(monkeypatch, at)
        assert train.main(arguments(data, tmp_path / "run")) == 3
        assert f"stopped on request after update {at}" in capsys.readouterr().out
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "run")) == 0
    assert "continuing from step 11" in capsys.readouterr().out
    for key in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        assert rows(tmp_path / "run", key) == rows(unbroken, key)
    for key in ("val/loss", "val/best_loss"):
        assert rows(tmp_path / "run", key) == rows(unbroken, key)
    states = [saved_state(folder) for folder in (tmp_path / "run", unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def fail_at(monkeypatch, update: int, error: Exception) -> None:
    """Have the batch of an update not be readable."""
    read = TrainBatches.__getitem__

    def failing(batches, step):
        if step + 1 == update:
            raise error
        return read(batches, step)

    monkeypatch.setattr(TrainBatches, "__getitem__", failing)


@pytest.mark.slow
def test_a_batch_that_cannot_be_read_ends_a_run_with_the_update_before_it_saved(
    data, unbroken, tmp_path, monkeypatch, capsys
):
    """Before an update that is like others, that comes after a save, and that is the last."""
    with monkeypatch.context() as patch:  # the first window, which each evaluation reads
        calls, read = [], EvalBatches.__getitem__

        def failing(batches, i):
            calls.append(i)
            if calls.count(0) == 2:
                raise OSError("windows gone")
            return read(batches, i)

        patch.setattr(EvalBatches, "__getitem__", failing)
        assert train.main(arguments(data, tmp_path / "evaluated")) == 5
    printed = capsys.readouterr().out
    assert "windows gone" in printed and "the last good checkpoint is step 5" in printed
    assert train.main(arguments(data, tmp_path / "evaluated")) == 0
    assert rows(tmp_path / "evaluated", "val/loss") == rows(unbroken, "val/loss")
    for at, error, code in (
        (3, Mistake("bucket away"), 2),
        (4, FileNotFoundError("no part"), 5),
        (6, Mistake("bucket away"), 2),
        (12, Mistake("bucket away"), 2),
    ):
        with monkeypatch.context() as patch:
            fail_at(patch, at, error)
            assert train.main(arguments(data, tmp_path / "run")) == code
        printed = capsys.readouterr().out
        assert str(error) in printed
        assert f"the last good checkpoint is step {at - 1}, from which the same" in printed
    assert train.main(arguments(data, tmp_path / "run")) == 0
    assert "continuing from step 11" in capsys.readouterr().out
    for key in ("train/loss", "train/grad_norm", "train/lr", "train/skipped", "val/loss"):
        assert rows(tmp_path / "run", key) == rows(unbroken, key)
    states = [saved_state(folder) for folder in (tmp_path / "run", unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_muon_and_averaged_weights_continue_bitwise_and_are_what_a_checkpoint_holds(
    data, tmp_path, monkeypatch, capsys
):
    recipe = {"model.preset": "many_epochs", "optim.name": "muon", "optim.average": 0.5}
    recipe |= {"model.dropout": 0.1, "optim.weight_decay": 0.8, "optim.decay_follows_lr": True}
    recipe |= {"optim.momentum_slow": 0.98, "optim.lookahead": 0.5, "model.backout": True}
    recipe |= {"model.ngram_rows": 100, "model.ngram": 3}
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "whole", **recipe)) == 0
    for at in (3, 8):
        stop_after(monkeypatch, at)
        assert train.main(arguments(data, tmp_path / "run", **recipe)) == 3
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "run", **recipe)) == 0
    for key in ("train/loss", "val/loss"):
        assert rows(tmp_path / "run", key) == rows(tmp_path / "whole", key)
    states = [saved_state(tmp_path / name) for name in ("run", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    last, average = states[0].swapped().params["wte"], states[0].params["wte"]
    assert np.abs(last - average).max() > 1e-3
    capsys.readouterr()
    argv = ["--run", str(tmp_path / "run"), "--checkpoint", "latest", "--json", "--windows", "12"]
    assert evaluate.main(argv) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(row["val/loss"] - rows(tmp_path / "run", "val/loss")[STEPS]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "before"),
    [
        (
            {"model.preset": "modern", "optim.name": "muon"},
            {"model.smear": False, "model.residual_scalars": False}
            | {"optim.momentum": 0.95, "optim.row_beta2": 0.0},
        ),
        ({"model.depth": 2}, {"optim.head_lr": 2e-4, "optim.weight_decay": 9.0}),
    ],
)
def test_a_run_from_before_a_recipe_changed_continues_as_it_was(
    recipe, before, data, tmp_path, monkeypatch, capsys
):
    stop_after(monkeypatch, 3)
    assert train.main(arguments(data, tmp_path / "run", **recipe, **before)) == 3
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "run", **recipe)) == 0
    assert "continuing from step 3" in capsys.readouterr().out
    assert train.main(arguments(data, tmp_path / "whole", **recipe, **before)) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    with pytest.raises(Mistake, match="differs:\n(.|\n)*optim.head_lr: "):  # another recipe
        train.main(arguments(data, tmp_path / "run", **recipe | {"model.preset": "many_epochs"}))


def saved_state(out_dir: Path):
    """Everything in the latest checkpoint, in NumPy."""
    config = parse([f"--config={out_dir}/config.yaml"], "test", {})[0]
    steps = step.build_steps(config, make_mesh(config.mesh), "float32", "xla")
    checkpoints = open_checkpoints(out_dir)
    state = checkpoints.restore(checkpoints.steps[-1], steps.abstract)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


def test_continued_on_another_mesh_is_the_same_run(data, unbroken, tmp_path, monkeypatch):
    stop_after(monkeypatch, 6)
    assert train.main(arguments(data, tmp_path / "run")) == 3
    stop_after(monkeypatch)
    other = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "batch.microbatch": 4}
    assert train.main(arguments(data, tmp_path / "run", **other, log__every=2)) == 0
    ours, theirs = rows(tmp_path / "run"), rows(unbroken)
    assert list(ours) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    np.testing.assert_allclose(list(ours.values()), [theirs[s] for s in ours], rtol=0, atol=1e-5)


def test_a_request_during_an_evaluation_cuts_it_short_and_it_comes_first_on_continuing(
    data, unbroken, tmp_path, monkeypatch, capsys
):
    batches = []  # of evaluations: two each

    def check(self):
        batches.append(1)
        if len(batches) >= 4:  # the second of update 5's
            raise stop_request.Interrupted

    out_dir = tmp_path / "run"
    monkeypatch.setattr(stop_request.StopRequest, "check", check)
    assert train.main(arguments(data, out_dir)) == 3
    assert "stopped on request after update 5" in capsys.readouterr().out
    assert list(rows(out_dir, "val/loss")) == [0] and open_checkpoints(out_dir).steps
    stop_after(monkeypatch, 6)
    assert train.main(arguments(data, out_dir)) == 3
    # The loss that was found later counts as if it had been saved along.
    assert open_checkpoints(out_dir).find("best") == 5
    assert not open_checkpoints(out_dir).verify(5)
    stop_after(monkeypatch)
    assert train.main(arguments(data, out_dir)) == 0
    for key in ("train/loss", "val/loss", "val/best_loss"):
        assert sorted(rows(out_dir, key).items()) == sorted(rows(unbroken, key).items())


LONGER = {"optim.steps": 40, "eval.every": 0, "checkpoint.every": 12}


@pytest.fixture(scope="module")
def longer_run(data, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "longer"
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert train.main(arguments(data, out_dir, **LONGER)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return out_dir


@pytest.mark.slow
def test_a_real_signal_saves_and_the_same_command_continues(data, longer_run, tmp_path):
    argv = arguments(data, tmp_path / "run", **LONGER)
    code, output = run_with_signal(argv, "SIGINT", 16)
    assert code == 3, output
    assert "SIGINT: saving after this step" in output
    stopped = max(rows(tmp_path / "run"))
    assert 12 <= stopped < 40 and f"stopped on request after update {stopped}" in output
    assert train.main(argv) == 0
    assert rows(tmp_path / "run") == rows(longer_run)


@pytest.mark.slow
def test_a_terminal_that_goes_away_is_a_request_to_stop_and_a_full_disk_of_the_log_is_not(
    data, tmp_path
):
    argv = arguments(data, tmp_path / "run", **LONG | {"optim.steps": 150})
    out_dir = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "scalegpt.train", *argv])
    said = b""
    while b"step 20/" not in said:
        said += os.read(terminal, 1 << 16)
    os.close(terminal)  # the kernel sends SIGHUP, and whatever is printed fails from here on
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    stopped = max(rows(out_dir))
    assert 20 <= stopped < 150 and (out_dir / "checkpoints" / str(stopped)).is_dir()
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "scalegpt.train", *argv]
        assert subprocess.run(command, stdin=full, stdout=full, stderr=full).returncode == 0
    assert len(rows(out_dir)) == 150 and (out_dir / "checkpoints" / "150").is_dir()


@pytest.mark.slow
def test_after_kill_9_between_checkpoints_no_row_is_missing_or_twice(data, longer_run, tmp_path):
    argv = arguments(data, tmp_path / "run", **LONGER)
    code, output = run_with_signal(argv, "SIGKILL", 31)
    assert code == -signal.SIGKILL, output
    # More rows than the last checkpoint knows, and a torn line, as a kill can leave.
    assert 24 < max(rows(tmp_path / "run")) < 31
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 999, "train/lo')
    assert train.main(argv) == 0
    assert list(rows(tmp_path / "run")) == list(range(1, 41))
    assert rows(tmp_path / "run") == rows(longer_run)


LONG = {"optim.steps": 200, "eval.every": 0, "checkpoint.every": 50}


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("long") / "run"
    assert train.main(arguments(data, out_dir, **LONG)) == 0
    return rows(out_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at", "code"), [("SIGINT", 20, 3), ("SIGKILL", 70, -9)])
def test_a_run_of_200_updates_is_signalled_from_outside_and_continues(
    data, long_run, tmp_path, name, at, code
):
    argv = arguments(data, tmp_path / "run", **LONG)
    process = start(argv)
    wait_for_step(process, tmp_path / "run", at)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert at <= max(rows(tmp_path / "run")) < 200
    assert train.main(argv) == 0
    assert rows(tmp_path / "run") == long_run


def test_a_run_killed_before_its_first_checkpoint_starts_again(data, unbroken, tmp_path):
    out_dir = tmp_path / "run"
    shutil.copytree(unbroken, out_dir, ignore=shutil.ignore_patterns("checkpoints"))
    assert train.main(arguments(data, out_dir)) == 0
    assert rows(out_dir) == rows(unbroken)


@pytest.mark.parametrize("left", [None, ""])
def test_a_lost_config_comes_from_the_checkpoint(data, unbroken, tmp_path, left):
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    file = out_dir / "config.yaml"
    before = file.read_text()
    file.unlink() if left is None else file.write_text(left)
    with pytest.raises(ValueError, match="optim.lr: 0.01 -> 0.02"):
        train.main(arguments(data, out_dir, **{"optim.lr": 0.02}))
    assert train.main(arguments(data, out_dir)) == 0
    assert file.read_text() == before.replace(str(unbroken), str(out_dir))
    assert rows(out_dir) == rows(unbroken)


def test_a_reader_outlives_the_checkpoint_that_it_had_found(data, unbroken, tmp_path, monkeypatch):
    """The run has saved anew meanwhile, and removed it."""
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    find = Checkpoints.find

    def slow(self, which, items=()):
        step = find(self, which, items)
        older = out_dir / "checkpoints" / str(step)
        if step == STEPS:
            shutil.rmtree(older)
        return step

    monkeypatch.setattr(Checkpoints, "find", slow)
    argv = ["--run", str(out_dir), "--checkpoint", "latest", "--windows", "4"]
    assert evaluate.main(argv) == 0


def test_the_finished_run_started_again_changes_nothing(data, unbroken, tmp_path, capsys):
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    assert train.main(arguments(data, out_dir)) == 0
    assert (out_dir / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()
    assert "done: best val loss" in capsys.readouterr().out


def test_the_training_step_is_compiled_once_also_after_resuming(data, tmp_path, monkeypatch):
    built = []
    build = step.build_steps
    monkeypatch.setattr(step, "build_steps", lambda *a: built.append(build(*a)) or built[-1])
    stop_after(monkeypatch, 3)
    assert train.main(arguments(data, tmp_path / "run")) == 3
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "run")) == 0
    assert [s.jit_train._cache_size() for s in built] == [1, 1]
    assert [s.jit_evaluate._cache_size() for s in built] == [1, 1]


def test_metrics_of_an_update_are_read_after_the_next_is_dispatched(data, tmp_path, monkeypatch):
    """The host would otherwise wait for every update, and the device for the host."""
    events = []
    dispatch, row = step.Steps.train, Metrics.train

    def dispatched(self, state, tokens):
        events.append(f"dispatch {sum('dispatch' in e for e in events) + 1}")
        return dispatch(self, state, tokens)

    def read(self, values):
        events.append(f"read {values['step']}")
        row(self, values)

    monkeypatch.setattr(step.Steps, "train", dispatched)
    monkeypatch.setattr(Metrics, "train", read)
    changes = {"optim.steps": 5, "eval.every": 0, "checkpoint.every": 0}
    assert train.main(arguments(data, tmp_path / "run", **changes)) == 0
    # The first is waited for, as it compiles, and the last, as the run is evaluated.
    order = "dispatch 1, read 1, dispatch 2, dispatch 3, read 2, dispatch 4, read 3, dispatch 5"
    assert ", ".join(events) == f"{order}, read 4, read 5"


# --- evaluation


def test_fault_12_evaluation_does_not_change_training_and_repeats_itself(data, unbroken, tmp_path):
    changes = {"eval.every": 1, "checkpoint.every": 0}
    assert train.main(arguments(data, tmp_path / "run", **changes)) == 0
    assert rows(tmp_path / "run") == rows(unbroken)
    ours, theirs = rows(tmp_path / "run", "val/loss"), rows(unbroken, "val/loss")
    assert list(theirs) == [0, 5, 10, 12] and list(ours) == list(range(STEPS + 1))
    assert {at: ours[at] for at in theirs} == theirs


def test_fault_08_evaluation_and_sampling_use_no_dropout(data, unbroken, capsys):
    """The run has dropout 0.1; both commands give the same twice, and the logged figure."""
    outputs = []
    for _ in range(2):
        argv = ["--run", str(unbroken), "--checkpoint", "latest", "--windows", "12", "--json"]
        assert evaluate.main(argv) == 0
        argv = ["--run", str(unbroken), "--prompt", "KING:\n", "--max-new-tokens", "5"]
        assert generate.main([*argv, "--temperature", "0"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    row = json.loads(outputs[0].splitlines()[0])
    assert row["step"] == STEPS
    assert abs(row["val/loss"] - rows(unbroken, "val/loss")[STEPS]) < 1e-6
    assert outputs[0].splitlines()[1] == "KING:"


def test_fault_20_the_evaluate_command_works_on_other_data_and_for_a_person(
    data, unbroken, tmp_path, capsys
):
    other = write_data(tmp_path / "other", TEXT[::-1])
    assert evaluate.main(["--run", str(unbroken), "--data", str(other), "--windows", "5"]) == 0
    printed = capsys.readouterr().out
    assert "on other" in printed and "val/loss" in printed and "val/bits_per_byte" in printed


def test_fault_13_a_row_counts_updates_and_tokens_of_the_whole_batch(unbroken):
    tokens, loss = rows(unbroken, "train/tokens"), rows(unbroken)
    assert tokens == {at: at * ROWS * T for at in range(1, STEPS + 1)}
    assert loss[1] > loss[STEPS] + 0.3
    seconds, rate = rows(unbroken, "perf/step_seconds"), rows(unbroken, "perf/tokens_per_second")
    assert 1 not in seconds, "the compilation is no step"
    for at in seconds:
        assert math.isclose(seconds[at] * rate[at], ROWS * T, rel_tol=1e-6)


def test_a_mixture_reports_each_data_set_and_their_weighted_mean(data, tmp_path):
    other = write_data(tmp_path / "other", TEXT[::-1])
    path = json.dumps({str(data): 3, str(other): 1})
    argv = arguments(path, tmp_path / "run", **{"optim.steps": 2, "model.n_layer": 1})
    assert train.main(argv) == 0
    keys = ("val/plays/loss", "val/other/loss", "val/loss")
    plays, others, mean = (rows(tmp_path / "run", key) for key in keys)
    assert plays[0] != others[0] and plays[2] < plays[0]
    assert math.isclose(mean[2], 0.75 * plays[2] + 0.25 * others[2], rel_tol=1e-9)
    changed = arguments(
        json.dumps({str(data): 1, str(other): 1}),
        tmp_path / "run",
        **{"optim.steps": 2, "model.n_layer": 1},
    )
    with pytest.raises(ValueError, match="data.path: .*3.0.* -> .*1.0"):
        train.main(changed)


def test_two_data_sets_of_one_name_are_refused(data, tmp_path):
    twin = write_data(tmp_path / "plays", TEXT[::-1])
    path = json.dumps({str(data): 1, str(twin): 1})
    with pytest.raises(ValueError, match="are both named plays"):
        train.main(arguments(path, tmp_path / "run"))


# --- what is in the folder, and who may continue it


def test_the_folder_holds_config_metrics_best_and_latest(data, unbroken, capsys):
    names = {p.name for p in unbroken.iterdir()}
    assert names == {".lock", "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    stored = parse([f"--config={unbroken}/config.yaml"], "test", {})[0]
    asked = parse(arguments(data, unbroken), "test", {})[0]
    assert stored == asked.with_vocab(stored.model.vocab_size)
    checkpoints = open_checkpoints(unbroken)
    losses = rows(unbroken, "val/loss")
    best = min(list(losses)[1:], key=losses.get)
    assert checkpoints.find("best") == best and checkpoints.find("latest") == STEPS
    assert checkpoints.meta(STEPS)["best_loss"] == losses[best]
    checkpoints.close()


def test_without_a_tokenizer_that_can_begin_a_text_a_run_ends_without_a_sample(
    data, tmp_path, with_sample
):
    config = parse(arguments(data, tmp_path / "run"), "test", {})[0]
    said: list[str] = []
    metrics = SimpleNamespace(say=said.append)
    spec = {"kind": "char", "chars": "ACGT"}
    run = SimpleNamespace(config=config, meta={"tokenizer": spec}, metrics=metrics)
    assert with_sample(run, None) is None
    (line,) = said
    assert line == (
        "no sample: char tokenizer has no '\\n' (U+000A), only the 4 "
        "characters of the text that it was made from"
    )


@pytest.mark.slow
def test_fault_21_the_default_run_saves_and_the_commands_it_names_work(
    data, tmp_path, capsys, with_sample
):
    changes = {"checkpoint.every": None, "eval.every": None, "optim.steps": 3}
    changes |= {"eval.sample_every": 2, "eval.sample_prompt": "KING"}
    assert train.main(arguments(data, tmp_path / "run", **changes)) == 0
    printed = capsys.readouterr().out
    assert "at step 3" in printed and "- a sample after update 3 -" in printed
    lines = [line.strip() for line in printed.splitlines() if "python -m" in line]
    assert lines == [
        f'{python()} -m scalegpt.generate --run {tmp_path}/run --prompt "..."',
        f"{python()} -m scalegpt.evaluate --run {tmp_path}/run",
        f"{python()} -m scalegpt.report {tmp_path}/run",
    ]
    samples = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    samples = {row["step"]: row["prompt"] + row["text"] for row in samples}
    assert list(samples) == [2, 3] and all(samples[step] in printed for step in samples)
    kept = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert train.main(arguments(data, tmp_path / "run", **changes)) == 0  # finished: once more
    again = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["text"] for x in again] == [json.loads(x)["text"] for x in kept]
    capsys.readouterr()
    asked = ["--checkpoint", "3", "--prompt", "KING", "--max-new-tokens", str(T)]
    assert generate.main(["--run", str(tmp_path / "run"), *asked]) == 0
    assert capsys.readouterr().out.strip() == samples[3].strip()  # what the command writes
    assert (
        generate.main(
            [
                "--run",
                f"{tmp_path}/run",
                "--prompt",
                "K",
                "--num-samples",
                "2",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    assert evaluate.main(["--run", f"{tmp_path}/run"]) == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"optim.lr": 0.02}, r"optim.lr: 0.01 -> 0.02"),
        ({"run.seed": 7}, r"run.seed: 1337 -> 7"),
        ({"model.dropout": 0.2}, r"model.dropout: 0.1 -> 0.2"),
        ({"batch.sequences": 32}, r"batch.sequences: 16 -> 32"),
    ],
)
def test_a_change_of_the_curve_is_refused_naming_the_key(data, unbroken, change, line):
    before = sorted(p.stat().st_mtime_ns for p in unbroken.rglob("*"))
    allowed = f"allow_config_change={next(iter(change))}"
    with pytest.raises(ValueError, match=f"differs:\n  {line}\n(.|\n)*{allowed}"):
        train.main(arguments(data, unbroken, **change))
    assert sorted(p.stat().st_mtime_ns for p in unbroken.rglob("*")) == before


def test_a_change_of_the_curve_can_be_allowed(data, unbroken, tmp_path, capsys):
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    other = write_data(tmp_path / "plays", TEXT[::-1])
    changes = {"optim.steps": 14, "run.allow_config_change": "optim.steps,data.path"}
    assert train.main(arguments(other, out_dir, **changes)) == 0
    assert list(rows(out_dir)) == list(range(1, 15))
    allowed = "data.path: other tokens in plays", "optim.steps: 12 -> 14"
    assert "as allowed:\n  {}\n  {}\n".format(*allowed) in capsys.readouterr().out
    checkpoints = open_checkpoints(out_dir)
    meta = checkpoints.meta(14)
    assert meta["changes"] == [[12, change] for change in allowed]
    assert meta["config"]["run"]["allow_config_change"] is False
    # Neither the best loss nor the losses that a spike is measured against are those of other text.
    assert checkpoints.find("best") == 14 and checkpoints.meta(12)["best_loss"] is not None
    assert rows(out_dir, "val/best_loss")[14] == rows(out_dir, "val/loss")[14]
    assert np.isfinite(checkpoints.read_item(14, "optimizer")["health"]["recent"]).sum() == 2
    checkpoints.close()


def test_checkpoints_keep_the_command_and_the_devices_that_made_them(data, unbroken):
    meta = open_checkpoints(unbroken).meta(STEPS)
    program, module, name, *argv = shlex.split(meta["command"])
    assert (program, module, name) == (python(), "-m", "scalegpt.train")
    assert argv == arguments(data, unbroken) and meta["devices"] == "8 x cpu"


def test_permission_to_change_is_of_one_start(data, tmp_path):
    config = parse(
        arguments(data, tmp_path / "run", **{"run.allow_config_change": "true"}), "test", {}
    )[0]
    assert config.run.allows("optim.lr")
    resume.lock(config).lock.release()
    resume.write_config(config)
    kept = parse([f"--config={tmp_path}/run/config.yaml"], "test", {})[0]
    assert not kept.run.allows("optim.lr") and kept == resume.lasting(config)


def test_config_and_data_that_differ_are_named_at_once_and_a_replay_may_have_both(
    data, unbroken, tmp_path
):
    other = write_data(tmp_path / "plays", TEXT[::-1])
    argv = arguments(other, unbroken, **{"optim.lr": 0.02})
    config = parse(argv, "test", {})[0]
    datasets = open_datasets(config)
    config = config.with_vocab(datasets[0].vocab_size)
    lines = "optim.lr: 0.01 -> 0.02\n  data.path: other tokens in plays\n"
    with pytest.raises(ValueError, match=f"differs:\n  {lines}.*=optim.lr,data.path"):
        resume.stored_config(config, datasets)
    again = parse([*argv, "--run.replay=3"], "test", {})[0].with_vocab(config.model.vocab_size)
    assert "\n  ".join(resume.differences(resume.stored_config(again), again, datasets)) in lines


def test_a_start_that_came_to_no_update_is_not_held_against_another(data, tmp_path):
    config, other = (
        parse(arguments(data, tmp_path, **{"optim.lr": lr}), "test", {})[0] for lr in (0.01, 0.02)
    )
    said = []
    resume.write_config(config)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "time/startup": 1.0}\n{"step": 0, "val/loss": 3.5}\n')
    half = tmp_path / "checkpoints" / "4"
    half.mkdir(parents=True)
    (half / "unfinished").touch()
    assert resume.stored_config(other, say=said.append) == resume.lasting(config)
    assert said == [f"an earlier start in {tmp_path} came to no update; this one takes its place"]
    assert resume.stored_config(config, say=said.append) is not None and len(said) == 1
    assert resume.rows_to_keep(0, STEPS, begun_before=True) == -1  # its rows go
    # What has an update, or a checkpoint that may be mended, is a run.
    (half / "params").touch()
    (half / "unfinished").unlink()
    with pytest.raises(ValueError, match="holds a run that differs"):
        resume.stored_config(other, say=said.append)
    shutil.rmtree(half)
    with metrics.open("a") as file:
        file.write('{"step": 1, "train/loss": 3.4}\n')
    with pytest.raises(ValueError, match="holds a run that differs"):
        resume.stored_config(other, say=said.append)
    assert len(said) == 1


def test_other_data_under_the_same_path_is_refused(data, unbroken, tmp_path):
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    moved = shutil.copytree(data, tmp_path / "moved")
    assert train.main(arguments(moved, out_dir)) == 0, "the same tokens elsewhere are the same"
    changed = write_data(tmp_path / "plays", TEXT[::-1])
    with pytest.raises(ValueError, match="data.path: other tokens in plays"):
        train.main(arguments(changed, out_dir))


def test_before_the_first_evaluation_other_commands_take_the_latest_checkpoint(
    unbroken, tmp_path, capsys
):
    out_dir = str(shutil.copytree(unbroken, tmp_path / "run"))
    folder = open_folder(out_dir) / "checkpoints"
    for at, content in manifest.steps(folder).items():
        manifest.amend(folder / str(at), at, content["meta"], None)
    for parser in (evaluate._parser(), generate._parser()):
        assert trained.load(parser.parse_args(["--run", out_dir]), 1).step == STEPS
        assert capsys.readouterr().err.count("was evaluated yet; the latest is taken") == 1
        with pytest.raises(ValueError, match="no checkpoint 'best' in"):
            trained.load(parser.parse_args(["--run", out_dir, "--checkpoint=best"]), 1)
    assert scalegpt.load(out_dir).trained.step == STEPS


# --- weights of another run


def test_init_from_starts_from_the_best_weights_of_another_run(data, unbroken, tmp_path):
    argv = arguments(data, tmp_path / "run", run__init_from=unbroken, optim__steps=1)
    assert train.main([*argv, "--optim.warmup_steps=0"]) == 0
    best = min(list(rows(unbroken, "val/loss").values())[1:])
    assert abs(rows(tmp_path / "run", "val/loss")[0] - best) < 1e-6


def test_a_model_that_is_not_given_has_the_shape_of_the_weights(data, unbroken, tmp_path):
    """Also when the run continues, and its source is gone."""
    source = shutil.copytree(unbroken, tmp_path / "source")
    changes = {f"model.{key}": None for key in ("n_layer", "n_head", "n_embd", "block_size")}
    changes |= {"model.dropout": None, "run.init_from": source, "optim.schedule": "constant"}
    changes |= {"optim.warmup_steps": 0}
    argv = arguments(data, tmp_path / "run", **changes, optim__steps=1)
    assert train.main(argv) == 0
    best = min(list(rows(unbroken, "val/loss").values())[1:])
    assert abs(rows(tmp_path / "run", "val/loss")[0] - best) < 1e-6
    model, theirs = (read_history(str(x)).config.model for x in (tmp_path / "run", unbroken))
    assert model == theirs.model_copy(update={"dropout": 0.0})
    shutil.rmtree(source)
    assert train.main(arguments(data, tmp_path / "run", **changes, optim__steps=2)) == 0
    assert list(rows(tmp_path / "run")) == [1, 2]


def test_init_from_another_architecture_is_refused_and_nothing_is_written(data, unbroken, tmp_path):
    argv = arguments(data, tmp_path / "run", run__init_from=unbroken, model__n_layer=1)
    with pytest.raises(ValueError, match="holds another model: model.n_layer: 2 -> 1"):
        train.main(argv)
    assert not (tmp_path / "run" / "config.yaml").exists()
    # Of data with another tokenizer, that comes first: no other vocab_size would mend it.
    config = parse(argv, "test", {})[0].with_vocab(256)
    with pytest.raises(ValueError, match=f"tokens of char, .* with --tokenizer {unbroken}, or"):
        init_from.check(config, {"kind": "byte"})


# --- what goes wrong


def test_a_loss_that_is_not_finite_ends_with_4_and_no_bad_checkpoint(data, tmp_path, capsys):
    out_dir = tmp_path / "run"
    changes = {
        "optim.lr": 1e38,
        "optim.warmup_steps": 0,
        "optim.schedule": "constant",
        "checkpoint.every": 0,
        "eval.every": 0,
        "optim.grad_clip": 0,
    }
    assert train.main(arguments(data, out_dir, **changes)) == 4
    printed = capsys.readouterr().out
    assert "gradient of update 2 is not finite; stopped" in printed
    assert "no checkpoint yet" in printed and "--run.skip_nonfinite=N" in printed
    assert not [p for p in (out_dir / "checkpoints").iterdir() if p.name.isdigit()]


def test_the_last_good_checkpoint_is_named_and_a_bad_evaluation_saves_none(
    data, unbroken, tmp_path, capsys
):
    out_dir = shutil.copytree(unbroken, tmp_path / "run")
    changes = {"optim.lr": 1e38, "optim.schedule": "constant", "optim.steps": 20}
    changes |= {"run.allow_config_change": "true", "eval.every": 1, "checkpoint.every": 1}
    assert train.main(arguments(data, out_dir, **changes)) == 4
    printed = capsys.readouterr().out
    assert f"last good checkpoint is step {STEPS} in" in printed
    assert "error: the validation loss after update" in printed and "skip_non" not in printed
    checkpoints = open_checkpoints(out_dir)
    assert checkpoints.steps[-1] == STEPS
    checkpoints.close()


def test_out_of_memory_is_one_message_with_what_helps(data, tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 190G of 15G\n" + "buffers\n" * 99)

    monkeypatch.setattr(step.Steps, "train", exhausted)
    with pytest.raises(ValueError, match="190G of 15G\nlower batch.microbatch, raise mesh.fsdp"):
        train.main(arguments(data, tmp_path / "run"))


def test_rows_of_another_run_are_never_overwritten_however_often_one_tries(data, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text('{"step": 7, "train/loss": 1.5}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="is another run's"):
            train.main(arguments(data, tmp_path / "run"))
    assert rows(tmp_path / "run") == {7: 1.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"batch.sequences": 17}, "batch.sequences=17 does not divide over 8"),
        ({"batch.microbatch": 3}, "batch.microbatch=3 does not divide"),
        ({"mesh.data": 3}, "mesh .* does not fit 8 cpu"),
        ({"mesh.data": 1, "mesh.tensor": 8}, "n_head=2 does not divide over mesh.tensor=8"),
        ({"model.block_size": 100_000}, "needs at least 100001"),
        ({"distributed.process_id": 0}, "belong together"),
        ({"run.init_from": "/nowhere"}, "/nowhere is not the folder of a run"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(arguments(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_process_in_the_same_folder_is_refused(data, tmp_path):
    config = parse(arguments(data, tmp_path / "run"), "test", {})[0]
    with resume.lock(config):
        with pytest.raises(ValueError, match="another process is training in"):
            train.main(arguments(data, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    resume.lock(config).lock.release()  # free again


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_a_run_whose_batch_grows_continues_bitwise(data, tmp_path, monkeypatch, backend):
    changes = {"optim.steps": 5, "run.backend": backend, "eval.every": 0, "checkpoint.every": 0}
    grown = {**changes, "batch.growth": f"{{3: {2 * ROWS}}}"}
    assert train.main(arguments(data, tmp_path / "whole", **grown)) == 0
    stop_after(monkeypatch, 3)
    assert train.main(arguments(data, tmp_path / "parts", **grown)) == 3
    stop_after(monkeypatch)
    assert train.main(arguments(data, tmp_path / "parts", **grown)) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    tokens = rows(tmp_path / "whole", "train/tokens")
    assert list(tokens.values()) == [n * ROWS * T for n in (1, 2, 4, 6, 8)]

    assert train.main(arguments(data, tmp_path / "plain", **changes)) == 0
    small, large = (list(rows(tmp_path / name).values()) for name in ("plain", "whole"))
    assert small[:2] == large[:2] and small[2] != large[2]


@pytest.mark.slow
def test_a_run_whose_batch_grows_continues_on_another_mesh(data, tmp_path, monkeypatch):
    changes = {"optim.steps": 5, "eval.every": 0, "checkpoint.every": 0}
    changes["batch.growth"] = f"{{3: {2 * ROWS}}}"
    assert train.main(arguments(data, tmp_path / "whole", **changes)) == 0
    stop_after(monkeypatch, 3)
    assert train.main(arguments(data, tmp_path / "parts", **changes)) == 3
    stop_after(monkeypatch)
    changes |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "batch.microbatch": 4}
    assert train.main(arguments(data, tmp_path / "parts", **changes)) == 0
    ours, theirs = (rows(tmp_path / name) for name in ("parts", "whole"))
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-5)


def test_norms_epoch_and_training_loss_are_logged_as_asked(data, tmp_path, capsys):
    windows = len(np.fromfile(data / "train.bin", "<u2")) // T
    changes = {"optim.steps": 4, "log.norms_every": 2, "log.every": 10}
    argv = arguments(data, tmp_path / "run", **changes, **{"eval.train_windows": windows})
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    tokens = len(np.fromfile(data / "train.bin", "<u2"))
    characters = len(set(TEXT))
    for line in (
        f"data     plays ({tokens:,} tokens), tokenizer char, vocabulary of {characters}\n",
        "decay    weight decay 0.1 on 10 of 15 tensors, ",
        "update   256 tokens: 16 sequences of 16, 8 at a time\n",
        f"run      4 updates, 1,024 tokens, {4 * ROWS / (windows - 1):.2f} epochs of plays\n",
    ):
        assert line in said, said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    with_norms = [row for row in map(json.loads, lines) if any(k[:5] == "norm/" for k in row)]
    assert [row["step"] for row in with_norms] == [2, 4]
    for row in with_norms:  # the norm of all is that of the norms, layer by layer
        norms = {key: x for key, x in row.items() if key.startswith("norm/")}
        assert {"norm/h0/attn/qkv_kernel", "norm/h1/mlp/up_kernel", "norm/wte"} <= norms.keys()
        assert np.linalg.norm(list(norms.values())) == pytest.approx(row["train/grad_norm"])
        assert row["train/epoch"] == row["step"] * ROWS / (windows - 1)
    flags = ["--split", "train", "--windows", str(windows), "--json"]
    assert evaluate.main(["--run", str(tmp_path / "run"), "--checkpoint", "4", *flags]) == 0
    same = json.loads(capsys.readouterr().out)
    for key in ("loss", "bits_per_byte"):
        found = rows(tmp_path / "run", f"train/eval_{key}")
        assert list(found) == [0, 4] and found[4] == pytest.approx(same[f"train/{key}"], rel=1e-5)


def test_an_out_dir_that_is_a_file_is_a_message(data, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run.out_dir"):
        train.main(arguments(data, tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_is_no_run_is_a_message(tmp_path):
    for command, extra in ((evaluate.main, []), (generate.main, ["--prompt", "K"])):
        with pytest.raises(ValueError, match="is not the folder of a run"):
            command(["--run", str(tmp_path), *extra])


@pytest.mark.slow
def test_a_run_with_wandb_offline_and_tensorboard(data, tmp_path):
    changes = {"log.wandb": "true", "log.tensorboard": "true", "optim.steps": 2}
    assert train.main(arguments(data, tmp_path / "run", **changes)) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_fault_18_every_process_decides_by_its_own_index():
    """Only the main process writes rows: the metrics of any other write nothing."""
    silent = Metrics(
        "/nowhere/at/all",
        LogConfig(wandb=True),
        total_steps=1,
        is_main=False,
        phases=Phases(RunConfig(out_dir="x")),
    )
    silent.train({"step": 1, "train/loss": 1.0})
    silent.close()
    assert not Path("/nowhere").exists()


def test_data_sets_in_another_order_are_refused(data, tmp_path):
    config = parse(arguments(data, tmp_path / "run"), "test", {})[0]
    stored = {"data": {"a": "1", "b": "2"}, "best_loss": 1.5, "config": config.model_dump()}
    for names, others in (("xy", None), ("ba", "21"), ("abc", "123")):
        meta = {"data": dict(zip(names, others or "12", strict=True)), "config": stored["config"]}
        if others is None:
            assert resume.carry_over(config, meta, stored, 4, print) == []
            assert meta["best_loss"] == 1.5
        else:
            with pytest.raises(ValueError, match="other tokens"):
                resume.carry_over(config, meta, stored, 4, print)


def test_other_documents_of_the_same_tokens_are_refused_where_they_matter(data, tmp_path):
    def continued(stored_index, index, **changes):
        config = parse(arguments(data, tmp_path / "run", **changes), "test", {})[0]
        metas = [
            resume.data_marks(config, [SimpleNamespace(name="a", fingerprint="1", index=mark)])
            | {"config": config.model_dump(), "best_loss": 1.5}
            for mark in (stored_index or "", index)
        ]
        if stored_index is None:  # as versions of before have saved it
            del metas[0]["index"]
        return resume.carry_over(config, metas[1], metas[0], 4, print), metas[1]

    for key, value in (("shuffle", "documents"), ("pack", "best_fit"), ("document_mask", "true")):
        keys = {f"data.{key}": value}
        assert continued("x y", "x y", **keys)[0] == continued(None, "x y", **keys)[0] == []
        with pytest.raises(ValueError, match="data.path: the same tokens in other documents in a"):
            continued("x y", "x z", **keys)
        allowed = keys | {"run.allow_config_change": "data.path"}
        assert len(continued("x y", "x z", **allowed)[0]) == 1
    assert continued("x y", "x z")[0] == [] and continued("x y", "x z")[1]["index"] == {}


def test_what_was_allowed_is_said_and_kept_and_a_best_of_other_text_is_none(data, tmp_path):
    old = parse(arguments(data, tmp_path / "run"), "test", {})[0]
    stored = {"data": {"a": "1"}, "best_loss": 1.5, "config": old.model_dump()}
    stored = json.loads(json.dumps(stored))  # as a manifest has it

    def continued(mark: str, **changes) -> tuple[list[str], dict, str]:
        config = parse(arguments(data, tmp_path / "run", **changes), "test", {})[0]
        meta, said = {"data": {"a": mark}, "config": config.model_dump(), "best_loss": 9.0}, []
        changed = resume.carry_over(config, meta, stored, 4, said.append)
        return changed, meta, "\n".join(said)

    allow = {"run.allow_config_change": "optim.lr,data.path"}
    changed, meta, said = continued("1", **allow | {"optim.lr": 0.02})
    assert changed == ["optim.lr: 0.01 -> 0.02"] and changed[0] in said
    assert meta["changes"] == [[4, changed[0]]] and meta["best_loss"] == 1.5
    with pytest.raises(ValueError, match="batch.sequences: 16 -> 32\n.*=batch.sequences$"):
        continued("1", **allow | {"batch.sequences": 32})
    for mark, change in (("2", allow), ("1", {"eval.windows": 5})):
        changed, meta, said = continued(mark, **change)
        assert meta["best_loss"] == 9.0 and "1.5000, was measured on other text, windows" in said
        assert changed == (["data.path: other tokens in a"] if mark == "2" else [])
    *_, said = continued("1", **{"eval.windows": 5, "optim.steps": 4, "run.allow_config_change": 1})
    assert "measured" not in said, "a finished run measures nothing more"


@pytest.mark.parametrize("patience", ["0.001", "3600"])
def test_a_run_that_cannot_save_goes_on_and_then_says_so_by_its_exit_code(
    data, tmp_path, monkeypatch, capsys, patience
):
    """After checkpoint.patience, or at its end: never a silent 0."""

    def full(self, name, tree):
        if self.step > 4:
            raise OSError(28, "No space left on device")
        return copy(self, name, tree)

    copy = writing.Save._copy
    monkeypatch.setattr(writing.Save, "_copy", full)
    argv = arguments(data, tmp_path / "run", **{"checkpoint.patience": patience, "eval.every": 0})
    assert train.main(argv) == 5
    printed = capsys.readouterr().out
    assert printed.count("warning: step 8 could not be saved") == 1
    assert "No space left on device; stopped; the last good checkpoint is step 4 in" in printed
    assert "done: best val loss" not in printed
    last = max(rows(tmp_path / "run"))
    assert last == STEPS if patience == "3600" else 8 < last <= STEPS
