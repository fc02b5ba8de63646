"""A YAML file becomes a validated configuration; each mistake in it becomes one clear line."""

import contextlib
import difflib
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from scalegpt.config import Config
from scalegpt.config.predecessors import advice, nearest
from scalegpt.config.presets import own_configs
from scalegpt.errors import Mistake

# A Config has to name data and a folder; a model or a mesh that belongs to no run has neither.
NO_RUN = {"data": {"path": ""}, "run": {"out_dir": "none"}}
# pydantic names the branches of a union that it tried by these prefixes.
_BRANCHES = ("str", "bool", "dict[", "list[", "function-", "constrained-str", "[key]")
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 200, 200, 60
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 2, 4, 4
_START = "or start from a whole one: --config configs/demo.yaml"


def load(path: str | Path) -> dict[str, Any]:
    """Return the sections of a YAML file, not yet validated. Raises Mistake.

    path: a file, or the name of one of scalegpt's own: `demo`, `demo.yaml`, `configs/demo.yaml`.
    """
    name, own = _name(path), own_configs()
    if name.endswith(".py"):
        same = Path(name).stem.removeprefix("train_")
        near = f": --config {same}" if same in own else ""
        raise Mistake(f"config {path} is Python; {advice('config/x.py', ['config'])}{near}")
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
    return sections(text, str(path))


def sections(text: str, source: str) -> dict[str, Any]:
    """Return the sections in the YAML `text` of the config `source`. Raises Mistake."""
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise Mistake(f"config {source} is not valid YAML: {error}") from None
    if values is None:  # an empty file
        values = {}
    if not isinstance(values, dict):
        raise Mistake(f"config {source} holds a {type(values).__name__}, not sections of keys")
    # A section whose keys are all commented out is None in YAML, and means the defaults.
    return {name: {} if section is None else section for name, section in values.items()}


def _name(path: str | Path) -> str:
    return Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml")


def validate(values: dict[str, Any], source: str, notes: list[str] | None = None) -> Config:
    """Return the configuration with these sections, which come from `source`, as messages call it.

    notes: where given, a warm-up that is too long for the run is shortened, and a line in this list
    says so. Raises Mistake: one line for each mistake, with the key, the value and the fix.
    """
    if "arms" in values:
        raise Mistake(
            f"{source} has several arms, each a run: python tools/ablation.py FILE --out DIR"
        )
    if "stages" in values:
        raise Mistake(f"{source} has several stages, each a run: python -m scalegpt.stages FILE")
    for name in ("data", "run"):  # a missing section is reported as its key data.path is
        values = {**values, name: values.get(name, {})}
    try:
        return Config.model_validate(values, context=notes)
    except ValidationError as error:
        lines = [explain(detail) for detail in error.errors()]
        raise Mistake("\n  ".join([f"{source} makes no run:", *lines])) from None


def with_overrides(values: dict[str, Any], overrides: dict[str, Any], source: str) -> Config:
    """Return the configuration of a file's sections with `overrides`, sections too, over them.

    A warm-up that was not given together with the number of updates yields to it, with a note: who
    tries a config with --optim.steps=20 has no warm-up in mind. Raises Mistake as `validate`.
    """
    values = {**values}
    for section, keys in overrides.items():
        stored = values.get(section, {})
        if isinstance(stored, Mapping):  # else the file is wrong, and `validate` will say so
            values[section] = {**stored, **keys} if isinstance(keys, Mapping) else keys
    optim, notes = overrides.get("optim", {}), list[str]()
    if not (isinstance(optim, Mapping) and {"steps", "decay_steps"} & optim.keys()):
        optim = values.get("optim", {})
    together = isinstance(optim, Mapping) and "warmup_steps" in optim
    config = validate(values, source, None if together else notes)
    _check_allowed(config.run.allow_config_change)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


def given(config: Config) -> dict[str, Any]:
    """Return sections from which this configuration follows, without keys that follow from others.

    So a preset, a depth or an optimizer may be changed, and what it has set changes along.
    """
    values = config.model_dump(exclude_unset=True)
    for section, keys in values.items():
        for key in list(keys):
            fewer = {**values, section: {k: v for k, v in values[section].items() if k != key}}
            with contextlib.suppress(ValidationError):
                if Config.model_validate(fewer) == config:
                    values = fewer
    return values


def _check_allowed(keys: bool | list[str]) -> None:
    """Raise Mistake for a name that is no key: the change that is meant would be refused later."""
    known = known_keys()
    if unknown := [key for key in keys if key not in known] if isinstance(keys, list) else []:
        near = [nearest(key, known) or "see --help" for key in unknown]
        lines = [f"{k} is no key; {hint}" for k, hint in zip(unknown, near, strict=True)]
        raise Mistake("\n  ".join([f"run.allow_config_change={','.join(keys)}:", *lines]))


def validate_sections(values: dict[str, Any], source: str) -> Config:
    """Validate some sections, as model or mesh, without a run. Raises Mistake as `validate`."""
    return validate({**values, **NO_RUN}, source)


def known_keys() -> list[str]:
    """Return the names of all keys of a run, as `optim.lr`."""
    sections = Config.model_fields.items()
    return [f"{name}.{key}" for name, field in sections for key in field.annotation.model_fields]


def explain(detail: Any) -> str:
    """Return one line for one of pydantic's errors."""
    # A union names the branch it tried ("str", "dict[str,...]"): noise for whoever typed a value.
    path = [str(part) for part in detail["loc"] if not str(part).startswith(_BRANCHES)]
    key, kind, value = ".".join(path), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        sections = Config.model_fields
        known = [*sections, *known_keys()]
        names = [k.partition(".")[2] for k in known if k.startswith(f"{path[0]}.")] or sections
        near = nearest(key, known) or f"there are {', '.join(names)}"
        return f"unknown key {key}={shown(value)}; {near}"
    if kind == "missing":
        return f"{key} is missing; give --{key}=..., {_START}"
    if kind == "dict_type":
        return f"{key}={shown(value)} has no keys and values; write them as {{key: value}}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key}={shown(value)}: {detail['msg']}"


def shown(value: Any) -> str:
    """Return repr(value) cut to a bounded size: YAML's aliases make a short file a huge value."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a huge number"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is there twice."""

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
    """Return the value in `text`. Raises Mistake where that is not YAML of plain values."""
    try:
        # A SafeLoader makes numbers, texts, dates, lists and dictionaries, and no other objects.
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise Mistake("it is nested too deeply") from None
    # "2024-13-01", "!!int x" or "!!bool x" raise Python's errors, not YAML's.
    except Exception as error:
        raise Mistake(str(error)) from None
