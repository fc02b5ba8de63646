"""The commands by other names: `python -m scalegpt`, and the scripts that a wheel installs."""

import gc
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
from conftest import ROOT

from scalegpt.__main__ import COMMANDS, main
from scalegpt.errors import Mistake
from scalegpt.processes import streams
from scalegpt.processes.command import run_command

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_scalegpt_alone_lists_its_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()[1 : 1 + len(COMMANDS)]
    for name in COMMANDS:
        assert sum(f" -m scalegpt.{name} " in line for line in lines) == 1, name
        assert (ROOT / "scalegpt" / f"{name}.py").is_file()
    with pytest.raises(Mistake, match="no command trian; there are train, evaluate, gen"):
        main(["trian"])


def test_each_command_has_a_script_that_does_as_python_m_does(monkeypatch):
    """`runpy` is what `python -m` is made of."""
    assert SCRIPTS.keys() == {f"scalegpt-{name}" for name in COMMANDS}
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda *name, **how: ran.append((*name, how)))
    for script, function in SCRIPTS.items():
        EntryPoint(script, function, "console_scripts").load()()
        module = script.replace("-", ".")
        assert ran.pop() == (module, {"run_name": "__main__", "alter_sys": True})


def test_garbage_is_collected_from_the_first_line_of_a_command_on(monkeypatch):
    monkeypatch.setattr(streams, "prepare", lambda essential: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    gc.disable()  # as the commands do while they import
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: int(gc.isenabled()))
    assert ended.value.code == 1


def test_training_begins_without_packages_that_only_later_work_needs():
    command = [sys.executable, "-X", "importtime", "-m", "scalegpt.train", "--config=demo"]
    done = subprocess.run([*command, "--print-config"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "grain" in imported
    # tensorstore is Orbax's, whose own name is there where grain has asked for it in vain.
    assert not imported & {"tensorstore", "tensorboardX", "matplotlib", "transformers"}


@pytest.mark.slow
def test_a_command_by_its_short_name_has_its_own_exit_code_and_streams():
    command = [sys.executable, "-m", "scalegpt", "generate", "--prompt=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: one of the arguments --run --hf is required; see --help\n"
