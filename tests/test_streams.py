"""Standard streams that are closed, full, gone or read by nobody, and Ctrl-C."""

import io
import os
import signal
import subprocess
import sys

import pytest

from scalegpt.errors import Mistake
from scalegpt.processes import streams
from scalegpt.processes.streams import Output

PRINTS = "import sys; print('remark', file=sys.stderr); print('result')"
OPENS = "import sys; assert open('/dev/null').fileno() > 2; sys.stdin.read()"
FULL = "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("body", "redirected", "result"),
    [
        (PRINTS, "", (0, "result\n", "remark\n")),
        (PRINTS, ">/dev/full", (2, "", f"remark\n{FULL}")),  # a result that is not kept
        (PRINTS, ">/dev/full #files", (0, "", "remark\n")),  # its result is files
        (PRINTS, "2>/dev/full", (0, "result\n", "")),
        (PRINTS, "<&- >&- 2>&-", (0, "", "")),
        (OPENS, "<&- >&-", (0, "", "")),  # later files do not take the place of closed streams
        ("raise KeyboardInterrupt", "", (130, "", "\ninterrupted\n")),
    ],
)
def test_a_command_and_its_streams(body, redirected, result):
    program = f"def main(argv):\n    {body}\n    return 0\n"
    program += "from scalegpt.processes.command import run_command\n"
    program += f"run_command(main, essential={'#' not in redirected})"
    line = ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == result


def test_ctrl_c_during_the_imports_of_a_command_is_no_page_of_frames():
    for name in ("evaluate", "generate", "report"):
        program = f"""
import os, runpy, signal, sys
class Interrupted:  # while the command imports its first module
    def find_spec(self, module, *rest):
        if module == "scalegpt.config":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
runpy.run_module("scalegpt.{name}", run_name="__main__")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_what_is_not_essential_is_dropped_and_an_essential_loss_raises_once(monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE", 0.05)
    full = os.open("/dev/full", os.O_WRONLY)
    essential = io.TextIOWrapper(io.BufferedWriter(Output(full, essential=True)))
    with pytest.raises(Mistake, match="No space left"):
        print("x", file=essential, flush=True)
    print("y", file=essential, flush=True)
    os.close(full)
    reader, writer = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Output(writer, True))))
        streams.make_optional()
        print("x" * 10**6, flush=True)  # more than the pipe takes, and nobody reads
        assert len(os.read(reader, 10**6)) < 10**6
        print("y", flush=True)
        assert os.read(reader, 100) == b"y\n"
        os.close(reader)
        print("z", flush=True)  # a pipe without a reader
        os.close(writer)
        print("z", flush=True)


def test_a_stuck_reader_is_waited_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(streams.select, "select", lambda *a: asked.append(a[3]) or ([], [], []))
    output = Output(1, essential=False)
    assert [output.write(b"x") for _ in range(3)] == [1, 1, 1]
    assert asked == [10.0, 0, 0]


def test_a_terminal_obeys_no_text_of_a_model():
    assert streams.visible("a\tb\n\x1b[2J\x07\x7f\x9bé") == "a\tb\n\\x1b[2J\\x07\\x7f\\x9bé"
