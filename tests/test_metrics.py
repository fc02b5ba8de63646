"""The writers read back from disk, the console as text, the speed with a clock we turn."""

import io
import json
import logging
import math
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import terminal
from terminal import Screen
from tiny_run import arguments
from tqdm import tqdm

from scalegpt.config import RunConfig
from scalegpt.config.recipe import ModelConfig
from scalegpt.model import flops
from scalegpt.processes import exits
from scalegpt.processes.phases import Phases
from scalegpt.run import metrics
from scalegpt.run.metrics import EVAL_KEYS, TRAIN_KEYS, Console, Metrics, check_packages
from scalegpt.run.progress import Throughput
from scalegpt.run.writers import Apart, JsonlWriter, TensorBoardWriter, WandbWriter

PHASES = Phases(RunConfig(out_dir="x"))
ROOT = Path(__file__).resolve().parents[1]


def train_row(step, **more):
    return {
        "step": step,
        "train/loss": 10 / (step + 1),
        "train/lr": 6e-4,
        "train/grad_norm": 0.5,
        "train/tokens": step * 1000,
        **more,
    }


def log(tensorboard=False, wandb=False, trackio=False):
    return SimpleNamespace(
        tensorboard=tensorboard,
        wandb=wandb,
        trackio=trackio,
        wandb_project="p",
        wandb_name=None,
        wandb_entity=None,
        wandb_tags=None,
    )


def rows(path):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    text = Path(path).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def test_keys_that_scripts_rely_on_stay():
    assert TRAIN_KEYS == (
        "step",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens",
        "train/epoch",
        "train/spike",
        "train/skipped",
        "perf/tokens_per_second",
        "perf/step_seconds",
        "perf/mfu",
        "memory/host_gib",
        "time",
    )
    assert EVAL_KEYS == (
        "step",
        "val/loss",
        "val/loss_stderr",
        "val/perplexity",
        "val/bits_per_byte",
        "val/accuracy",
        "val/margin",
        "val/best_loss",
        "val/reward",
        "val/best_reward",
        "val/ended",
        "val/length",
        "train/eval_loss",
        "train/eval_bits_per_byte",
        "time",
    )


# metrics.jsonl


def test_jsonl_rows_are_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "deep" / "metrics.jsonl")
    writer.write({"step": 1, "train/loss": 1.5})
    assert rows(tmp_path / "deep" / "metrics.jsonl") == [{"step": 1, "train/loss": 1.5}]
    writer.close()


def test_jsonl_writes_what_json_has_not_as_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m")
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    writer.close()
    assert rows(tmp_path / "m") == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.1}]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 9, "train/lo', b'{"step": 4}', b"\x00\x00\xff\n", b"12\n[]\n{}\n"]
)
def test_jsonl_continues_without_gap_duplicate_or_torn_line(tmp_path, torn):
    path = tmp_path / "m"
    first = JsonlWriter(path)
    for step in range(1, 9):
        first.write({"step": step, "run": 1})
        if step % 4 == 0:
            first.write({"step": step, "val/loss": 1.0})
    first.close()
    with path.open("ab") as file:
        file.write(torn)
    extra = [{"step": 4}] if torn == b'{"step": 4}' else []  # whole, only its newline is missing
    second = JsonlWriter(path, resume_step=5)
    for step in range(6, 10):
        second.write({"step": step, "run": 2})
    second.close()
    got = rows(path)
    assert [r["step"] for r in got if "run" in r] == list(range(1, 10))
    assert [r["run"] for r in got if "run" in r] == [1] * 5 + [2] * 4
    assert [r for r in got if "run" not in r] == [{"step": 4, "val/loss": 1.0}, *extra]
    assert os.listdir(tmp_path) == ["m"]


def test_jsonl_continues_from_step_0_and_without_a_file(tmp_path):
    said = []
    JsonlWriter(tmp_path / "new", resume_step=7, say=said.append).close()
    assert "new is not there: the rows that this run has written are lost" in said[0]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder; rows go to a file"):
        JsonlWriter(tmp_path / "folder", resume_step=7)
    (tmp_path / "old").write_text('{"step": 0}\n{"step": 1}\n')
    JsonlWriter(tmp_path / "old", resume_step=0).close()
    assert rows(tmp_path / "new") == [] and rows(tmp_path / "old") == [{"step": 0}]


def test_jsonl_of_another_run_is_never_overwritten(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="out_dir"):
        JsonlWriter(path)
    assert path.read_text() == '{"step": 1}\n'
    (tmp_path / "empty").touch()
    JsonlWriter(tmp_path / "empty").close()


