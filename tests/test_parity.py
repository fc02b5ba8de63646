"""tools/parity.py says ok where the numbers are the same, and FAIL where they are not."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from conftest import ROOT

from scalegpt.step import update

T = 16


@pytest.fixture(scope="module")
def argv(bottles) -> list[str]:
    return [
        *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", f"--model.block_size={T}"),
        *("--model.scan_layers=true", "--model.dropout=0.1", "--batch.sequences=20", "--steps=3"),
        *("--optim.lr=1e-3", "--optim.warmup_steps=5", f"--data.path={bottles}"),
        "--run.out_dir=unused",
    ]


def in_this_process(monkeypatch, capsys, argv: list[str], *names: str) -> tuple[int, dict]:
    monkeypatch.setattr(parity, "ROWS", [row for row in parity.ROWS if row.name in names])
    # The settings of the tool's own process are none of the tests'.
    monkeypatch.setattr(parity, "settings", lambda folder: None)
    code = parity.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_every_row_agrees_on_a_tiny_model(argv, tmp_path):
    """The command as a person types it, with its eight devices and its two processes."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC")
    }
    command = [sys.executable, str(ROOT / "tools" / "parity.py"), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"3 updates of 32 x {T} tokens in float32 on 8 x cpu")
    assert lines[1] == "batch.sequences raised from 20 to 32: 8 devices x accumulation 4"
    assert lines[-1] == "11 rows agree, 0 FAIL, 0 skipped" and not list(tmp_path.iterdir())
    figure = r"(\d\.\de[+-]\d\d)"
    pattern = rf"(.+?) +{figure}  {figure}  {figure} +([\d.]+) MB +([\d,]+) ms  ok"
    rows = {m[1]: m.groups()[1:] for line in lines if (m := re.fullmatch(pattern, line))}
    assert list(rows) == [row.name for row in parity.ROWS] and len(rows) == 11
    assert len({len(line) for line in lines[3:-1]}) == 1, "the columns are not aligned"
    # Equal to the digit would mean that a row is the reference itself.
    assert [name for name, row in rows.items() if float(row[2]) == 0] == ["jit, 1 device"]
    moved = {name: float(row[3]) for name, row in rows.items()}
    assert moved["jit, 1 device"] == 0 < moved["data 8"] == moved["data 8, accumulation 4"]
    assert moved["pmap 8, two processes"] == moved["pmap 8"] == moved["data 8"] < moved["fsdp 8"]


@pytest.mark.slow
def test_rows_agree_on_a_tiny_model(argv, monkeypatch, capsys):
    names = ("jit, 1 device", "data 2 x fsdp 2 x tensor 2")
    code, found = in_this_process(monkeypatch, capsys, argv, *names)
    assert code == 0 and found["ok"]
    assert [(row["name"], row["verdict"]) for row in found["rows"]] == [(n, "ok") for n in names]
    # Equal to the digit would mean that a row is the reference itself.
    assert [row["state_difference"] == 0 for row in found["rows"]] == [True, False]


@pytest.mark.slow
def test_a_gradient_of_the_wrong_size_fails_though_adamw_hides_it(argv, monkeypatch, capsys):
    """As when a reduction means where it should sum; here it depends on the accumulation."""
    accumulate = update.accumulate

    def broken(loss, params, tokens, rows):
        total, grads = accumulate(loss, params, tokens, rows)
        return total, jax.tree.map(lambda g: g / tokens.shape[0], grads)

    monkeypatch.setattr(update, "accumulate", broken)
    names = ("jit, 1 device", "pmap 8, accumulation 4")
    code, found = in_this_process(monkeypatch, capsys, argv, *names)
    assert code == 1 and not found["ok"]
    fine, wrong = found["rows"]
    assert fine["verdict"] == "ok" and wrong["verdict"] == "FAIL"
    assert wrong["reason"].startswith("train/grad_norm, norms/")
    assert wrong["norm_difference"] == pytest.approx(0.75, abs=1e-3)
    assert wrong["loss_difference"] < 1e-5


