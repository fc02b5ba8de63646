"""tools/ablation.py: its figures against NumPy on rows of real runs; interrupted, and failing."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import ablation
import numpy as np
import pytest
import tiny_run
from ablations import record as ablation_record
from ablations.plan import read_plan
from ablations.plot import draw
from ablations.record import training_seconds
from ablations.report import cost_to_reach, markdown, summarise, table
from conftest import ROOT
from tiny_ablation import ARMS, SEEDS, TOKENS, write

from scalegpt import train
from scalegpt.config import command_line
from scalegpt.model import flops


@pytest.fixture(scope="module")
def finished(plays, tmp_path_factory) -> tuple[Path, Path, str]:
    """Its file, its folder and what was said. In this process, for speed: real ones are below."""
    folder = tmp_path_factory.mktemp("ablation")
    file, said = write(folder, plays), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(ablation.Children, "run", lambda self, run, output: train.main(run[3:]))
        assert ablation.main([str(file), "--out", str(folder / "out")]) == 0
    return file, folder / "out", said.getvalue()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- figures


@pytest.mark.slow
def test_the_figures_are_numpys_of_the_rows(finished, capsys):
    file, out, said = finished
    assert ablation.main([str(file), "--out", str(out), "--report", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["reference"] == "plain" and list(summary["arms"]) == ["plain", "wide"]
    steps = [0, 5, 10, 12]
    curves, seconds = {}, {}
    for arm in ARMS:
        found = [rows(out / arm / f"seed-{seed}") for seed in SEEDS]
        vals = [{r["step"]: r for r in run if "val/loss" in r} for run in found]
        assert [list(v) for v in vals] == [steps, steps]
        curves[arm] = np.array([[v[s]["val/loss"] for s in steps] for v in vals])
        # All updates but the first, which compiles, are timed: it counts as the second.
        timed = [[r["perf/step_seconds"] for r in run if "perf/step_seconds" in r] for run in found]
        assert [len(x) for x in timed] == [11, 11]
        seconds[arm] = np.mean([sum(x) + x[0] for x in timed])
        # A part of the time of training, which the ledger rounds to milliseconds.
        for run, readings in zip(found, timed, strict=True):
            ledger = next(r for r in reversed(run) if "time/step" in r)
            assert 0 < sum(readings) <= ledger["time/step"] + ledger["time/data"] + 0.001
        figures = summary["arms"][arm]
        assert figures["val_loss"] == pytest.approx(curves[arm][:, -1].mean(), abs=2e-6)
        assert figures["val_loss_std"] == pytest.approx(curves[arm][:, -1].std(ddof=1), abs=2e-6)
        bits = np.mean([v[12]["val/bits_per_byte"] for v in vals])
        assert figures["bits_per_byte"] == pytest.approx(bits, abs=2e-6)
        assert figures["seconds"] == pytest.approx(seconds[arm], abs=2e-3)
        assert figures["tokens"] == 12 * TOKENS
        config, _ = command_line.parse([f"--config={out}/{arm}/seed-1/config.yaml"], "test", {})
        assert config.model.n_embd == (64 if arm == "wide" else 32)
        assert figures["parameters"] == flops.parameter_count(config.model)
        assert figures["flops"] == 12 * TOKENS * flops.flops_per_token(config.model)
        assert figures["runs"] == {"1": "done", "2": "done"}
        assert f"{figures['val_loss']:.4f} ± {figures['val_loss_std']:.4f}" in said
        assert f"{figures['parameters']:,}" in said
    assert curves["plain"][0, -1] != curves["plain"][1, -1]  # the seed is another
    target, loss = curves["plain"][:, -1].mean(), curves["wide"].mean(0)
    reached = np.exp(np.interp(-target, -loss[1:], np.log(np.array(steps[1:]) * TOKENS)))
    assert loss[1] > target > loss[-1]  # so that there is something to interpolate
    assert summary["arms"]["wide"]["reach"]["tokens"] == pytest.approx(reached, rel=1e-4)
    ratio = summary["arms"]["wide"]["ratio"]
    assert ratio["tokens"] == pytest.approx(reached / (12 * TOKENS), rel=1e-4)
    per_token = [summary["arms"][arm]["flops"] for arm in ("wide", "plain")]
    assert ratio["flops"] == pytest.approx(ratio["tokens"] * per_token[0] / per_token[1])
    assert summary["arms"]["plain"]["ratio"] == dict.fromkeys(("tokens", "flops", "seconds"), 1.0)


@pytest.mark.slow
def test_seeds_come_first_and_a_second_time_nothing_runs(finished, capsys):
    file, out, said = finished
    order = [line for line in said.splitlines() if line.startswith("===")]
    assert [line.split("(")[0] for line in order] == [
        "=== plain, seed 1 ",
        "=== wide, seed 1 ",
        "=== plain, seed 2 ",
        "=== wide, seed 2 ",
    ]
    early = said[: said.index("=== plain, seed 2")]
    assert early.count("x tokens") == 1 and early.count(" 1/2\n") == 2
    assert said.count("x tokens") == 2  # after the first seed, and at the end
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ablation.main([str(file), "--out", str(out)]) == 0
    again = capsys.readouterr().out
    assert "===" not in again and again.strip() == said[said.rindex("arm ") :].strip()
    assert ablation.main([str(file), "--out", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out == "all runs are done\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.slow
def test_a_run_that_was_stopped_in_its_last_evaluation_is_not_done(finished, capsys):
    file, out, _ = finished
    # The last checkpoint is there, and no loss.
    metrics = out / "wide" / "seed-2" / "metrics.jsonl"
    whole = metrics.read_text()
    lines = [x for x in whole.splitlines() if not ('"val/loss"' in x and '"step": 12,' in x)]
    metrics.write_text("\n".join(lines) + "\n")
    assert ablation.main([str(file), "--out", str(out), "--dry-run"]) == 0
    assert [x.count("wide/seed-2") for x in capsys.readouterr().out.splitlines()] == [1]
    metrics.write_text(whole)


@pytest.mark.slow
def test_a_record_gives_the_same_report_and_a_small_picture(finished, tmp_path, capsys):
    file, out, _ = finished
    kept, first, second = (tmp_path / n for n in ("tiny.json", "first.png", "second.png"))
    flags = ["--record", kept, "--plot", first, "--markdown", tmp_path / "a.md", "--json"]
    assert ablation.main([*map(str, [file, "--out", out, "--report", *flags])]) == 0
    from_folder = capsys.readouterr().out
    flags = ["--from", kept, "--plot", second, "--markdown", tmp_path / "b.md", "--json"]
    assert ablation.main([*map(str, flags)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(from_folder)
    assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text()
    assert kept.stat().st_size < 2000
    assert first.read_bytes() == second.read_bytes()
    image = pytest.importorskip("matplotlib.image").imread(first)[..., :3]
    assert first.stat().st_size < 120_000
    for colour in ((31, 119, 180), (255, 127, 14)):  # of the two arms, in each of three panels
        near = (np.abs(image * 255 - colour).max(-1) < 8).any(0)
        assert all(part.any() for part in np.array_split(near, 3))


def test_a_large_picture_shows_every_arms_colour(tmp_path):
    colours, image = (pytest.importorskip(f"matplotlib.{n}") for n in ("colors", "image"))
    rng, steps = np.random.default_rng(0), np.arange(0, 5001, 50)
    curves = {
        f"arm{k}": {
            seed: {
                "state": "done",
                "step": steps.tolist(),
                "bits_per_byte": None,
                "seconds": (steps * 0.1).tolist(),
                "val_loss": (
                    3 / (1 + steps / (60 + 9 * k)) ** 0.5 + rng.normal(0, 0.02, len(steps))
                ).tolist(),
            }
            for seed in (1, 2, 3)
        }
        for k in range(9)
    }
    curves["broken"] = {
        1: {
            "state": "not finite at step 60",
            "step": [0, 50],
            "val_loss": [4, 6],
            "seconds": None,
            "bits_per_byte": None,
        }
    }
    sizes = {"parameters": 10, "flops_per_token": 60.0, "tokens_per_update": 100}
    record = ablation_record.Record(
        name="large",
        reference="arm0",
        seeds=[1, 2, 3],
        arms={name: {**sizes, "curves": runs} for name, runs in curves.items()} | {"later": None},
    )
    file = tmp_path / "large.png"
    draw(record, str(file))
    assert file.stat().st_size < 300_000
    pixels = image.imread(file)[..., :3]
    for i in range(10):  # of "broken", whose loss is beyond the axis, in the legend
        assert (np.abs(pixels - colours.to_rgb(f"C{i}")).max(-1) < 0.05).sum() > 10, i


def test_the_reference_reaches_its_own_loss_with_any_seeds():
    """Two ways to sum ten losses differ by the last bit, of some ten."""
    sizes = {"parameters": 10, "flops_per_token": 60.0, "tokens_per_update": 100}
    curve = {"state": "done", "step": [0, 50], "seconds": [0, 5], "bits_per_byte": None}
    for seed in range(100):
        losses = np.random.default_rng(seed).uniform(1.5, 1.6, 10)
        runs = {i: {**curve, "val_loss": [4, x]} for i, x in enumerate(losses)}
        arms = {"one": {**sizes, "curves": runs}}
        record = ablation_record.Record(name="ten", reference="one", seeds=list(runs), arms=arms)
        assert set(summarise(record)["arms"]["one"]["ratio"].values()) == {1.0}, seed


@pytest.mark.slow
def test_markdown_is_the_same_table(finished):
    file, out, _ = finished
    summary = summarise(ablation_record.measure(read_plan(str(file), str(out), [])))
    lines = markdown(summary).splitlines()
    assert lines[1] == "| --- |" + " ---: |" * 10
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    plain = table(summary).splitlines()
    for row, line in zip((cells[0], *cells[2:4]), plain, strict=False):
        assert " ".join(row) == " ".join(line.split())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.5, 200.0),  # halfway in log tokens of 100 and 400
        (3.0, 400.0),
        (2.5, 400 * 4**0.5),
        (2.0, 1600.0),  # the first time, though it rises after that
        (4.0, 100.0),
        (9.0, 100.0),  # there at the first evaluation: at most that
        (1.9, None),
        (math.nan, None),
    ],
)
def test_interpolation_is_linear_in_log_tokens(target, expected):
    tokens = np.array([0, 100, 400, 1600, 6400.0])
    loss = np.array([8, 4, 3, 2, 2.2])
    found = cost_to_reach(target, tokens, loss)
    assert found == expected or found == pytest.approx(expected)


def test_the_mean_curve_is_read_not_the_runs(tmp_path):
    """Hand-made: two seeds of each arm, whose means fall by 1 each time tokens double."""

    def arm(*losses, state="done"):
        return {
            "parameters": 10,
            "flops_per_token": 60.0,
            "tokens_per_update": 100,
            "curves": {
                seed: {
                    "state": state,
                    "step": [0, 1, 2, 4],
                    "val_loss": loss,
                    "seconds": [0, 1, 2, 4],
                    "bits_per_byte": None,
                }
                for seed, loss in enumerate(losses)
            },
        }

    slow = arm([9, 6, 5.5, 4], [9, 6, 4.5, 4])
    fast = arm([9, 5, 4, 3], [9, 4, 3, 2])  # 4.5, 3.5, 2.5: at 4 after sqrt(2) updates
    never = arm([9, 8, 7, 6], [9, 8, 7, 6])
    broken = arm([9, 1, 1, 1], state="not finite at step 5")
    text = json.dumps(
        {
            "name": "hand",
            "reference": "slow",
            "seeds": [0, 1],
            "arms": {"fast": fast, "slow": slow, "never": never, "broken": broken, "later": None},
        }
    )
    (tmp_path / "record.json").write_text(text)
    record = ablation_record.read_record(str(tmp_path / "record.json"))
    arms = (summary := summarise(record))["arms"]
    assert summary["target"] == 4
    for axis, at in (("tokens", 100), ("flops", 6000), ("seconds", 1)):
        assert arms["fast"]["reach"][axis] == pytest.approx(at * 2**0.5)
        assert arms["fast"]["ratio"][axis] == pytest.approx(2**0.5 / 4)
        assert arms["slow"]["ratio"][axis] == 1
        assert arms["never"]["ratio"][axis] is None
    assert arms["fast"]["val_loss_std"] == pytest.approx(0.5**0.5)
    assert arms["broken"]["val_loss"] is None and "broken, seed 0: not finite" in table(summary)
    assert arms["later"] == {"runs": {0: "not begun", 1: "not begun"}}


def test_seconds_leave_out_what_was_not_timed():
    """Updates 1, 5 and 7 compiled; a row is of the mean since the one before."""
    seconds = {1: None, 2: 0.5, 4: 1.0, 5: None, 6: 2.0, 7: None}
    found = [
        {"step": s, "train/loss": 1.0} | ({"perf/step_seconds": x} if x else {})
        for s, x in seconds.items()
    ]
    assert training_seconds(found, [0, 2, 3, 4, 6, 7]) == [0, 1, 2, 3, 7, 9]
    assert training_seconds(found[:1], [0, 1]) is None


# --- runs


@pytest.mark.slow
def test_stopped_it_saves_and_the_same_command_goes_on_past_an_arm_that_fails(plays, tmp_path):
    """bad: its first update is so large that the second is not finite."""
    arms = {"plain": {}, "bad": {"optim": {"lr": 1e30, "grad_clip": 0.0}}}
    out, folder = tmp_path / "out", tmp_path / "out" / "plain" / "seed-1"
    argv = [
        sys.executable,
        "tools/ablation.py",
        write(tmp_path, plays, arms, seeds=[1]),
        "--out",
        out,
        "--optim.steps=600",
        "--eval.every=200",
        "--checkpoint.every=200",
    ]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environment,
            text=True,
            process_group=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    process = start()
    tiny_run.wait_for_step(process, folder, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal: to the tool and all in its group
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "stopped on request after update" in said and "=== bad" not in said
    (saved,) = (int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 3 <= saved < 600 and f"plain, seed 1: step {saved} of 600" in said

    process = start()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert f"continuing from step {saved} " in said
    assert list(tiny_run.rows(folder)) == list(range(1, 601))
    assert "bad, seed 1 failed with exit code 4; going on" in said
    last = said[said.rindex("arm ") :]
    assert "bad, seed 1: not finite at step " in last and "plain, seed 1: step" not in last
    line = next(line for line in last.splitlines() if line.startswith("bad"))
    assert line.split()[-1] == "0/1" and line.split()[-5:-1] == ["-"] * 4


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused_and_left_alone(finished, capsys):
    file, out, _ = finished
    before = (out / "wide" / "seed-1" / "config.yaml").read_bytes()
    for override, change in (
        ("--optim.lr=0.02", "optim.lr: 0.01 -> 0.02"),
        ("--data.path=elsewhere", "-> elsewhere"),
    ):
        for mode in ((), ("--report",), ("--dry-run",)):
            with pytest.raises(ValueError, match="arm plain: .*holds a run that differs") as error:
                ablation.main([str(file), "--out", str(out), override, *mode])
            assert change in str(error.value) and "another --out" in str(error.value)
    assert capsys.readouterr().out == ""
    assert (out / "wide" / "seed-1" / "config.yaml").read_bytes() == before
