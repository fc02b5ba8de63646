"""tools/ablation.py: what its file, a record and a command line may say, and every mistake."""

import math
import os
import subprocess
import sys

import ablation
import pytest
from ablations.plan import read_plan
from ablations.record import Curve, Record, arm, curve
from ablations.report import notes, summarise
from conftest import ROOT
from tiny_ablation import ARMS, write

from scalegpt.config import command_line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "has no arms; write arms: {name: {section: {key: value}}"),
        ({"arms": ["a"]}, "has no arms"),
        ({"arms": {"a": {}, "b": {"model": {"n_layr": 3}}}}, "arm b: .*mean --model.n_layer?"),
        ({"arms": {"a": {"optim": {"lr": "fast"}}}}, "arm a: .*optim.lr='fast'"),
        ({"arms": {"a": {}, "b": {"optim": {"lr": 1e-5}}}}, "arm b: .*optim.min_lr"),
        ({"arms": {"a": {"optim": {"epochs": 2}}}}, "arm a: optim.epochs: give the arms their opt"),
        ({"arms": {"a": 3}}, "arm a holds 3, not sections"),
        ({"arms": {"a": {"model": 3}}}, "arm a: model=3 is not a section"),
        ({"arms": {"a": {"run": {"seed": 3}}}}, "arm a sets run.seed, which seeds sets"),
        ({"run": {"out_dir": "x"}}, "sets run.out_dir, which --out sets"),
        ({"arms": {"../a": {}}}, "arm '../a' needs another name"),
        ({"arms": {False: {}}}, "arm False needs another name"),
        ({"arms": {"-a": {}}}, "arm '-a' needs another name"),
        ({"seeds": []}, r"seeds=\[\] must be different numbers"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be"),
        ({"seeds": "1"}, "seeds='1' must be"),
        ({"seeds": [-1]}, "arm plain: .*run.seed"),
        ({"reference": "best"}, "reference 'best' is none of the arms plain, wide"),
        ({"reference": ["a"]}, r"reference \['a'\] is none of"),
        ({"reference": {"a": 1}}, "reference {'a': 1} is none of"),
        ({"modl": {}}, "unknown key 'modl'; there are config, arms, seeds, reference, model"),
        ({"config": "nowhere.yaml"}, "arm plain: cannot read config nowhere.yaml"),
        ({"config": ["a"]}, r"config=\['a'\] must be the name of a file"),
    ],
)
def test_a_mistake_in_the_file_is_one_message(change, message, tmp_path, capsys):
    file = write(tmp_path, "data", **{"arms": ARMS, **change})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ablation.main([str(file), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == "" and [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "plain", "wid"], "--arms wid is none of the arms plain, wide"),
        (["--model.n_embd=48"], "--model.n_embd is for all arms, but arm wide is about it"),
        (["--run.seed=3"], "the command line sets run.seed, which seeds sets"),
        (["--optim.steps=no"], "arm plain: .*optim.steps='no'"),
        (["--dry-rum"], "unknown argument --dry-rum; did you mean --dry-run?"),
        (["--optim.lr", "3"], "unknown argument --optim.lr"),
        (["--plot=a.gif"], "must end in .png"),
        (["--record=no/such/a.json"], "--record=no/such/a.json: there is no folder no/such"),
        (["--from=a.json"], "--from reports a record alone"),
        (["--report", "--record={}/a.json"], "--report: there is no folder --out=.*/out;"),
        (["--record={}/tiny.yaml"], "--record=.*tiny.yaml is the file of the arms, too"),
        (["--markdown={}/a", "--record={}/b/../a"], "--record=.*/a is --markdown, too"),
        (["--record={}/out"], "--record=.*/out is --out, too"),
        (["--plot={}/b.png"], "--plot=.*/b.png is a folder; give a file"),
        (["--record=/dev/null"], "--record=/dev/null is no ordinary file"),
        (["--out={}/tiny.yaml"], "tiny.yaml is no folder, so no run can be in .*plain/seed-1"),
        (["--out={}/tiny.yaml", "--dry-run"], "tiny.yaml is no folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(argv, message, tmp_path, capsys):
    file = write(tmp_path, "data")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "b").mkdir()
    argv, before = [word.replace("{}", str(tmp_path)) for word in argv], file.read_bytes()
    if not any(word.startswith("--out") for word in argv):
        argv = [f"--out={tmp_path / 'out'}", *argv]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ablation.main([str(file), *argv])
    assert capsys.readouterr().out == "" and file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"b", "b.png", "tiny.yaml"}