@pytest.mark.slow
def test_a_wrong_gradient_of_the_right_size_fails_at_any_learning_rate(argv, monkeypatch, capsys):
    """In the middle of a warm-up parameters differ by less than 2e-6, whatever the gradient is."""
    accumulate = update.accumulate

    def broken(loss, params, tokens, rows):
        total, grads = accumulate(loss, params, tokens, rows)
        shift = int(tokens.shape[0] > 1)
        return total, {**grads, "ln_f": jax.tree.map(lambda g: jnp.roll(g, shift), grads["ln_f"])}

    monkeypatch.setattr(update, "accumulate", broken)
    argv = [*argv, "--optim.steps=5000", "--optim.warmup_steps=4000"]
    code, found = in_this_process(
        monkeypatch, capsys, argv, "jit, 1 device", "data 8", "data 8, accumulation 2"
    )
    assert [row["verdict"] for row in found["rows"]] == ["ok", "ok", "FAIL"] and code == 1
    wrong = found["rows"][2]
    assert "params/ln_f/scale" in wrong["reason"] and wrong["norm_difference"] < 1e-5


@pytest.mark.slow
def test_a_run_whose_rounding_grows_agrees_and_a_lost_moment_fails(argv, monkeypatch, capsys):
    """At this rate rounding grows tenfold in an update; parameters show a moment an update late."""
    apply = update.apply_gradients

    def broken(config, dtype, state, *sums):
        state, metrics = apply(config, dtype, state, *sums)
        lost = config.run.backend == "pmap"
        drop = lambda x: jnp.where(lost & (state.step == 8), 0, x)  # noqa: E731
        return state.replace(opt_state=jax.tree.map(drop, state.opt_state)), metrics

    monkeypatch.setattr(update, "apply_gradients", broken)
    wild = ["--model.qk_norm=true", "--model.bias=true", "--optim.lr=0.1", "--optim.warmup_steps=2"]
    code, found = in_this_process(
        monkeypatch, capsys, [*argv, *wild, "--steps=8"], "jit, 1 device", "data 8", "pmap 8"
    )
    assert [row["verdict"] for row in found["rows"]] == ["ok", "ok", "FAIL"] and code == 1
    assert "opt_state/" in found["rows"][2]["reason"]


def test_rounding_explains_any_step_of_a_vanishing_gradient_and_little_of_another(argv):
    """After an update by lr = 1e-3 with root mean squares 1, 0.1, 1e-9 and 0 of a table's row."""
    config = parity.command_line.parse([*argv, "--model.vocab_size=50"], "test", parity.FLAGS)[0]
    squares = np.array([[1, 0.01, 1e-18, 0]]) * 0.05  # as beta2 is 0.95
    names = parity.parameters(config.model)
    after = {f"params/{name}": np.zeros((1, 4)) for name in names}
    before = {**after, "opt_state/1/nu/wte": squares / 2}
    after |= {"opt_state/1/nu/wte": squares, "step": 1, "train/lr": 1e-3, "opt_state/2/count": 1}
    before |= {"opt_state/1/mu/wte": np.zeros((1, 4))}
    after |= {"opt_state/1/mu/wte": np.array([[0.1, 0.01, 1e-10, 0]]), "train/grad_norm": 0}
    bounds = parity.rounding(config, before, after, 1e-5)
    np.testing.assert_allclose(bounds["params/wte"][0], [2e-8, 2e-7, 2e-3, 2e-3], rtol=1e-4)
    np.testing.assert_allclose(bounds["opt_state/1/mu/wte"], 1e-6)
    np.testing.assert_allclose(bounds["opt_state/1/nu/wte"], 2e-5 * 1.5 * 0.05, rtol=1e-4)
    assert bounds["opt_state/2/count"] == 0 and "step" not in bounds
    after["train/grad_norm"] = 1.0  # whose rounding is in each entry of a gradient that vanishes
    noisy = parity.rounding(config, before, after, 1e-5)
    np.testing.assert_allclose(noisy["opt_state/1/mu/wte"], 1e-6 + 2**-24, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.001, 0.999, -1, np.nan])
def test_a_wrong_norm_of_one_layer_shows_and_rounding_of_a_vanishing_gradient_does_not(scale):
    expected = {"train/grad_norm": np.float32(10), "norms/wte": np.float32(10)}
    expected |= {"norms/h/k_bias": np.array([1e-9, 0], np.float32), "params/wte": np.ones(3)}
    expected["norms/h/ln_1/scale"] = np.array([0.02, 0.002], np.float32)
    rounded = {path: x * np.float32(1 + 2e-6) + np.float32(1e-7) for path, x in expected.items()}
    honest = parity.norm_differences(rounded, expected)
    assert set(honest) == set(expected) - {"params/wte"} and max(honest.values()) <= 1e-5
    off = rounded | {"norms/h/ln_1/scale": expected["norms/h/ln_1/scale"] * [1, scale]}
    failed = {
        path for path, gap in parity.norm_differences(off, expected).items() if not gap <= 1e-5
    }
    assert failed == {"norms/h/ln_1/scale"}