def test_jsonl_refuses_a_url():
    with pytest.raises(ValueError, match="local"):
        JsonlWriter("gs://bucket/run/metrics.jsonl")


# TensorBoard


def events(folder):
    """Records of all event files: length (8 bytes), its CRC (4), event, its CRC (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(Path(folder).iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16


def test_tensorboard_events_read_back(tmp_path):
    first = TensorBoardWriter(tmp_path / "tb")
    first.write({**train_row(3), "time": 1000.5})
    first.write({"step": 3, "val/loss": 2.5, "val/wiki/loss": 3.5, "time": 1001.0})
    first.write({"step": 3, "prompt": "To be", "text": " or not", "time": 1002.0})
    first.close()
    values = [value for event in events(tmp_path / "tb") for value in event.summary.value]
    (text,) = [x for x in values if x.tag == "sample/text_summary"]
    assert list(text.tensor.string_val) == [b"To be or not"]
    got = {
        v.tag: (e.step, v.simple_value, e.wall_time)
        for e in events(tmp_path / "tb")
        for v in e.summary.value
    }
    assert got["train/loss"] == (3, 2.5, 1000.5) and got["train/tokens"] == (3, 3000, 1000.5)
    assert got["val/loss"] == (3, 2.5, 1001.0) and got["val/wiki/loss"] == (3, 3.5, 1001.0)
    assert not {"step", "time"} & set(got)
    assert not any(e.HasField("session_log") for e in events(tmp_path / "tb"))


@pytest.mark.oracle
def test_a_run_begins_without_torch_and_google_and_leaves_them_importable(tmp_path):
    """tensorboardX would import them: seconds of every start."""
    pytest.importorskip("torch")
    storage = pytest.importorskip("google.cloud.storage").__name__
    code = f"""
        import sys, scalegpt.train
        from scalegpt.run.writers import TensorBoardWriter
        TensorBoardWriter({str(tmp_path)!r}).close()
        costly = {{"torch", "{storage}", "transformers", "wandb", "matplotlib"}}
        print(sorted(costly & set(sys.modules)))
        import torch, {storage}
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_tensorboard_hides_steps_after_the_one_continued_from(tmp_path):
    TensorBoardWriter(tmp_path / "tb", resume_step=5).close()
    (purge,) = [e for e in events(tmp_path / "tb") if e.HasField("session_log")]
    assert purge.session_log.status == purge.session_log.START and purge.step == 6


# Weights & Biases, for real: its service runs, offline


def wandb_records(path):
    """A .wandb file is a LevelDB log: blocks of 32 KiB; CRC (4), length (2), type (1), part."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


WANDB = """
    import sys
    from pathlib import Path
    from scalegpt.run.writers import WandbWriter
    for life, resume in ((1, False), (2, True)):
        writer = WandbWriter({"lr": 0.125}, sys.argv[1], "proj", "nick", resume, tags=["a", "b"])
        for step in (2 * life, 2 * life + 1):
            writer.write({"step": step, "train/loss": 1.0 / step, "time": 0.0})
        writer.close()
        print("id", Path(sys.argv[1], "wandb_id.txt").read_text().strip())
"""


def alone(code, out, **env):
    """Lines that a process prints; its input and errors are a terminal, where W&B might ask.

    It has none of the caller's credentials, and is killed if it waits.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    env = {**kept, "PYTHONPATH": str(ROOT), "HOME": str(out), "TERM": "xterm", **env}
    main, side = pty.openpty()
    with (out / "printed").open("w") as printed:
        command = [sys.executable, "-c", textwrap.dedent(code), str(out)]
        process = subprocess.Popen(command, env=env, stdin=side, stdout=printed, stderr=side)
    os.close(side)
    alarm = threading.Timer(15, process.kill)
    alarm.start()
    screen = b""
    try:
        while more := os.read(main, 4096):
            screen += more
    except OSError:  # how Linux says that the other side has closed
        pass
    code = process.wait()
    alarm.cancel()
    os.close(main)
    assert code == 0, screen.decode()
    return (out / "printed").read_text().splitlines()


