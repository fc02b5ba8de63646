"""Where the time went: it sums to the wall clock, over kills too, and memory does not grow."""

import json
import time
from types import SimpleNamespace

import psutil
import pytest
from tiny_run import arguments, rows, start, wait_for_step

from scalegpt import train
from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config import RunConfig
from scalegpt.config.command_line import parse
from scalegpt.data.datasets import open_datasets
from scalegpt.inference.validation import validation
from scalegpt.processes import phases
from scalegpt.run import ledger
from scalegpt.step import build, sharding

RUN = RunConfig(out_dir="x")


def test_phases_nest_and_sum_to_the_life_of_the_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now[0]))
    p = phases.Phases(RUN, age=2)
    p.begin("step", 3)
    with p("evaluation"):
        now[0] += 0.25
        with p("save"):
            assert p.current.name == "save" and p.current.step == 3
            now[0] += 0.125
        now[0] += 0.5
    assert p.current.name == "step" and p.current.step == 3
    now[0] += 1
    spent = {"startup": 2, "evaluation": 0.75, "save": 0.125, "step": 1}
    assert p.seconds == dict.fromkeys(phases.LEDGER, 0.0) | spent
    assert p.lifetime == sum(spent.values()) and p.training() == 1
    assert set(phases.LEDGER) == {place for place, _ in phases.PHASES.values()}


def test_the_start_and_the_end_tell_in_plain_words_where_the_time_went(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)  # on a busy machine, too
    p = phases.Phases(RUN, age=5.0)
    for name in ("compile", "self-check", "step"):
        p.begin(name)
    assert str(p) == "5.0 s: imports 5.0", "phases of no time are left out"
    zeros = dict.fromkeys((f"time/{name}" for name in ledger.TIMES), 0.0)
    row = {"step": 9, "time": time.time() - 60, **zeros, "time/lost": 4.0, "time/compile": 1.0}
    said = ledger.Ledger(p, [row], 9).summary()
    assert said == (
        "time     10 s: starting 50.0%, done again after a kill 40.0%, compiling 10.0%;\n"
        "         and 55 s in which it did not run"
    )
    assert set(ledger._WORDS) | {"down"} == set(ledger.TIMES)


def test_each_phase_has_the_deadline_of_its_key_and_progress_renews_it():
    p = phases.Phases(RunConfig(out_dir="x", deadline_restore=7, deadline_step=3))
    with p("restore"):
        assert p.current.deadline == 7
    p.begin("step", 1)
    since = p.current.since
    time.sleep(0.01)
    p.progress(2)
    assert p.current.deadline == 3 and p.current.step == 2 and p.current.since > since


def test_what_other_programs_used_is_a_share_of_the_cores(monkeypatch):
    cores, others = ledger.cpu_seconds()
    assert 0 < others < cores
    values = iter([(1000.0, 300.0), (1100.0, 325.0)])
    monkeypatch.setattr(ledger, "cpu_seconds", lambda: next(values))
    assert ledger.Ledger(phases.Phases(RUN), [], None).row()["perf/others_cpu"] == 0.25


def test_what_a_killed_process_did_after_its_checkpoint_is_lost():
    p = phases.Phases(RUN)
    now = time.time() - p.lifetime
    zeros = dict.fromkeys((f"time/{name}" for name in ledger.TIMES), 0.0)
    earlier = [
        {"step": 0, "time": now - 100, **zeros, "time/startup": 10.0},
        {"step": 50, "time": now - 60, **zeros, "time/startup": 10.0, "time/step": 40.0},
        {"step": 90, "time": now - 30, "train/loss": 1.0},
    ]
    row = ledger.Ledger(p, earlier, 50).row()
    assert row["time/lost"] == pytest.approx(30) and row["time/step"] == 40
    assert row["time/down"] == pytest.approx(30, abs=1)
    lived = 10 + 40 + 30 + p.lifetime
    assert row["perf/goodput"] == pytest.approx(40 / lived, rel=0.05)
    # No checkpoint was there: all of it is lost.
    row = ledger.Ledger(p, earlier, -1).row()
    assert row["time/lost"] == pytest.approx(10 + 70) and row["time/step"] == 0
    assert ledger.Ledger(p, earlier, None).row()["time/lost"] == 0