@pytest.mark.parametrize(
    ("tolerance", "off", "code", "verdict"),
    [("0", 1e-9, 1, "FAIL"), ("1e-5", 1e-9, 0, "ok"), ("1e-5", np.nan, 1, "FAIL")],
)
def test_verdicts_follow_the_tolerance_and_an_impossible_mesh_is_skipped(
    argv, monkeypatch, capsys, tolerance, off, code, verdict
):
    def result(off):
        # In units of the tolerance, as those of `rounding` are.
        shares = {"wte": 0.0, "wpe": parity.share(np.array([0, off]), 0, 1e-3 * float(tolerance))}
        return parity.Result(0.0, {"train/grad_norm": 0.0}, shares, 1.0, 0)

    results = [result(0.0), result(off)]
    monkeypatch.setattr(parity, "updates", lambda *_: results.pop(0))
    names = ("jit, 1 device", "data 2 x fsdp 2 x tensor 2", "replica 2 x data 4")
    odd = [*argv, "--model.n_head=1", f"--tolerance={tolerance}"]
    exit_code, found = in_this_process(monkeypatch, capsys, odd, *names)
    assert exit_code == code
    assert [row["verdict"] for row in found["rows"]] == ["ok", "skipped", verdict]
    assert "n_head=1 does not divide over mesh.tensor=2" in found["rows"][1]["reason"]
    assert found["rows"][2].get("reason", "wpe") == "wpe"


def test_a_row_that_breaks_is_a_failure_and_the_others_run(argv, monkeypatch, capsys):
    def breaks(*_):
        raise RuntimeError("process 1 died")

    result = parity.Result(0.0, {"train/grad_norm": 0.0}, {"w": 0.0}, 1.0, 0)
    monkeypatch.setattr(parity, "in_processes", breaks)
    monkeypatch.setattr(parity, "updates", lambda *_: result)
    names = ("jit, 1 device", "data 8, two processes", "replica 2 x data 4")
    code, found = in_this_process(monkeypatch, capsys, argv, *names)
    verdicts = {row["name"]: row["verdict"] for row in found["rows"]}
    assert code == 1 and verdicts == dict(zip(names, ("ok", "FAIL", "ok"), strict=True))
    assert found["rows"][2]["reason"] == "process 1 died"
    whole = dict.fromkeys(("norm_difference", "state_difference", "step_seconds"), 0.0)
    whole |= {"verdict": "ok", "loss_difference": 0.0}
    assert "       - MB  " in parity.line({**whole, "bytes_moved": None})
    assert "     2.5 MB  " in parity.line({**whole, "bytes_moved": 2.5e6})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--tolerance=-1"], "--tolerance=-1.0 must be at least 0"),
        (["--model.n_haed=2"], "did you mean --model.n_head"),
        (
            ["--objective.name=grpo", "--grpo.reward=exact", "--run.init_from=x"]
            + ["--grpo.prompts=5", "--grpo.samples=4", "--model.dropout=0"],
            "would learn from answers of its own",
        ),
    ],
)
def test_mistakes_are_refused(argv, flags, message):
    with pytest.raises(ValueError, match=message):
        parity.main([*argv, *flags])


def test_fewer_devices_than_eight_are_refused(argv, monkeypatch):
    monkeypatch.setattr(parity, "DEVICES", 16)
    with pytest.raises(ValueError, match="8 devices, parity needs 16: unset JAX_NUM_CPU_DEVICES"):
        parity.main(argv)


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"JAX_NUM_CPU_DEVICES": "8"}, "64"),
        ({}, ""),
        ({"JAX_NUM_CPU_DEVICES": "1"}, ""),
        ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "3"}, ""),
        ({"JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "5"}, "5"),
    ],
)
def test_simulated_devices_get_threads_enough(given, threads):
    """With as many threads as devices, two collectives at once (fsdp) can wait for ever."""
    names = ("JAX_NUM_CPU_DEVICES", "NPROC", "PJRT_NPROC")
    outside = {k: v for k, v in os.environ.items() if k not in names}
    program = "import os, scalegpt; print(os.environ.get('PJRT_NPROC', ''))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=outside | given
    )
    assert done.stdout.strip() == threads, done.stderr