@pytest.mark.slow
def test_wandb_without_an_account_goes_offline_and_never_waits(tmp_path):
    said = alone(WANDB, tmp_path)
    warned = [line for line in said if line.startswith("warning")]
    assert len(warned) == 2 and "wandb sync" in warned[0]  # one for each of the two lives
    ids = [line.split()[1] for line in said if line.startswith("id ")]
    assert len(ids) == 2 and ids[0] == ids[1]
    # Two lives of one run: two files, which `wandb sync` joins by the id.
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    first, second = map(wandb_records, files)
    for records in (first, second):
        (run,) = [r.run for r in records if r.HasField("run")]
        assert (run.run_id, run.project, run.display_name) == (ids[0], "proj", "nick")
        assert list(run.tags) == ["a", "b"]
        assert {c.key: c.value_json for c in run.config.update}["lr"] == "0.125"
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in first + second
        if r.HasField("history")
    ]
    assert [(h["_step"], h["step"], h["train/loss"]) for h in history] == [
        (step, step, 1.0 / step) for step in (2, 3, 4, 5)
    ]


def test_wandb_with_a_bad_key_is_one_warning(tmp_path):
    code = """
        import sys
        from scalegpt.run.writers import Apart, WandbWriter
        said = []
        writer = Apart("W&B", lambda: WandbWriter({}, sys.argv[1], "p"), said.append)
        writer.write({"step": 1})
        writer.close()
        for line in said:
            print(line)
    """
    (said,) = alone(code, tmp_path, WANDB_API_KEY="bad")
    assert said.startswith("warning: W&B is off from here on (AuthenticationError")


def fake_wandb(monkeypatch, run=None):
    def init(**keys):
        if run is None:
            raise OSError("no route to host")
        return run

    module = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")),
        login=lambda prompt, verify: True,
        Settings=lambda **keys: keys,
        init=init,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_without_a_network_is_one_warning(monkeypatch, tmp_path):
    said = []
    fake_wandb(monkeypatch)
    writer = Apart("W&B", lambda: WandbWriter({}, tmp_path, "p"), said.append)
    writer.write({"step": 1})
    writer.close()
    assert said == ["warning: W&B is off from here on (OSError: no route to host)"]
    assert os.listdir(tmp_path) == []


def test_wandb_that_breaks_while_logging_turns_itself_off(monkeypatch, tmp_path):
    calls, said = [], []

    class Run:
        id = "abc"

        def log(self, row, step):
            calls.append((row, step))
            raise OSError("disk full")

        def finish(self):
            raise AssertionError("it was turned off")

    fake_wandb(monkeypatch, Run())
    writer = Apart("W&B", lambda: WandbWriter({}, tmp_path, "p"), said.append)
    for step in (1, 2):
        writer.write({"step": step, "train/loss": 1.0})
    writer.close()
    assert calls == [({"step": 1, "train/loss": 1.0}, 1)]
    assert said == ["warning: W&B is off from here on (OSError: disk full)"]


def test_a_writer_that_blocks_or_dies_holds_up_nothing_and_is_named_once(monkeypatch, tmp_path):
    monkeypatch.setattr(Apart, "MOST_WAITING", 3)
    monkeypatch.setattr(Apart, "PATIENCE", 0.05)
    said, written, blocked, free = [], [], threading.Event(), threading.Event()

    def block(row):
        blocked.set()
        free.wait()

    stuck = Apart("A", lambda: SimpleNamespace(write=block, close=None), said.append)
    stuck.write({})
    assert blocked.wait(10)
    for _ in range(10):
        stuck.write({})
    stuck.close()
    assert said.pop() == "warning: A is off from here on (3 rows wait for it)" and not said
    late = Apart("B", lambda: SimpleNamespace(write=block, close=None), said.append)
    late.write({})
    late.close()
    assert said.pop().startswith("warning: B is off from here on (not done 0 s") and not said
    free.set()
    monkeypatch.setattr(Apart, "PATIENCE", 10)
    (tmp_path / "tb").write_text("")  # where a folder should be, as if the disk could not make it
    broken = Apart("TensorBoard", lambda: TensorBoardWriter(tmp_path / "tb"), said.append)
    whole = Apart("C", lambda: SimpleNamespace(write=written.append, close=list), said.append)
    for writer in (broken, whole):
        for step in (1, 2):
            writer.write({"step": step})
        writer.close()
    assert written == [{"step": 1}, {"step": 2}]
    assert len(said) == 1 and said[0].startswith("warning: TensorBoard is off from here on (File")


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"scalegpt\[{package}\]"):
        check_packages(log(**{package: True}))
    check_packages(log())


# trackio, for real: it imports in half a second