def test_an_out_that_may_not_be_written_to_is_refused_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may do all
    for more in ([], ["--dry-run"]):
        with pytest.raises(ValueError, match="may not be written to; give another --out"):
            ablation.main([str(write(tmp_path, "data")), f"--out={tmp_path / 'out'}", *more])


def test_a_run_that_ends_with_a_users_mistake_is_the_last(tmp_path, monkeypatch, capsys):
    """And files of results are left as they are while there are none."""
    begun, kept = [], tmp_path / "kept.json"
    kept.write_text("{}")
    monkeypatch.setattr(ablation.Children, "run", lambda self, run, output: begun.append(run) or 2)
    argv = [str(write(tmp_path, "data")), f"--out={tmp_path / 'out'}", f"--record={kept}"]
    assert ablation.main(argv) == 2 and len(begun) == 1
    said = capsys.readouterr()
    assert "plain, seed 1 failed with exit code 2" in said.out and "kept.json is not" in said.err
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="--record=.* is not written: no run has an evaluation"):
        ablation.main([*argv, "--report"])
    assert kept.read_text() == "{}" and len(begun) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"kept.json", "out", "tiny.yaml"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 0, "val/loss": "low"}', "metrics.jsonl: val/loss='low' at step 0 is no number"),
        ('{"step": 1, "perf/step_seconds": [1]}', r"perf/step_seconds=\[1\] at step 1 is no"),
        ('{"step": 1, "train/loss": 1e999}', "train/loss=inf at step 1 is no"),
        ('{"step": 1.5, "val/loss": 1}', "step=1.5 at step 1.5 is no"),
        (None, "cannot read .*plain/seed-1/metrics.jsonl: Is a directory"),
    ],
)
def test_damaged_metrics_are_one_message(line, message, tmp_path):
    file = str(write(tmp_path, "data", seeds=[1]))
    argv, out = ["--model.vocab_size=65"], str(tmp_path / "out")
    run = read_plan(file, out, argv).runs[0]
    (metrics := run.folder / "metrics.jsonl").parent.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    metrics.write_text(line) if line else metrics.mkdir()
    for more in ([], ["--report"], ["--dry-run"]):
        with pytest.raises(ValueError, match=message):
            ablation.main([file, f"--out={out}", *argv, *more])


