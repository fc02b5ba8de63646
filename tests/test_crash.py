"""Runs that are killed, by the tool that anybody can leave running for an hour."""

import json
import re

import crash_test
import pytest
import tiny_run

CHANGES = {"optim.steps": 60, "eval.every": 10, "checkpoint.every": 5, "eval.windows": None}


def crash(data, out_dir, *flags: str) -> list[str]:
    return [*tiny_run.arguments(data, out_dir, **CHANGES), "--json", *flags]


@pytest.mark.slow
def test_five_kills_leave_the_unbroken_run_digit_for_digit(plays, tmp_path, capsys):
    assert crash_test.main(crash(plays, tmp_path / "crash", "--kills=5")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kills"] == 5 and report["faults"] == [] and report["rows"] > 60 * 5
    assert report["moments"] == {"step": 2, "save": 1, "evaluation": 1, "start": 1}


@pytest.mark.slow
def test_a_killed_process_of_two_takes_the_other_down_and_both_continue(plays, tmp_path, capsys):
    flags = ("--kills=1", "--processes=2", "--devices=2", "--moments", "save")
    assert crash_test.main(crash(plays, tmp_path / "crash", *flags)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kills"] == 1 and report["slowest_notice_seconds"] < 30


def test_the_verdict_sees_what_is_missing_twice_or_other(tmp_path):
    def write(*rows: str) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))

    write('{"step": 1, "train/loss": 2.5}', '{"step": 2, "train/loss": 2.25}')
    good = crash_test.rows(tmp_path)
    assert crash_test.compare(good, tmp_path) == []
    for rows, fault in (
        (['{"step": 1, "train/loss": 2.5}'], "rows missing: 1, first (2, 'train/loss')"),
        (
            ['{"step": 1, "train/loss": 2.5}', '{"step": 2, "train/loss": 2.250001}'],
            "rows that differ: 1, first (2, 'train/loss')",
        ),
        (['{"step": 1, "train/loss": 2.5}'] * 2, "train/loss of step 1 is there twice"),
        (['{"step": 1, "train/lo'], "metrics.jsonl: "),
    ):
        write(*rows)
        assert fault in crash_test.compare(good, tmp_path)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--kills=0"], "--kills, --processes and --devices are 1 or more"), ([], "is not empty")],
)
def test_a_mistake_is_one_message(plays, tmp_path, flags, message):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match=re.escape(message)):
        crash_test.main([*tiny_run.arguments(plays, tmp_path), *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