def test_trackio_has_each_row_once_over_restarts_and_asks_nobody(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when imported
    storage = pytest.importorskip("trackio").SQLiteStorage
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")  # trackio.init would ask who that is
    asked, handlers = [], [signal.getsignal(number) for number in signal.valid_signals()]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **more: asked.append(host))
    for name, lives in {"a/run": (None, 2, 4), "b/run": (None,)}.items():
        for resume_step in lives:
            metrics = Metrics(
                str(tmp_path / name),
                log(trackio=True),
                total_steps=9,
                phases=Phases(RunConfig(out_dir="x")),
                resume_step=resume_step,
                config={"optim": {"lr": 0.5}},
                stream=io.StringIO(),
            )
            for step in range((resume_step or 0) + 1, (resume_step or 2) + 3):
                metrics.train({**train_row(step), "train/grad_norm": math.nan})
                metrics.evaluation({"step": step, "val/loss": 2.0})
            metrics.sample(step, "To be", "\nor not")
            metrics.close()
    first, second = storage.get_run_records("p")  # of one name, and two runs all the same
    (run_id,) = {first["id"], second["id"]} - {(tmp_path / "b/run/trackio_id.txt").read_text()[:-1]}
    got = storage.get_logs("p", run_id=run_id)
    losses = [(row["step"], row["train/loss"]) for row in got if "train/loss" in row]
    assert losses == [(step, 10 / (step + 1)) for step in range(1, 7)]
    assert [row["step"] for row in got if "val/loss" in row] == list(range(1, 7))
    samples = {row["step"]: row["sample"]["_value"] for row in got if "sample" in row}
    assert samples == {step: "To be\n\nor not" for step in (4, 6)}
    assert storage.get_run_config("p", run_id=run_id) == {"optim": {"lr": 0.5}}
    assert not asked and capfd.readouterr() == ("", "")
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers


# Console


def test_console_without_a_terminal_is_plain_lines():
    stream = io.StringIO()
    console = Console(5000, stream=stream)
    console.write(train_row(1))
    speed = {"perf/tokens_per_second": 123456.7, "perf/step_seconds": 0.5, "perf/mfu": 0.4123}
    console.write(train_row(99, **speed))
    console.write(
        {
            "step": 99,
            "val/loss": 3.25,
            "val/loss_stderr": 0.01,
            "val/perplexity": 25.79,
            "val/bits_per_byte": 0.9,
            "val/best_loss": 3.2,
        }
    )
    console.say("saved")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 1/5000 | loss 5.0000 | lr 6.00e-04",
        "step 99/5000 | loss 0.1000 | lr 6.00e-04 | 123,457 tok/s | mfu 41.2% | left 40:50",
        "step 99/5000 | val loss 3.2500 | ± 0.0100 | 0.9000 bits/byte | best 3.2000",
        "saved",
    ]
    assert not set("\r\x1b\x08") & set(stream.getvalue())


