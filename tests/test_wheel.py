"""scalegpt as a wheel in a fresh environment: the commands, configs and recipes in any folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--optim.steps=4", "--eval.windows=16", "--model.n_layer=1"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment in which nothing but the wheel was installed."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    return python


def test_it_holds_every_module_config_and_recipe_and_nothing_else(wheel):
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("scalegpt/**/*.py")}
    code |= {f"scalegpt/server/page/{name}" for name in ("index.html", "page.js", "page.css")}
    code.add("scalegpt/py.typed")
    shipped = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("data/*/*.py")]
    assert names == code | {f"scalegpt/presets/{p.relative_to(ROOT).as_posix()}" for p in shipped}


def test_train_evaluate_and_generate_run_in_a_folder_of_the_users(python, tmp_path):
    """README's demo by its name, with its data prepared; then the run is used."""
    run(python.with_name("scalegpt-train"), "--config", "demo", *SHORT, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}
    assert (tmp_path / "data" / "python_stdlib" / "train.bin").stat().st_size > 1e7
    rows = (tmp_path / "out" / "demo" / "metrics.jsonl").read_text().splitlines()
    assert any("val/loss" in json.loads(row) for row in rows)
    arguments = ["--run", "out/demo", "--windows", "16", "--json"]
    assert json.loads(run(python.with_name("scalegpt-evaluate"), *arguments, cwd=tmp_path))
    arguments = ["--run", "out/demo", "--prompt", "def ", "--max-new-tokens", "4"]
    assert "def " in run(python, "-m", "scalegpt.generate", *arguments, cwd=tmp_path)


def test_a_recipe_writes_below_the_current_folder(python, tmp_path):
    """Also where one recipe runs another, as that of shakespeare_char does."""
    (tmp_path / "plays.txt").write_text("To be, or not to be, that is the question.\n" * 99)
    find = "from scalegpt.config.presets import recipe; print(recipe('shakespeare_char'))"
    script = run(python, "-c", find, cwd=tmp_path).strip()
    assert Path(script).is_relative_to(python.parents[1])
    run(python, script, "--input", "plays.txt", cwd=tmp_path)
    assert (tmp_path / "data" / "shakespeare_char" / "meta.json").is_file()