def all_rows(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def ledger_rows(out_dir):
    return [row for row in all_rows(out_dir) if "time/step" in row]


def assert_sums_to_the_time_since(out_dir, earliest, latest):
    """The last ledger sums to the time from the begin of the run, which is between these two dates,
    to some moment after the row before it was written and before it was written itself."""
    written = all_rows(out_dir)
    place = max(i for i, row in enumerate(written) if "time/step" in row)
    total = sum(written[place][f"time/{name}"] for name in ledger.TIMES)
    rounding = 0.0005 * len(ledger.TIMES) + 0.01  # of the rows, and of the ticks Linux counts
    assert total <= written[place]["time"] - earliest + rounding
    assert total >= written[place - 1]["time"] - latest - rounding


@pytest.mark.slow
def test_the_ledger_of_a_run_sums_to_the_life_of_its_process(plays, tmp_path):
    began = time.time() - phases._age()
    assert train.main(arguments(plays, tmp_path / "run", optim__steps=2, eval__every=0)) == 0
    assert_sums_to_the_time_since(tmp_path / "run", began, began)
    last = ledger_rows(tmp_path / "run")[-1]
    # psutil adds the date of the machine's start, which Linux tells in whole seconds.
    assert began == pytest.approx(psutil.Process().create_time(), abs=1.1)
    assert min(last["time/step"], last["time/evaluation"], last["time/save"]) > 0


@pytest.mark.slow
def test_the_ledger_sums_to_the_wall_time_over_a_kill_and_a_restart(plays, tmp_path):
    argv = arguments(plays, tmp_path / "run", optim__steps=300, checkpoint__every=50, eval__every=0)
    began = time.time()
    process = start(argv)
    started = time.time()
    wait_for_step(process, tmp_path / "run", 70)
    while not (tmp_path / "run" / "checkpoints" / "50" / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    time.sleep(2)
    process = start(argv)
    output = process.communicate(timeout=120)[0]
    ended = time.time()
    assert process.returncode == 0, output
    assert_sums_to_the_time_since(tmp_path / "run", began, started)
    last = ledger_rows(tmp_path / "run")[-1]
    assert ended - last["time"] < 5, "what comes after the last row is the end of the process alone"
    assert last["time/down"] >= 2 and last["time/lost"] > 0 and last["time/restore"] > 0
    assert last["time/step"] > 0 and 0 < last["perf/goodput"] < 1
    assert "time     " in output and "goodput" not in rows(tmp_path / "run")
    stalls = rows(tmp_path / "run", "perf/save_stall_seconds")
    assert set(stalls) >= {100, 150, 200, 250, 300} and 0 <= min(stalls.values())
    assert sorted(stalls.values())[-2] < 5, "the first one compiles"
    assert min(rows(tmp_path / "run", "memory/host_gib").values()) > 0.05


@pytest.mark.slow
def test_100_saves_and_evaluations_do_not_grow_the_memory(plays, tmp_path):
    """In the loop's own way: asynchronous, one after the other, with retention."""
    config = parse([*arguments(plays, tmp_path / "run"), "--eval.windows=8"], "test", {})[0]
    datasets = open_datasets(config)
    config = config.with_vocab(datasets[0].vocab_size)
    steps = build.build_steps(config, sharding.make_mesh(config.mesh), "float32", "xla")
    evaluate, state = validation(config, datasets, steps), steps.init()
    saves = Checkpoints(tmp_path, 1)
    process, seen = psutil.Process(), []
    for at in range(1, 101):
        evaluate(state.params)
        saves.save(state, at, {"best_loss": 0.0}, 1.0 / at)
        seen.append(process.memory_info().rss / 2**20)
    saves.wait()
    saves.close()
    # The first few fill pools and caches that stay.
    assert max(seen[-10:]) - max(seen[30:40]) < 30, f"MiB: {seen[::10]}"