def test_console_on_a_terminal_without_a_size_shows_a_live_line(monkeypatch):
    main, side = pty.openpty()  # which says that it has 0 lines of 0 columns
    with os.fdopen(side, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console(100)
        console.write(train_row(60, **{"perf/step_seconds": 2.0}))
        text = os.read(main, 1 << 16)
        while b"60%" not in text:  # a terminal hands on what it has so far
            text += os.read(main, 1 << 16)
        console.close()
    os.close(main)
    assert b"\rstep 60/100  loss 0.1639  lr 6.00e-04  left 01:20 |" in text


def test_the_live_line_stays_below_all_that_is_printed(monkeypatch):
    """Also where others write to the same terminal: threads, Python's logs, and `exits.say`."""
    screen, errors = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(logging.root, "handlers", [handler := logging.StreamHandler(errors)])
    monkeypatch.setattr(os, "isatty", lambda number: True)
    monkeypatch.setattr(exits, "offer", lambda number, data: screen.write(data.decode()))
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(600_000)
    exits.say("compile: 5 s so far")
    speed = {"perf/tokens_per_second": 1234567.8, "perf/step_seconds": 0.5, "perf/mfu": 0.412}
    console.write(train_row(300_000, **speed))
    live = screen.lines[-1]
    assert re.fullmatch(r"step 300000/600000  loss 0.0000 .* left 41:40:00 \|.{4,}\|  50%", live)
    assert len(live) <= 75, "^C has room"
    console.write({"step": 300_000, "val/loss": 3.0, "val/best_loss": 2.0})
    texts = [
        f"{who} says the same in every line of {n}\n{who} {n}" for who in "abc" for n in "12345"
    ]
    threads = [threading.Thread(target=console.say, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("a warning", file=sys.stderr)
    logging.getLogger("orbax").warning("a log")
    assert screen.lines[-3:] == ["a warning", "a log", live] and not errors.getvalue()
    screen.write("^C")  # as the terminal does
    exits.say("SIGINT: saving after this step")
    assert screen.lines[-2:] == ["SIGINT: saving after this step", ""]
    console.write(train_row(300_001, **speed))
    assert screen.lines[-1].startswith("step 300001/600000  loss 0.0000")
    console.say("x" * 100)
    console.close()
    assert sys.stderr is handler.stream is errors
    first, row, *said, warning, log, stop, wide, rest, end = screen.lines
    assert (first, row) == (
        "compile: 5 s so far",
        "step 300000/600000 | val loss 3.0000 | best 2.0000",
    )
    assert sorted(map("\n".join, zip(said[::2], said[1::2], strict=True))) == texts
    assert (warning, log, stop) == ("a warning", "a log", "SIGINT: saving after this step")
    assert (wide, rest, end) == ("x" * 80, "x" * 20, ""), "nothing of the live line is left"


def test_nothing_stale_is_left_whenever_another_thread_speaks_as_the_live_line_appears(monkeypatch):
    """By `exits.say` before every write to the terminal, and by `say` while the bar is made."""

    class Screens(Screen):
        def write(self, text):
            nonlocal moment
            moment -= 1
            if moment == 0:
                super().write("\r\x1b[Kcompile: 5 s so far\n")
            return super().write(text)

    def while_it_is_made():  # tqdm asks first when it has drawn what it draws of its own accord
        if thread := threads and threads.pop():
            thread.start()
            thread.join()
        return time.time()

    monkeypatch.setattr("tqdm.std.time", while_it_is_made)
    monkeypatch.setenv("COLUMNS", "80")
    for first in range(1, 100):
        moment = first
        monkeypatch.setattr(sys, "stdout", screen := Screens())
        console = Console(100_000)
        threads = [threading.Thread(target=console.say, args=["saved"])]
        console.write(train_row(1))
        console.say("first update after 5.9 s")
        console.write(train_row(2))
        console.close()
        lines = screen.lines
        if moment > 0:
            break
        lines.remove("compile: 5 s so far")
        assert lines == ["saved", "first update after 5.9 s", ""]
    assert first > 10, "it wrote so often"


def test_standard_error_is_the_hosts_own_again_after_two_runs_at_once_or_when_it_changed_it(
    monkeypatch,
):
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(sys, "stderr", errors := Screen())
    consoles = [Console(10), Console(10)]
    for console in consoles:
        console.write(train_row(1))
    print("a warning", file=sys.stderr)
    assert not errors.getvalue() and "a warning" in sys.stdout.lines
    for console in consoles:
        console.close()
    assert sys.stderr is errors
    console = Console(10)
    console.write(train_row(1))
    monkeypatch.setattr(sys, "stderr", hosts := Screen())
    console.close()
    assert sys.stderr is hosts


def test_a_host_program_may_have_no_standard_streams_or_such_as_only_write(monkeypatch):
    said = []
    for stream in (None, SimpleNamespace(write=said.append)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(10)
        console.say("saved")
        console.write(train_row(1))
        console.close()
    assert "".join(said) == "saved\nstep 1/10 | loss 5.0000 | lr 6.00e-04\n"


@pytest.mark.slow
def test_a_run_leaves_nothing_stale_on_a_terminal_of_80_columns(plays, tmp_path):
    live = []

    def press_ctrl_c(text, its_keys):
        line = terminal.shown(text.rpartition("\n")[2])[-1]
        if re.fullmatch(r"step \d+/100000  loss .*left .* \|.*\| +0%", line):
            live.append(line)
            if len(live) == 20:
                os.write(its_keys, b"\x03")

    changes = {"optim.steps": 100_000, "checkpoint.every": 50, "eval.every": 50}
    argv = arguments(plays, tmp_path / "run", **changes)
    command = [sys.executable, "-m", "scalegpt.train", *argv]
    code, text = terminal.run(command, press_ctrl_c)
    assert code == 3 and max(map(len, live)) <= 75, text
    lines = terminal.shown(text)
    stop = "SIGINT: saving after this step; a second SIGINT or SIGTERM leaves at once"
    stopped, time, *rest = [line for line in lines[lines.index(stop) + 1 :] if line]
    assert re.fullmatch(r"stopped on request after update \d+; the same command continues", stopped)
    assert time.startswith("time     ") and not any("|" in line for line in rest), text
    # A share of the time may end in 0 %, too.
    assert not lines[-1] and not any(re.search(r"\| +\d+%$", line) for line in lines), text


def test_in_a_notebook_there_is_a_bar_and_what_is_said_is_output(monkeypatch):
    """tqdm's bar for notebooks needs a kernel; this stands in for it."""

    class Widget(tqdm):
        def __init__(self, **keywords):
            super().__init__(gui=True, **keywords)

        def display(self, *args, **keywords):
            shown.append(self.desc)

        def clear(self, *args, **keywords):
            pass

    shown, stream = [], io.StringIO()
    monkeypatch.setattr(metrics, "Bar", Widget)
    console = Console(10, stream)
    for step in (1, 2):
        console.write(train_row(step))
    console.say("saved")
    console.close()
    assert list(dict.fromkeys(shown)) == [
        "step 1/10  loss 5.0000  lr 6.00e-04",
        "step 2/10  loss 3.3333  lr 6.00e-04",
    ]
    assert stream.getvalue() == "saved\n"


# All together


def test_metrics_writes_the_same_row_everywhere(tmp_path):
    out, stream = tmp_path / "out", io.StringIO()
    metrics = Metrics(str(out), log(tensorboard=True), total_steps=10, phases=PHASES, stream=stream)
    metrics.train(train_row(1, **{"train/loss": np.float32(2.5)}))
    metrics.evaluation({"step": 1, "val/loss": 2.25, "val/wiki/loss": 2.125, "time": 7.0})
    metrics.close()
    train, evaluation = rows(out / "metrics.jsonl")
    assert train["train/loss"] == 2.5 and train["step"] == 1 and train["time"] > 1.7e9
    assert evaluation == {"step": 1, "val/loss": 2.25, "val/wiki/loss": 2.125, "time": 7.0}
    tags = {v.tag for e in events(out / "tensorboard") for v in e.summary.value}
    assert tags == (train.keys() | evaluation.keys()) - {"step", "time"}
    assert stream.getvalue().count("\n") == 2


def test_metrics_of_other_processes_leave_no_trace(tmp_path, capfd):
    out = tmp_path / "out"
    metrics = Metrics(str(out), log(True, True), total_steps=10, phases=PHASES, is_main=False)
    metrics.train(train_row(1))
    metrics.evaluation({"step": 1, "val/loss": 2.0})
    metrics.say("hello")
    metrics.close()
    assert not out.exists() and capfd.readouterr() == ("", "")


def test_metrics_knows_its_keys(tmp_path):
    metrics = Metrics(str(tmp_path), log(), total_steps=10, phases=PHASES, stream=io.StringIO())
    with pytest.raises(AssertionError):
        metrics.train({"step": 1, "train/learning_rate": 1.0})
    with pytest.raises(AssertionError):
        metrics.evaluation({"step": 1, "loss": 1.0})
    metrics.close()


# Speed


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_throughput_leaves_out_compilation():
    clock = Clock()
    speed = Throughput(clock)
    clock.now += 60  # step 1 compiles
    speed.start(1)
    assert speed.read(1, 1000) == {}
    clock.now += 5
    assert speed.read(11, 1000) == {"perf/tokens_per_second": 2000, "perf/step_seconds": 0.5}
    clock.now += 5  # a new window: nothing of the last one is left
    assert speed.read(13, 1000) == {"perf/tokens_per_second": 400, "perf/step_seconds": 2.5}


def test_throughput_before_start_is_unknown_rather_than_wrong():
    clock = Clock()
    speed = Throughput(clock)
    clock.now += 9
    assert speed.read(1, 1000) == {}
    clock.now += 2
    assert speed.read(2, 1000)["perf/step_seconds"] == 2


def test_fault_13_rates_count_updates_not_microbatches():
    """An update of 40 microbatches of 16,384 tokens in 8 s is 81,920 tokens/s, not 40 times it."""
    clock = Clock()
    speed = Throughput(clock)
    speed.start(0)
    clock.now += 80
    got = speed.read(10, tokens_per_step=40 * 16 * 1024)
    assert got == {"perf/tokens_per_second": 81920, "perf/step_seconds": 8}


def test_throughput_adds_mfu_where_it_is_known():
    model = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=64)
    for kind in ("TPU v4", "unheard of"):
        clock = Clock()
        speed = Throughput(clock, flops.mfu_meter(model, kind, 4, lambda text: None))
        speed.start(1)
        clock.now += 2
        assert speed.read(2, 1000).get("perf/mfu") == flops.mfu(model, 500, kind, 4)
