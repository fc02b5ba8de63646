"""A run that somebody's program calls is the command's, and leaves that program as it was."""

import doctest
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
from tiny_run import TEXT, arguments, write_data

import scalegpt
from scalegpt import api, train
from scalegpt.config import command_line
from scalegpt.processes.deadlines import Watch
from scalegpt.processes.exits import Exit, stop_signals
from scalegpt.processes.group import Guest, Left
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import GuestStopRequest
from scalegpt.run.progress import Progress

pytestmark = pytest.mark.usefixtures("signals_as_they_were")


@pytest.fixture(scope="module")
def unbroken(plays, tmp_path_factory) -> scalegpt.Run:
    """The command's run."""
    out_dir = str(tmp_path_factory.mktemp("python") / "run")
    changes = {"optim.steps": 4, "eval.every": 2, "checkpoint.every": 2}
    assert train.main(arguments(plays, Path(out_dir), **changes)) == 0
    return scalegpt.Run.read(out_dir)


def curve(run: scalegpt.Run, key: str = "train/loss") -> dict[float, float]:
    return dict(zip(*(x.tolist() for x in run.curve(key)), strict=True))


def handlers() -> list:
    return [signal.getsignal(number) for number in stop_signals()]


def test_a_thread_of_a_program_trains_as_the_command_does(unbroken, tmp_path):
    before, done = handlers(), []

    def work() -> None:
        done.append(scalegpt.train(unbroken.config, run={"out_dir": str(tmp_path)}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (run,) = done
    assert curve(run) == curve(unbroken)
    assert curve(run, "val/loss") == curve(unbroken, "val/loss")
    assert run.best == 4 and repr(run) == f"<scalegpt.Run of {tmp_path}: done>"
    # The seconds before the call are the program's, not the run's.
    ledger = [row for row in run.rows if "time/startup" in row][-1]
    assert ledger["time/startup"] < 60 and handlers() == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_lets_the_run_save_and_then_reaches_the_program(
    name, unbroken, tmp_path, monkeypatch
):
    number, heard = getattr(signal, name), []
    if name != "SIGINT":
        signal.signal(number, lambda *of: heard.append(of[0]))
    before, dispatched = handlers(), Progress.dispatched

    def signalled(progress: Progress, step: int, values: dict) -> None:
        dispatched(progress, step, values)
        if step == 3:
            signal.raise_signal(number)

    where = {"out_dir": str(tmp_path)}
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "dispatched", signalled)
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                scalegpt.train(unbroken.config, run=where)
            run = scalegpt.Run.read(str(tmp_path))
        else:
            run = scalegpt.train(unbroken.config, run=where)
            assert heard == [number]
    assert max(run.checkpoints) == 3 and handlers() == before
    assert repr(run).endswith("step 3 of 4>")
    assert curve(scalegpt.train(run.config)) == curve(unbroken)


def test_a_signal_reaches_the_program_at_once_while_there_is_nothing_to_save():
    before = handlers()
    request = GuestStopRequest(Guest())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not request.reached() and handlers() == before
    request.close()


def test_a_second_signal_does_not_wait_for_the_save(capfd):
    before = handlers()
    request = GuestStopRequest(Guest())
    request.saves = True
    signal.raise_signal(signal.SIGINT)
    assert request.reached() and "SIGINT: saving after this step" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before
    request.close()  # hands nothing over twice


def test_a_deadline_ends_the_run_and_not_the_program(unbroken, capfd, monkeypatch):
    def slow(config: scalegpt.Config, command: str, guest: Guest) -> int:
        phases = Phases(config.run, age=0)
        watch = Watch(phases, guest)
        try:
            with phases("evaluation"):
                while True:
                    time.sleep(0.01)
        finally:
            watch.close()

    monkeypatch.setattr(train, "run", slow)
    with pytest.raises(scalegpt.RunFailed, match="longer than run.deadline_evaluation=0.2"):
        scalegpt.train(unbroken.config, run={"deadline_evaluation": 0.2})
    assert "evaluation takes" in capfd.readouterr().err


def test_an_unexpected_leave_is_no_exception_that_a_clean_up_swallows():
    assert not issubclass(Left, Exception)


@pytest.mark.parametrize("code", [Exit.NOT_FINITE, Exit.FAILED])
def test_a_run_that_could_not_go_on_raises(code, unbroken, monkeypatch):
    monkeypatch.setattr(train, "run", lambda *of: code)
    with pytest.raises(scalegpt.RunFailed, match=f"the run in {unbroken.name} did not get"):
        scalegpt.train(unbroken.config)


def test_sections_of_keys_win_over_the_config(unbroken, monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(train, "run", lambda config, *of: runs.append(config) or 0)
    monkeypatch.setattr(api.Run, "read", classmethod(lambda cls, folder: folder))
    path = tmp_path / "config.yaml"
    path.write_text(unbroken.config.to_yaml())
    for source in (unbroken.config, unbroken.config.model_dump(), path, str(path)):
        assert scalegpt.train(source, optim={"steps": 7}) == unbroken.name
        assert runs[-1].optim.steps == 7 and runs[-1].optim.lr == unbroken.config.optim.lr
    mixed = {"optim.steps": 7, "optim": {"lr": 0.5}, "run.out_dir": "out/short"}
    assert scalegpt.train("demo", **mixed) == "out/short"
    assert (runs[-1].optim.steps, runs[-1].optim.lr) == (7, 0.5)
    assert runs[-1].model.n_layer == 4 and unbroken.config.optim.steps == 4


def test_what_a_preset_has_set_changes_with_it(monkeypatch):
    runs, no_run = [], {"data": {"path": "x"}, "run": {"out_dir": Path("y")}}
    monkeypatch.setattr(train, "run", lambda config, *of: runs.append(config) or 0)
    monkeypatch.setattr(api.Run, "read", classmethod(lambda cls, folder: folder))
    for model, optim, changes in (
        ({"preset": "gpt2"}, {"lr": 0.5}, {"model.preset": "gpt2-xl"}),
        ({"depth": 4}, {}, {"model.depth": 8, "optim.weight_decay": 0.3}),
        ({"preset": "modern"}, {"name": "muon"}, {"model.tie_word_embeddings": True}),
        ({}, {"name": "muon", "steps": 5000}, {"optim.name": "adamw"}),
    ):
        sections = {**no_run, "model": model, "optim": optim}
        scalegpt.train(scalegpt.Config(**sections), **changes)
        scalegpt.train(sections, **changes)
        of_config, of_sections = runs[-2:]
        assert of_config == of_sections and of_config.run.out_dir == "y"
        assert of_config.optim.lr == optim.get("lr", of_config.optim.lr)


def test_mistakes_are_named(unbroken, tmp_path):
    with pytest.raises(scalegpt.Mistake, match="optim.stesp=7; did you mean optim.steps"):
        scalegpt.train(unbroken.config, optim={"stesp": 7})
    with pytest.raises(scalegpt.Mistake, match="data.path is missing"):
        scalegpt.train(run={"out_dir": str(tmp_path / "no")})
    with pytest.raises(scalegpt.Mistake, match="did you mean configs/demo.yaml"):
        scalegpt.train("demmo")
    several = {"coordinator": "localhost:1", "num_processes": 2, "process_id": 0}
    with pytest.raises(scalegpt.Mistake, match="of one process, and 2 were started"):
        scalegpt.train(unbroken.config, distributed=several)
    with pytest.raises(scalegpt.Mistake, match="is not the folder of a run"):
        scalegpt.Run.read(str(tmp_path))


def test_signals_that_the_program_ignores_or_takes_itself_stay_so():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wakeup = signal.set_wakeup_fd(-1)
    request = GuestStopRequest(Guest())
    request.saves = True
    signal.raise_signal(signal.SIGTERM)
    assert not request.reached()
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # within the run
    request.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL and ours == request._heard
    assert signal.set_wakeup_fd(-1) == wakeup


def test_a_refused_call_leaves_the_folder_to_the_next(unbroken, tmp_path):
    where = {"run.out_dir": str(tmp_path)}
    scalegpt.train(unbroken.config, **where)
    with pytest.raises(scalegpt.Mistake, match="allow_config_change=optim.steps") as kept:
        scalegpt.train(unbroken.config, **where, **{"optim.steps": 6})
    run = scalegpt.train(
        unbroken.config, **where, **{"optim.steps": 6, "run.allow_config_change": True}
    )
    assert run.best == 6 and kept.value  # a traceback that is kept, as a notebook's, keeps no lock


def test_it_is_found_by_completion_and_by_other_processes():
    assert {"train", "load", "Run", "Config"} <= set(dir(scalegpt))
    assert pickle.loads(pickle.dumps(scalegpt.train)) is scalegpt.train


@pytest.mark.slow
def test_the_examples_of_the_docstrings_run(tmp_path, monkeypatch):
    """They name configs/demo.yaml and out/demo; here both are of a tiny run."""
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data", TEXT, TEXT + "def main():")
    config, _ = command_line.parse(arguments(data, Path("out/demo")), "test", {})
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text(config.to_yaml())
    scalegpt.train("configs/demo.yaml", optim={"steps": 4})
    failed, tried = doctest.testmod(api, globs={"scalegpt": scalegpt}, optionflags=doctest.ELLIPSIS)
    assert tried >= 7 and not failed


@pytest.mark.slow
def test_a_data_frame_has_a_row_for_each_step(unbroken):
    pytest.importorskip("pandas", reason="of the data extra")
    frame = unbroken.dataframe()
    assert frame.index.tolist() == [0, 1, 2, 3, 4]
    assert frame["train/loss"].dropna().to_dict() == curve(unbroken)
    assert frame["val/loss"].dropna().to_dict() == curve(unbroken, "val/loss")
