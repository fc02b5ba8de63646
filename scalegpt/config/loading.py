"""From a YAML file to a validated run; a mistake in it becomes one clear line."""

import difflib
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from scalegpt.config import Config
from scalegpt.config.presets import own_configs
from scalegpt.errors import Mistake

# What a union calls the branches it tried.
_BRANCHES = ("str", "dict[", "function-", "constrained-str")

_REPR = reprlib.Repr()

_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 200, 200, 60

_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 2, 4, 4

_START = "or start from a whole one: --config configs/demo.yaml"


def load(path: str | Path) -> dict[str, Any]:
    """The sections in a YAML file, not yet validated. Raises ValueError.

    path: a file, or the name of one of scalegpt's own: `demo`, `demo.yaml`, `configs/demo.yaml`.
    """
    name, own = _name(path), own_configs()
    try:
        file = Path(path) if Path(path).is_file() else own.get(name, Path(path))
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean configs/{near[0]}.yaml?" if near else f"there are {', '.join(own)}"
        raise Mistake(f"cannot read config {path}: {error.strerror}; {hint}") from None
    except UnicodeDecodeError as error:
        raise Mistake(f"config {path} is not UTF-8 text: {error}") from None
    except ValueError as error:  # a path with a NUL in it
        raise Mistake(f"cannot read config {str(path)!r}: {error}") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise Mistake(f"config {path} is not valid YAML: {error}") from None
    if values is None:  # an empty file
        values = {}
    if not isinstance(values, dict):
        raise Mistake(f"config {path} holds a {type(values).__name__}, not sections of keys")
    # "optim:" with every key commented out is None, and means the defaults.
    return {name: {} if section is None else section for name, section in values.items()}


def _name(path: str | Path) -> str:
    return Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml")


def validate(values: dict[str, Any], source: str) -> Config:
    """Raises ValueError: one line for each mistake, with the key, the value and the fix."""
    for name in ("data", "run"):  # so that what is missing is named as data.path, not as data
        values = {**values, name: values.get(name, {})}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise Mistake("\n  ".join([f"{source} makes no run:", *lines])) from None


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    section, _, key = name.rpartition(".")
    keys = [k.split(".")[-1] for k in known]
    # The right key in the wrong section, or without one, is nearer than any mistyped one.
    near = [key] if key in keys else difflib.get_close_matches(key, keys, n=1)
    there = [k for k in known if k.split(".")[-1] in near]
    there.sort(key=lambda k: not k.startswith(f"{section}."))
    return f"did you mean {prefix}{there[0]}?" if there else ""


def _explain(detail: Any) -> str:
    # A union names the branch it tried ("str", "dict[str,...]"): noise for whoever typed a value.
    where = [str(part) for part in detail["loc"] if not str(part).startswith(_BRANCHES)]
    key, kind, value = ".".join(where), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        sections = Config.model_fields
        keys = {s: list(field.annotation.model_fields) for s, field in sections.items()}
        known = [*sections, *(f"{s}.{k}" for s, names in keys.items() for k in names)]
        here = ", ".join(keys.get(where[0], sections))
        return f"unknown key {key}={_shown(value)}; {nearest(key, known) or f'there are {here}'}"
    if kind == "missing":
        return f"{key} is missing; give --{key}=..., {_START}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key}={_shown(value)}: {detail['msg']}"


def _shown(value: Any) -> str:
    """As repr, but of a bounded size: aliases make a short YAML file a huge value."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a huge number"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice; keep one", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value in `text`. Raises ValueError for what is no YAML of plain values."""
    try:
        # A SafeLoader: of Python it makes numbers, texts, dates, lists and dictionaries only.
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise Mistake("it is nested too deeply") from None
    # Its own errors, and of "2024-13-01", "!!int x" or "!!bool x" whatever Python says to them.
    except Exception as error:
        raise Mistake(str(error)) from None
