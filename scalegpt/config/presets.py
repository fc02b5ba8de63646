"""scalegpt's own configs and recipes of data sets are found here, wherever scalegpt is installed.

A clone has them in configs/ and data/ at its top; a wheel has both folders inside the package, by
pyproject.toml.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_A_WHEEL = _PACKAGE / "presets"


def own_configs() -> dict[str, Path]:
    """Return scalegpt's own YAML files by name: `demo`, `ablations/char_cpu` and so on."""
    folder = _folder("configs")
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe(name: str) -> Path | None:
    """Return the script that makes the data set of this name, as `python_stdlib`, or None.

    A script that does not use scalegpt is none, because folders of nanoGPT, which have scripts of
    their own, are copied into data/ as well, and `data.prepare` runs what is found here.
    """
    scripts = {script.parent.name: script for script in _folder("data").glob("*/prepare.py")}
    script = scripts.get(name)
    return script if script and b"\nfrom scalegpt." in script.read_bytes() else None


def data_folder(script: str) -> Path:
    """Return a recipe's default folder: beside itself in a clone, else data/NAME below here."""
    folder = Path(script).resolve().parent
    return Path("data", folder.name) if folder.is_relative_to(_IN_A_WHEEL) else folder


def _folder(name: str) -> Path:
    return (_IN_A_WHEEL if _IN_A_WHEEL.is_dir() else _PACKAGE.parent) / name
