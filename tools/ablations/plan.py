"""A plan turns an ablation's YAML file, with its arms and seeds, into the command of each run."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from scalegpt.config import Config, command_line, loading
from scalegpt.errors import Mistake
from scalegpt.run.resume import with_model

KEYS = ("config", "arms", "seeds", "reference")
SET_HERE = {"run.seed": "seeds", "run.out_dir": "--out"}  # key -> where its value comes from
EXAMPLE = "write arms: {name: {section: {key: value}}, ...}"


class Run(NamedTuple):
    """A run trains one arm with one seed; argv are scalegpt.train's, which mean `config`."""

    arm: str
    seed: int
    argv: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out_dir)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "scalegpt.train", *self.argv]


class Plan(NamedTuple):
    """A plan lists its runs in order: all arms with the first seed, then all with the next."""

    name: str
    reference: str
    arms: list[str]
    seeds: list[int]
    runs: list[Run]


def read_plan(file: str, out: str, overrides: list[str]) -> Plan:
    """Read the plan in a YAML file, with `--section.key=value` overrides for all arms.

    A key's value comes from the last of these that sets it: the file that `config` names, the
    plan's own sections, the arm, the overrides. Every run is validated. Raises Mistake, which names
    the arm.
    """
    values = loading.load(file)
    if unknown := [name for name in values if name not in {*KEYS, *Config.model_fields}]:
        known = ", ".join((*KEYS, *Config.model_fields))
        raise Mistake(f"{file}: unknown key {unknown[0]!r}; there are {known}")
    arms, seeds = _arms(file, values.get("arms")), _seeds(file, values.get("seeds"))
    reference = values.get("reference", next(iter(arms)))
    if not isinstance(reference, str) or reference not in arms:
        raise Mistake(f"{file}: reference {reference!r} is none of the arms {', '.join(arms)}")
    base = values.get("config")
    if not isinstance(base, str | None):
        raise Mistake(f"{file}: config={base!r} must be the name of a file")
    common = _keys(file, {s: values[s] for s in values if s not in KEYS})
    keys = {name: _keys(f"{file}: arm {name}", sections) for name, sections in arms.items()}
    _check_overrides(overrides, keys)

    def run(arm: str, seed: int) -> Run:
        argv = ["--config", base] if base else []
        argv += [
            f"--{key}={command_line.text_of(value)}" for key, value in (common | keys[arm]).items()
        ]
        folder = Path(out, arm, f"seed-{seed}")
        argv += [*overrides, f"--run.seed={seed}", f"--run.out_dir={folder}"]
        try:
            config, _ = command_line.parse(argv, "tools/ablation.py", {})
        except ValueError as error:
            raise Mistake(f"arm {arm}: {error}") from None
        if config.batch.growth:
            raise Mistake(f"arm {arm}: batch.growth: curves are over updates of one size")
        # Beside steps, as all arms may have, epochs of an arm would say nothing.
        if config.optim.counts_epochs or keys[arm].get("optim.epochs") is not None:
            raise Mistake(f"arm {arm}: optim.epochs: give the arms their optim.steps")
        return Run(arm, seed, argv, with_model(config))

    runs = [run(arm, seed) for seed in seeds for arm in arms]
    return Plan(Path(file).stem, reference, list(arms), seeds, runs)


def _arms(file: str, arms: Any) -> dict[str, Any]:
    if not isinstance(arms, dict) or not arms:
        raise Mistake(f"{file} has no arms; {EXAMPLE}")
    for name in arms:  # a folder is named after it; YAML reads `no` as False and 1 as a number
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise Mistake(
                f"{file}: arm {name!r} needs another name, of letters, digits and . + - _ "
                "(in quotes where YAML takes it for something else)"
            )
    return arms


def _seeds(file: str, seeds: Any) -> list[int]:
    numbers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not numbers or not seeds or len(set(seeds)) < len(seeds):
        raise Mistake(f"{file}: seeds={seeds!r} must be different numbers: seeds: [1, 2, 3]")
    return seeds


def _keys(where: str, sections: Any) -> dict[str, Any]:
    """Return a value for each section.key."""
    if not isinstance(sections, dict | None):
        raise Mistake(f"{where} holds {sections!r}, not sections of keys; {EXAMPLE}")
    values: dict[str, Any] = {}
    for section, keys in (sections or {}).items():
        if not isinstance(keys, dict | None):
            raise Mistake(f"{where}: {section}={keys!r} is not a section of keys; {EXAMPLE}")
        values |= {f"{section}.{key}": value for key, value in (keys or {}).items()}
    _refuse_set_here(where, values)
    return values


def _refuse_set_here(where: str, keys: Any) -> None:
    for key in SET_HERE.keys() & keys:
        raise Mistake(f"{where} sets {key}, which {SET_HERE[key]} sets for each run; leave it out")


def _check_overrides(overrides: list[str], arms: dict[str, dict[str, Any]]) -> None:
    given = [word.split("=")[0].removeprefix("--") for word in overrides]
    _refuse_set_here("the command line", given)
    for arm, keys in arms.items():
        if both := [key for key in given if key in keys]:
            raise Mistake(
                f"--{both[0]} is for all arms, but arm {arm} is about it: change the "
                "file, or leave it out"
            )