CURVES = '"parameters": 1, "flops_per_token": 1, "tokens_per_update": 1, "curves": '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is no record of tools/ablation.py: name: Field required"),
        ('{"name": "a", "reference": "b", "seeds": [1], "arms": {}}', "the reference b is none"),
        (
            '{"name": "a", "reference": "b", "seeds": [1], "arms": {"b": {' + CURVES + "{}}}}",
            "record.json is no record of tools/ablation.py: arms.b.curves: .* at least 1 item",
        ),
    ],
)
def test_a_mistake_in_a_record_is_one_message(text, message, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ablation.main(["--from", str(tmp_path / "record.json")])


def test_curves_that_do_not_fit_are_refused():
    whole = {"state": "done", "step": [1, 2], "val_loss": [2.0, 1.0], "seconds": None}
    Curve(**whole, bits_per_byte=None)
    for wrong in (
        {"step": [2, 1]},
        {"val_loss": [1.0]},
        {"seconds": [1.0]},
        {"val_loss": [1.0, math.nan]},
        {"step": [1, 2**63]},
        {"step": [], "val_loss": []},
    ):
        with pytest.raises(ValueError):
            Curve(**(whole | wrong), bits_per_byte=None)


def test_seconds_of_a_busy_machine_are_marked():
    rows = [
        {"step": 0, "val/loss": 3.0, "perf/others_cpu": 0.9},
        {"step": 600_000, "train/loss": 2.0, "perf/step_seconds": 1.0},
        {"step": 600_000, "val/loss": 2.0},
    ]
    config, _ = command_line.parse(["--data.path=x", "--run.out_dir=x"], "", {})
    config = config.with_vocab(64)
    curves = {}
    for seed, last in enumerate(({"perf/others_cpu": 0.31}, {"perf/others_cpu": 0.02}, {})):
        curves[seed] = curve([*rows[seed == 2 :], {"step": 600_000, **last}], config)
    assert [c.others_cpu for c in curves.values()] == [0.31, 0.02, None]
    record = Record(name="r", reference="a", seeds=[0, 1, 2], arms={"a": arm(config, curves)})
    (note,) = [note for note in notes(summarise(record)) if "busy" in note]
    assert note == "a, seed 0: its seconds are of a busy machine: others used 31% of it"


def test_without_file_or_folder_the_message_says_what_to_give(tmp_path):
    for argv in ([], ["x.yaml"], ["--out=x"], ["--report"]):
        with pytest.raises(ValueError, match="give the file of the arms and --out DIR"):
            ablation.main(argv)
    with pytest.raises(ValueError, match="for arms: plain x.yaml; give the file of the arms first"):
        ablation.main(["--arms", "plain", "x.yaml", "--out=x"])
    with pytest.raises(ValueError, match="--record=./x.json is --from, too"):
        ablation.main(["--from=x.json", "--record=./x.json"])


def test_every_mistake_is_exit_code_2_and_needs_no_device(tmp_path):
    argv = [
        sys.executable,
        "tools/ablation.py",
        write(tmp_path, "data"),
        "--out",
        tmp_path / "out",
        "--arms",
        "wid",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --arms wid") and done.stderr.count("\n") == 1


# --- the file


def test_a_run_is_what_file_arm_and_overrides_say_later_wins(tmp_path):
    arms = {
        "a": None,
        "b": {
            "optim": {"lr": 2e-3},
            "eval": {"windows": None},
            "data": {"path": {"x": 0.25, "y": 0.75}},
        },
    }
    file = write(tmp_path, "data", arms, config=str(ROOT / "configs" / "demo.yaml"))
    a, b = read_plan(str(file), "out", ["--optim.steps=7"]).runs[:2]
    assert (a.config.optim.lr, b.config.optim.lr) == (1e-2, 2e-3)
    assert a.config.optim.beta2 == 0.99  # the base file's
    assert a.config.optim.steps == b.config.optim.steps == 7
    assert (a.config.eval.windows, b.config.eval.windows) == (12, None)
    assert a.config.data.path == "data" and b.config.data.weights == {"x": 0.25, "y": 0.75}
    assert b.config.log.tensorboard is False
    assert (b.config.run.out_dir, b.config.run.seed) == ("out/b/seed-1", 1)


def test_a_dry_run_prints_commands_that_the_shell_takes(tmp_path, capsys):
    file = write(tmp_path, "data")
    assert ablation.main([str(file), "--out=o", "--arms", "wide", "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2  # seeds
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {printed[1]}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert echoed[1:3] == ["-m", "scalegpt.train"]
    config, _ = command_line.parse(echoed[3:], "test", {})
    assert config.model.n_embd == 64 and config.run.out_dir == "o/wide/seed-2"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=str)
def test_a_file_of_the_repository_is_a_plan_and_opens_with_four_lines_of_comment(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") for line in lines[:4]) and not lines[4].startswith("#")
    assert f"tools/ablation.py configs/ablations/{path.name} --out " in lines[3]
    plan = read_plan(str(path), "out", [])
    configs = [r.config.model_dump(exclude={"run"}) for r in plan.runs[: len(plan.arms)]]
    assert all(configs.count(config) == 1 for config in configs)
