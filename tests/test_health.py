"""Updates that are not finite, and spikes: what is applied and said, what can be done after."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import ROWS, T, arguments, rows

from scalegpt import train
from scalegpt.checkpoints.checkpoints import open_checkpoints
from scalegpt.config import RunConfig
from scalegpt.config.command_line import parse
from scalegpt.data.datasets import open_datasets, windows_of
from scalegpt.run import replay, resume
from scalegpt.step import build, health, optimizer, sharding, update
from scalegpt.step.pmap import build_steps as build_pmap

pytestmark = pytest.mark.usefixtures("signals_as_they_were")
BAD = 7


def poison(monkeypatch, at: int, by: float) -> None:
    """Loss and gradient of update `at` come out `by` times as large."""
    apply_gradients = update.apply_gradients

    def poisoned(config, dtype, state, total, grads, count):
        factor = jnp.where(state.step == at - 1, by, 1.0)
        grads = jax.tree.map(lambda g: g * factor, grads)
        total = jax.tree.map(lambda x: x * factor, total)
        return apply_gradients(config, dtype, state, total, grads, count)

    monkeypatch.setattr(update, "apply_gradients", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_the_run_ends_with_4_and_names_step_windows_norms_and_checkpoint(
    plays, tmp_path, monkeypatch, capsys, by
):
    poison(monkeypatch, BAD, by)
    argv = arguments(plays, tmp_path / "run", checkpoint__every=3)
    assert train.main(argv) == 4
    printed = capsys.readouterr().out
    assert f"update {BAD} is not finite" in printed and "h/attn" not in printed
    assert "last good checkpoint is step 6" in printed and "--run.skip_nonfinite=N" in printed
    assert f"--run.replay={BAD}" in printed and "not finite)" in printed
    (noted,) = map(json.loads, (tmp_path / "run" / "bad_updates.jsonl").read_text().splitlines())
    config = parse(argv, "test", {})[0]
    seen = [tuple(w) for w in noted["windows"]]
    assert noted["step"] == BAD and seen == windows_of(config, open_datasets(config), BAD)
    assert f"plays:{seen[0][1]}" in printed and len(seen) == ROWS
    assert len(noted["norms"]["h/attn/qkv_kernel"]) == 2  # layers
    assert rows(tmp_path / "run")[BAD] is None and BAD + 1 not in rows(tmp_path / "run")
    # Without the fault, the same command goes on from there.
    monkeypatch.undo()
    assert train.main(argv) == 0


def test_windows_of_an_update_are_what_the_step_was_given(plays, tmp_path):
    config = parse(arguments(plays, tmp_path / "run"), "test", {})[0]
    datasets = open_datasets(config)
    from scalegpt.data.datasets import train_batches

    batch = train_batches(config, datasets, ROWS // 2, np.arange(ROWS // 2))[BAD - 1]
    expected = [datasets[0].train[s : s + T + 1] for _, s in windows_of(config, datasets, BAD)]
    np.testing.assert_array_equal(batch.reshape(ROWS, T + 1), expected)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param("pmap", marks=pytest.mark.slow),
    ],
)
def test_a_bad_update_changes_no_weight_and_no_moment_on_any_mesh(plays, monkeypatch, mesh):
    poison(monkeypatch, 2, math.nan)
    argv = arguments(plays, "nowhere", model__vocab_size=40)
    if mesh == "pmap":
        config = parse(argv, "test", {})[0]
        steps = build_pmap(config, sharding.make_mesh(config.mesh), "float32", "xla")
    else:
        argv += [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
        config = parse(argv, "test", {})[0]
        steps = build.build_steps(config, sharding.make_mesh(config.mesh), "float32", "xla")
    accumulation, microbatch = steps.layout
    tokens = jax.random.randint(jax.random.key(0), (accumulation, microbatch, T + 1), 0, 40)
    tokens = jax.device_put(tokens, steps.batch_sharding)
    state, values = steps.train(steps.init(), tokens)
    assert int(values["nonfinite"]) == 0
    before = jax.tree.map(np.array, (state.params, state.opt_state[1]))
    recent = np.array(state.health.recent)
    state, values = steps.train(state, tokens)
    jax.tree.map(
        np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state[1]))
    )
    assert int(values["nonfinite"]) == int(state.health.nonfinite) == 1 and int(state.step) == 2
    np.testing.assert_array_equal(recent, state.health.recent)
    # The schedule counts the update all the same: the next has the rate of the third.
    assert int(state.opt_state[3].count) == 2
    lr = float(steps.train(state, tokens)[1]["train/lr"])
    assert lr == float(optimizer.schedule(config.optim)(2))


@pytest.mark.slow
def test_bad_updates_are_left_out_up_to_so_many(plays, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, BAD, math.nan)
    argv = arguments(plays, tmp_path / "run", run__skip_nonfinite=1)
    assert train.main(argv) == 0
    loss = rows(tmp_path / "run")
    assert [at for at in loss if loss[at] is None] == [BAD] and loss[12] < loss[1]
    skipped = rows(tmp_path / "run", "train/skipped")
    assert skipped[BAD - 1] == 0 and skipped[BAD] == skipped[12] == 1
    assert "it is not applied" in capsys.readouterr().out


def test_deviation_is_numpys():
    losses = np.random.default_rng(0).normal(3, 0.1, health.WINDOW).astype(np.float32)
    median = np.median(losses)
    spread = 1.4826 * np.median(np.abs(losses - median))
    got = health.deviation(jnp.asarray(losses), jnp.float32(4))
    np.testing.assert_allclose(got, (4 - median) / spread, rtol=1e-5)
    for known, expected in ((health.ENOUGH - 1, 0), (health.ENOUGH, None)):
        some = np.where(np.arange(health.WINDOW) < health.WINDOW - known, np.nan, losses)
        got = float(health.deviation(jnp.asarray(some), jnp.float32(4)))
        assert (got == 0) == (expected == 0)
    # Constant losses: the smallest step is no spike.
    assert float(health.deviation(jnp.full(health.WINDOW, 3.0), jnp.float32(3.001))) < 1


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["true", "false"])
def test_a_spike_is_warned_of_and_by_option_left_out(plays, tmp_path, monkeypatch, capsys, skip):
    at = health.ENOUGH + 3
    poison(monkeypatch, at, 50.0)
    changes = {"optim.steps": at + 2, "run.skip_spikes": skip, "log.every": 100, "eval.every": 0}
    assert train.main(arguments(plays, tmp_path / "run", **changes)) == 0
    printed = capsys.readouterr().out
    assert f"of update {at} is" in printed and "deviations above" in printed
    assert ("is left out" in printed) == (skip == "true")
    skipped = rows(tmp_path / "run", "train/skipped")
    assert list(skipped) == [1, at, at + 2], "the row of a spike is written"
    assert skipped[at + 2] == (skip == "true")


def test_after_a_lasting_rise_updates_are_applied_again():
    run = RunConfig(out_dir="x", skip_spikes=True)
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    levels = np.where(np.arange(400) < 200, 3, 5)
    state, applied = health.initial(), []
    judge = jax.jit(lambda state, loss: health.judge(run, state, loss, jnp.float32(1)))
    for loss in (levels + noise).astype(np.float32):
        apply, _, state = judge(state, loss)
        applied.append(bool(apply))
    assert all(applied[:200]) and not any(applied[200:235]) and all(applied[270:])
    assert int(state.spikes) == applied.count(False)


def test_layer_norms_are_numpys():
    tree = {"wte": jnp.arange(6.0).reshape(2, 3), "h": {"x": jnp.arange(12.0).reshape(2, 2, 3)}}
    norms = health.layer_norms(tree)
    assert list(norms) == ["h/x", "wte"]
    np.testing.assert_allclose(norms["wte"], np.linalg.norm(np.arange(6)), rtol=1e-6)
    expected = [np.linalg.norm(np.arange(6)), np.linalg.norm(np.arange(6, 12))]
    np.testing.assert_allclose(norms["h/x"], expected, rtol=1e-6)


# --- replay


@pytest.mark.slow
def test_replay_shows_the_batch_as_the_run_saw_it_and_writes_nothing(plays, tmp_path, capsys):
    """From a checkpoint and from the start; with dropout; on another mesh than the run's."""
    argv = arguments(plays, tmp_path / "run", checkpoint__every=5, checkpoint__keep=3)
    assert train.main(argv) == 0
    loss = rows(tmp_path / "run")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    other = ["--mesh.data=2", "--mesh.tensor=2", "--mesh.fsdp=2", "--batch.microbatch=2"]
    for at, start, mesh in ((8, 5, []), (3, 0, other)):
        capsys.readouterr()
        assert train.main([*argv, f"--run.replay={at}", *mesh]) == 0
        printed = capsys.readouterr().out
        assert f"update {at}, from the checkpoint of step {start}: loss" in printed
        assert abs(float(printed.split("loss ")[1].split(",")[0]) - loss[at]) < 2e-6
        assert "h/attn/qkv_kernel" in printed
        shown = [line.split()[:2] for line in printed.splitlines() if "plays:" in line]
        assert len(shown) == replay.SHOWN
    other = tiny_run.write_data(tmp_path / "plays", tiny_run.TEXT[::-1])
    for at, first, second in ((8, 2, 1), (3, 1, 2)):
        capsys.readouterr()
        assert (
            train.main([*argv, f"--data.path={other}", "--optim.lr=0.02", f"--run.replay={at}"])
            == 0
        )
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "this is not the run's own update, for these settings differ:"
        assert said[first] == "  optim.lr: 0.01 -> 0.02"
        assert said[second] == "  data.path: other tokens in plays"
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="run.replay=13 is beyond the run's end, optim.steps=12"):
        train.main([*argv, "--run.replay=13"])
    with pytest.raises(ValueError, match="is not the folder of a run"):
        train.main(arguments(plays, tmp_path / "none", run__replay=3))


@pytest.mark.slow
def test_the_examples_losses_are_the_updates(plays, tmp_path):
    assert train.main(arguments(plays, tmp_path / "run", checkpoint__keep=9)) == 0
    config = parse([f"--config={tmp_path}/run/config.yaml"], "test", {})[0]
    steps = build.build_steps(config, sharding.make_mesh(config.mesh), "float32", "xla")
    checkpoints = open_checkpoints(tmp_path / "run")
    state = resume.initial_state(config, steps, checkpoints, 8, print)
    checkpoints.close()
    from scalegpt.run.feed import batches_from

    datasets = open_datasets(config)
    batch = next(batches_from(config, datasets, steps, 8))
    losses = replay.example_losses(config, steps, state, batch)
    assert losses.shape == (ROWS,) and np.ptp(losses) > 0
    assert abs(losses.mean() - rows(tmp_path / "run")[9]) < 1e-6
