"""Stages: runs one after the other, each from the weights of the one before, survive a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tiny_run import rows

from scalegpt import stages
from scalegpt.config.presets import own_configs
from scalegpt.errors import Mistake
from scalegpt.processes.children import Children
from scalegpt.run.history import read_history

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "position": "rope"}
CONFIG = {
    "batch": {"sequences": 8},
    "optim": {"lr": 1.0e-2, "min_lr": 1.0e-3, "warmup_steps": 0},
    "eval": {"every": 0, "windows": 8, "answers": 2},
    "checkpoint": {"every": 5},
    "log": {"every": 1, "tensorboard": False},
}
TASKS = "tasks --tasks=sort --count=60"


def write(folder: Path, entries: list[dict], **keys) -> str:
    """Write a stages file; its path."""
    (folder / "all.yaml").write_text(yaml.safe_dump(CONFIG))
    common = {"config": str(folder / "all.yaml")}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({"stages": [common | entry for entry in entries], **keys}))
    return str(file)


def three(base_data: str) -> list[dict]:
    """A base, an SFT from it, and another one from the base."""
    base = {"model": MODEL, "data": {"path": base_data}, "optim": {"steps": 20}}
    sft = {"objective": {"name": "sft"}}
    return [
        {"name": "base", "overrides": base},
        {"name": "sft", "prepare": TASKS, "overrides": sft | {"optim": {"steps": 40}}},
        {
            "name": "other",
            "from": "base",
            "prepare": TASKS,
            "overrides": sft | {"optim": {"steps": 5}},
        },
    ]


class Recorder:
    """Stands for Children: notes the commands, each of which ends with the next of `codes`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
        self.commands: list[list[str]] = []
        left = iter(codes)
        monkeypatch.setattr(
            Children, "run", lambda _, command, output: self.commands.append(command) or next(left)
        )


def flags(command: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)


def test_each_stage_starts_from_the_one_before_with_data_of_its_own(tmp_path, monkeypatch, capsys):
    file, out = write(tmp_path, three("text")), tmp_path / "out"
    ran = Recorder(monkeypatch, 0, 0, 0, 7)
    assert stages.main([file, "--out", str(out)]) == 7, "the code of the stage that failed"
    base, prepare, sft, other = ran.commands
    assert base[1:5] == ["-m", "scalegpt.train", "--config", str(tmp_path / "all.yaml")]
    assert flags(base)["run.out_dir"] == str(out / "base") and "run.init_from" not in flags(base)
    assert flags(base)["model.position"] == "rope" and flags(base)["data.path"] == "text"
    assert prepare[1:] == [
        str(ROOT / "data/tasks/prepare.py"),
        *("--tasks=sort", "--count=60", "--out", str(out / "data/sft")),
        *("--tokenizer", str(out / "base")),
    ]
    assert flags(sft)["run.init_from"] == str(out / "base")
    assert flags(sft)["data.path"] == str(out / "data/sft")
    assert other[other.index("--out") + 1] == str(out / "data/other")
    assert other[other.index("--tokenizer") + 1] == str(out / "base")
    said = capsys.readouterr().out
    assert "other ended with exit code 7" in said
    assert "the stages file has prepare.py's flags" in said  # it was the data that failed
    Recorder(monkeypatch, 2)
    assert stages.main([file, "--out", str(out)]) == 2
    assert "prepare.py's flags" not in capsys.readouterr().out
    # By a signal, as a shell says it.
    Recorder(monkeypatch, -9)
    assert stages.main([file, "--out", str(out), "--stop-after=sft"]) == 137
    assert "=== base (stage 1 of 3)\n" in capsys.readouterr().out, "stages are counted in the file"


@pytest.mark.parametrize(
    ("codes", "expected"), [([3], 3), ([0], 3), ([130], 130), ([0, 130], 3)], ids=str
)
def test_a_request_to_stop_ends_with_3_unless_a_run_has_left_at_once(
    codes, expected, tmp_path, monkeypatch
):
    """The second command prepares data, of which nothing is left half done."""
    left = list(codes)

    def run(children: Children, command: list[str], output: object) -> int:
        children.stopped = len(left) == 1
        return left.pop(0)

    monkeypatch.setattr(Children, "run", run)
    argv = [write(tmp_path, three("text")), "--out", str(tmp_path / "out")]
    assert stages.main(argv) == expected and not left


def test_a_text_of_ones_own_takes_the_place_of_the_first_data(tmp_path, monkeypatch):
    file = write(tmp_path, three("text"), text="--tokenizer=byte")
    ran = Recorder(monkeypatch, 0, 3)
    assert stages.main([file, "--out", str(tmp_path / "out"), "--text=books/*.txt"]) == 3
    prepare, base = ran.commands
    data = str(tmp_path / "out/data/base")
    assert prepare[1:] == [
        str(ROOT / "data/text/prepare.py"),
        *("--input", "books/*.txt", "--tokenizer=byte", "--out", data),
    ]
    assert flags(base)["data.path"] == data


FIRST = {"name": "a", "overrides": {"data": {"path": "d"}}}


