"""From YAML and `--section.key=value` to a validated run; a mistake becomes one clear line."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from scalegpt import peers
from scalegpt.config import Config, DataConfig
from scalegpt.line import FAILED, USERS_MISTAKE

_START = "or start from a whole one: --config configs/demo.yaml"


def parse(
    argv: list[str], prog: str, flags: dict[str, dict[str, Any]],
    defaults: dict[str, dict[str, Any]] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Command line -> the run and the values of `flags` (name -> keywords of `add_argument`).

    Later wins: Config's defaults, then `defaults` (section -> key -> value), then `--config FILE`,
    then `--section.key=value`. Raises ValueError with one line for each mistake.
    """
    parser = Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    for name, keywords in flags.items():
        parser.add_argument(name, **keywords)
    try:
        source = CliSettingsSource(
            _CommandLine, root_parser=parser, cli_parse_args=argv, cli_hide_none_type=True
        )
        overrides, flag_values = source(), parser.parse_args(argv)
    except SettingsError as error:
        raise ValueError(f"{error}; write --section.key=value, one for each key") from None
    if isinstance(data := overrides.get("data"), dict) and "path" in data:
        overrides["data"] = {**data, "path": _mixture_or_path(data["path"])}
    values = load(flag_values.config) if flag_values.config else {}
    for section, keys in (defaults or {}).items():
        if isinstance(stored := values.get(section, {}), dict):
            values[section] = {**keys, **stored}
    for section, keys in overrides.items():
        stored = values.get(section, {})
        if isinstance(stored, dict):  # else the file is wrong, which validate will say
            values[section] = {**stored, **keys} if isinstance(keys, dict) else keys
    return validate(values, flag_values.config or "this command line"), flag_values


def load(path: str | Path) -> dict[str, Any]:
    """The sections in a YAML file, not yet validated. Raises ValueError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        known = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        near = difflib.get_close_matches(str(path), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "scalegpt's own configs are in configs/"
        raise ValueError(f"cannot read config {path}: {error.strerror}; {hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path} holds a {type(values).__name__}, not sections of keys")
    # "optim:" with every key commented out is None, and means the defaults.
    return {name: {} if section is None else section for name, section in values.items()}


def validate(values: dict[str, Any], source: str) -> Config:
    """Raises ValueError: one line for each mistake, with the key, the value and the fix."""
    for name in ("data", "run"):  # so that what is missing is named as data.path, not as data
        values = {**values, name: values.get(name, {})}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ValueError("\n  ".join([f"{source} makes no run:", *lines])) from None


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """A command's last line: exit with main's code, or 2 and one message for a user's mistake.

    Only a ValueError that scalegpt itself raised is a user's mistake; one from inside a library
    is a fault of ours and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
        peers.farewell(code)
        sys.exit(code)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        fail(error)
        if isinstance(error, BrokenPipeError):  # else Python would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if (code := _code(error)) == FAILED:
            raise
        _show(error, code)
        sys.exit(code)


def fail(error: BaseException) -> None:
    """With other processes: show `error`, and end all with it. Alone: nothing.

    To be called before a clean-up that waits for other processes: they may be waiting for this.
    """
    if peers.line is None:
        return
    code = _code(error)
    if code == FAILED:
        peers.wait_for_cause(error)
    _show(error, code)
    text = f"{error}" if code == USERS_MISTAKE else f"{type(error).__name__}: {error}"
    peers.leave(code, text, said=True)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130  # as the shell calls a process that Ctrl-C ended
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
        return 141
    if isinstance(error, ValueError):
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = (Path(__file__).resolve().parent, Path(sys.argv[0]).resolve().parent)
        if raised_in.parent in ours:
            return USERS_MISTAKE
    return FAILED


def _show(error: BaseException, code: int) -> None:
    if code == USERS_MISTAKE:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif code == FAILED:
        traceback.print_exception(error)
    elif code == 130:
        print("\ninterrupted", file=sys.stderr)


class _DataOnCommandLine(DataConfig):
    path: str
    """folder or URL with train.bin, val.bin, meta.json; or a mixture '{path: weight, ...}'"""


class _CommandLine(Config, BaseSettings):
    """Config as pydantic-settings wants it for a command line; nothing reads the environment."""

    # Of a type that may be a dictionary it would split "lang=en" and quote "C:\text".
    data: _DataOnCommandLine
    model_config = SettingsConfigDict(extra="forbid", nested_model_default_partial_update=True)


class Parser(argparse.ArgumentParser):
    """Of every command: a mistake is one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """A ValueError like every other mistake, naming the nearest flag."""
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [name.removeprefix("--") for name in self._option_string_actions]
            near = _nearest(flag.split("=")[0].removeprefix("--"), known, "--")
            raise ValueError(f"unknown argument {flag}; {near or 'see --help'}")
        raise ValueError(f"{message}; see --help")


def _mixture_or_path(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--data.path={value} is no mixture {{path: weight, ...}}") from None


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    section, _, key = name.rpartition(".")
    keys = [k.split(".")[-1] for k in known]
    # The right key in the wrong section, or without one, is nearer than any mistyped one.
    near = [key] if key in keys else difflib.get_close_matches(key, keys, n=1)
    there = [k for k in known if k.split(".")[-1] in near]
    there.sort(key=lambda k: not k.startswith(f"{section}."))
    return f"did you mean {prefix}{there[0]}?" if there else ""


def _explain(detail: Any) -> str:
    # A union names the branch it tried ("str", "dict[str,...]"): noise for whoever typed a value.
    where = [str(part) for part in detail["loc"] if not str(part).startswith(("str", "dict["))]
    key, kind, value = ".".join(where), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        sections = Config.model_fields
        keys = {s: list(field.annotation.model_fields) for s, field in sections.items()}
        known = [*sections, *(f"{s}.{k}" for s, names in keys.items() for k in names)]
        here = ", ".join(keys.get(where[0], sections))
        return f"unknown key {key}={value!r}; {_nearest(key, known) or f'there are {here}'}"
    if kind == "missing":
        return f"{key} is missing; give --{key}=..., {_START}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return f"{key}={value!r}: {detail['msg']}"
