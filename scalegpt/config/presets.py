"""scalegpt's own configs and recipes of data sets, wherever scalegpt is installed.

They are the folders configs/ and data/ at the top of the repository. A wheel has them inside the
package: pyproject.toml says so.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_A_WHEEL = _PACKAGE / "presets"


def own_configs() -> dict[str, Path]:
    """scalegpt's own YAML files by name: `demo`, `ablations/char_cpu` and so on."""
    folder = _folder("configs")
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe(name: str) -> Path | None:
    """The script that makes the data set of this name, as `python_stdlib`; None: there is none."""
    scripts = {script.parent.name: script for script in _folder("data").glob("*/prepare.py")}
    return scripts.get(name)


def data_folder(script: str) -> Path:
    """Where a recipe writes to when not told: beside itself in a clone, else data/NAME here."""
    folder = Path(script).resolve().parent
    return Path("data", folder.name) if folder.is_relative_to(_IN_A_WHEEL) else folder


def _folder(name: str) -> Path:
    return (_IN_A_WHEEL if _IN_A_WHEEL.is_dir() else _PACKAGE.parent) / name