@pytest.mark.parametrize(
    ("entries", "keys", "argv", "message"),
    [
        ([], {}, [], "stages: .* at least 1"),
        ([FIRST | {"confg": "x"}], {}, [], "stages.0.confg; there are name, config, from, prep"),
        ([FIRST], {"chatt": "a"}, [], "unknown key chatt; there are stages, text, chat"),
        ([FIRST | {"name": "a/b"}], {}, [], "stages.0.name: "),
        ([FIRST, FIRST], {}, [], "stage a: another stage, or the folder of data, has this name"),
        ([FIRST | {"name": "data"}], {}, [], "the folder of data"),
        ([FIRST | {"from": "b"}, FIRST | {"name": "b"}], {}, [], "from=b is no stage before it"),
        ([FIRST | {"config": "nowhere.yaml"}], {}, [], "stage a: cannot read config nowhere.yaml"),
        ([FIRST, FIRST | {"name": "b", "overrides": {"optim": {"lrr": 1}}}], {}, [], "optim.lr?"),
        ([FIRST | {"overrides": {"run": {"out_dir": "x"}}}], {}, [], "run.out_dir follows from"),
        ([FIRST | {"prepare": "tasks"}], {}, [], "data.path follows from the stages"),
        ([{"name": "a", "prepare": "nothing --x"}], {}, [], "there is no data/nothing/prepare.py"),
        (
            [{"name": "a", "prepare": "tasks 'x"}],
            {},
            [],
            "stages.0.prepare: .*No closing",
        ),
        ([FIRST], {"text": "--tokenizer='x"}, [], "text: .*No closing quotation"),
        ([FIRST], {}, ["--stop-after=b"], "--stop-after=b is none of the stages a"),
        ([FIRST], {"chat": "b"}, [], "chat=b is none of the stages a"),
        ([FIRST], {}, ["--out=gs://b/c"], "--out=gs://b/c must be a local folder"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    entries, keys, argv, message, tmp_path, monkeypatch
):
    ran = Recorder(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=message):
        stages.main([write(tmp_path, entries, **keys), *argv])
    assert not ran.commands and not (tmp_path / "out").exists()


def test_a_stages_file_is_no_config(tmp_path):
    with pytest.raises(Mistake, match="several stages, each a run: python -m scalegpt.stages"):
        from scalegpt.config.loading import load, validate

        validate(load(write(tmp_path, [FIRST])), "tiny.yaml")


OWN = [file for name, file in own_configs().items() if name.startswith("stages/")]


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_a_stages_file_of_the_repository_is_a_plan_and_opens_with_four_lines_of_comment(file):
    lines = file.read_text().splitlines()
    assert [line[:1] for line in lines[:5]] == [*"####", "s"]
    assert lines[1].startswith("# Expected: ") and lines[2].startswith("# Time: ")
    assert lines[3] == f"# python -m scalegpt.stages {file.relative_to(ROOT)}"
    planned = stages.plan(stages.read_file(str(file)), str(file), "out", None)
    assert [stage.name for stage in planned][:2] == ["base", "sft"]


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "scalegpt.stages", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill_and_a_stop(plays_of_bytes, tmp_path):
    """A kill -9 in the middle of the second stage, whose run saves; a SIGTERM to the third."""
    out = tmp_path / "out"
    argv = [write(tmp_path, three(str(plays_of_bytes))), "--out", str(out)]
    first = start(argv)
    wait_for(first, out / "sft", 8)
    first.kill()
    first.communicate()
    second = start(argv)
    wait_for(second, out / "other", 1)
    second.send_signal(signal.SIGTERM)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 3 and "=== base (stage 1 of 3): done" in said, said
    assert "continuing from step" in said and "the same command goes on" in said
    third = start(argv)
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 0, said
    assert [line for line in said.splitlines() if line.endswith(": done")] == [
        "=== base (stage 1 of 3): done",
        "=== sft (stage 2 of 3): done",
    ]
    *_, table, chat = said.split("\n\n")
    assert all(len(line) < 80 for line in table.splitlines())
    head, *shown = table.splitlines()
    assert head.split() == ["stage", "updates", "minutes", "figures"]
    assert [line.split()[:2] for line in shown if line[0] != " "] == [
        ["base", "20"],
        ["sft", "40"],
        ["other", "5"],
    ]
    assert "val/bits_per_byte" in table.partition("sft")[0] and "val/ended" in table
    assert chat.endswith(f" -m scalegpt.chat --run {out / 'other'}\n")
    for name, steps in (("base", 20), ("sft", 40), ("other", 5)):
        assert list(rows(out / name)) == list(range(1, steps + 1))
    model = read_history(str(out / "other")).config.model
    assert (model.n_embd, model.position, model.vocab_size) == (32, "rope", 263)
    # Once all is done, nothing is.
    assert stages.main([*argv, "--stop-after=sft"]) == 0


def wait_for(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and max(rows(folder), default=0) >= step:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(process.communicate()[0][-3000:])


@pytest.fixture
def plays_of_bytes(tmp_path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n}: {n * n}\n" for n in range(4000)))
    script = ROOT / "data" / "text" / "prepare.py"
    flags = ["--input", text, "--tokenizer=byte", "--val-fraction=0.1", "--out", tmp_path / "text"]
    subprocess.run([sys.executable, script, *flags], check=True, stdout=subprocess.DEVNULL)
    return tmp_path / "text"
