"""tools/checkpoint.py: what it says, what it removes, and what it never does."""

import json
import shutil
from pathlib import Path

import checkpoint as tool
import jax
import pytest
from test_checkpoint_faults import arrays_of, contents, flip, state

from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import Config
from scalegpt.run import resume
from scalegpt.step.update import State

LOSSES = {10: 3.0, 20: 1.5, 30: 2.0, 40: None, 50: 2.5}


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "five"
    checkpoints = Checkpoints(out_dir, keep=9)
    for at, loss in LOSSES.items():
        meta = {"config": {"optim": {"lr": at / 10}, "run": {"seed": 1}}}
        checkpoints.save(state(at), at, meta, loss)
        assert checkpoints.wait() is None
    return out_dir


@pytest.fixture
def run(five, tmp_path) -> Path:
    return shutil.copytree(five, tmp_path / "run")


def steps(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_list_shows_best_latest_and_what_is_damaged(run, capsys):
    assert tool.main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "10", "20", "30", "40", "50"]
    assert "1.5000  has a manifest (best)" in lines[2] and "(latest)" in lines[5]
    flip(arrays_of(run / "checkpoints" / "30", "params"))
    (run / "checkpoints" / "40" / "manifest.json").unlink()
    shutil.copytree(run / "checkpoints" / "10", run / "checkpoints" / "60")
    (run / "checkpoints" / "60" / "manifest.json").unlink()
    (run / "checkpoints" / "60" / "unfinished").touch()
    assert tool.main(["prune", str(run), "--keep", "9"]) == 0
    assert "stays   step 40: manifest.json is missing" in capsys.readouterr().out
    assert tool.main(["list", str(run), "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "good" in lines[1] and "damaged: params/" in lines[3]
    assert "damaged: manifest.json is missing" in lines[4] and "unfinished" in lines[6]


def test_verify_names_what_is_broken(run, monkeypatch, capsys):
    before = contents(run)
    monkeypatch.setenv("HOME", str(run.parent))
    assert tool.main(["verify", f"~/{run.name}"]) == 0
    assert capsys.readouterr().out.count(": good, ") == 5
    file = arrays_of(run / "checkpoints" / "30", "params")
    flip(file)
    assert tool.main(["verify", str(run)]) == 1
    name = file.relative_to(run / "checkpoints" / "30").as_posix()
    assert f"step 30: DAMAGED: {name}: its bytes were altered" in capsys.readouterr().out
    assert tool.main(["verify", str(run), "--step", "20"]) == 0
    with pytest.raises(ValueError, match="there is no step 7 in .*; there are 10, 20, 30, 40, 50"):
        tool.main(["verify", str(run), "--step", "7"])
    flip(file)
    assert contents(run) == before


def test_an_unfinished_save_and_one_removed_meanwhile_are_no_damage(run, monkeypatch, capsys):
    for step in ("10", "20", "30", "40"):
        shutil.rmtree(run / "checkpoints" / step)
    shutil.copytree(run / "checkpoints" / "50", run / "checkpoints" / "60")
    (run / "checkpoints" / "60" / "manifest.json").unlink()
    (run / "checkpoints" / "60" / "unfinished").touch()
    assert tool.main(["list", str(run), "--verify"]) == tool.main(["verify", str(run)]) == 0
    problems = tool.problems

    def removed_meanwhile(*arguments):
        shutil.rmtree(run / "checkpoints" / "50")
        return problems(*arguments)

    monkeypatch.setattr(tool, "problems", removed_meanwhile)
    capsys.readouterr()
    assert tool.main(["verify", str(run)]) == 0
    assert "step 50: removed meanwhile" in capsys.readouterr().out


def test_diff_of_two_steps_and_of_two_runs(run, five, tmp_path, capsys):
    assert tool.main(["diff", f"{run}:best", f"{five}:20"]) == 0
    assert "config: the same\n8 of 8 arrays are equal" in capsys.readouterr().out
    assert tool.main(["diff", f"{run}:10", str(run)]) == 1
    printed = capsys.readouterr().out
    assert "optim.lr: 1.0 -> 5.0" in printed and "seed" not in printed
    assert "params/b" in printed and "largest difference 4.000e+01, of values up to 1.0" in printed
    other, one = Checkpoints(tmp_path / "other"), state(20)
    params = {"wte": one.params["wte"], "b": jax.numpy.ones(4)}
    other.save(State(one.step, params, one.opt_state, one.health), 20, {}, None)
    assert other.wait() is None
    assert tool.main(["diff", str(tmp_path / "other"), f"{run}:20"]) == 1
    printed = capsys.readouterr().out
    assert "optim.lr: None -> 2.0" in printed  # which the first, without a config, has not
    assert "params/b: float32[4] -> float32[3]" in printed and "7 of 7 arrays are equal" in printed
    params["b"] = one.params["b"].at[0].set(jax.numpy.nan) + 0.5
    other.save(State(one.step, params, one.opt_state, one.health), 21, {}, None)
    assert other.wait() is None
    assert tool.main(["diff", str(tmp_path / "other"), f"{run}:20"]) == 1
    printed = capsys.readouterr().out
    assert "largest difference 5.000e-01, of values up to " in printed
    assert ", and 1 NaN in one alone\n7 of 8 arrays are equal" in printed
    flip(arrays_of(run / "checkpoints" / "30", "params"))
    with pytest.raises(ValueError, match="step 30 in .* is damaged"):
        tool.main(["diff", f"{run}:30", str(run)])


def test_prune_keeps_the_best_the_latest_good_one_and_what_is_damaged(run, capsys):
    flip(arrays_of(run / "checkpoints" / "50", "optimizer"))
    arguments = ["prune", str(run), "--keep", "1"]
    assert tool.main([*arguments, "--keep-every", "30", "--dry-run"]) == 0
    assert "would remove step 10" in capsys.readouterr().out and len(steps(run)) == 5
    assert tool.main([*arguments, "--keep-every", "30"]) == 0
    printed = capsys.readouterr().out
    assert "removed step 10" in printed and "stays   step 50: a file of it is damaged" in printed
    assert steps(run) == {"20", "30", "40", "50"}
    assert tool.main(arguments) == 0 and steps(run) == {"20", "40", "50"}
    assert tool.main(["verify", str(run), "--step", "40"]) == 0


def test_prune_refuses_while_somebody_trains_there(run):
    config = Config(data={"path": "unused"}, run={"out_dir": str(run)})
    with resume.lock(config):
        with pytest.raises(ValueError, match="another process is training in"):
            tool.main(["prune", str(run), "--keep", "1"])
    assert len(steps(run)) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list", "/nowhere"], "/nowhere is not the folder of a run"),
        (["prune", "RUN", "--keep", "0"], "--keep=0 must be at least 1"),
        (["prune", "RUN"], "--keep"),
        (["diff", "RUN:99", "RUN"], "no checkpoint '99' in .*there are steps 10, 20"),
        (["list", "RUN", "--verfy"], "unknown argument --verfy"),
        (["list", "ftp://x/y"], "checkpoints can be in a local folder, gs:// or s3://"),
    ],
)
def test_a_mistake_is_one_line(five, argv, message):
    with pytest.raises(ValueError, match=message):
        tool.main([word.replace("RUN", str(five)) for word in argv])


def test_a_manifest_is_plain_json_for_other_programs(five):
    text = (five / "checkpoints" / "20" / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
