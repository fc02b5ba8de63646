"""From YAML and `--section.key=value` to a validated run; a mistake becomes one clear line."""

import argparse
import difflib
import errno
import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from scalegpt import peers, yaml_files
from scalegpt.config import Config, DataConfig, EvalConfig
from scalegpt.line import FAILED, USERS_MISTAKE

Main = Callable[[list[str]], int]
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
                errno.ENAMETOOLONG}  # fmt: skip
_OURS = {Path(__file__).resolve().parent}  # and the folder of the script that runs
# What a union calls the branches it tried.
_BRANCHES = ("str", "dict[", "function-", "constrained-str")
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 200, 200, 60
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 2, 4, 4
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
    for section, key in (("data", "path"), ("eval", "tasks")):
        if isinstance(given := overrides.get(section), dict) and key in given:
            overrides[section] = {**given, key: _mapping(f"--{section}.{key}", given[key])}
    values = {} if flag_values.config is None else load(flag_values.config)
    for section, keys in (defaults or {}).items():
        if isinstance(stored := values.get(section, {}), dict):
            values[section] = {**keys, **stored}
    for section, keys in overrides.items():
        stored = values.get(section, {})
        if isinstance(stored, dict):  # else the file is wrong, which validate will say
            values[section] = {**stored, **keys} if isinstance(keys, dict) else keys
    source = "this command line"
    if flag_values.config:
        source = f"{flag_values.config} with {source}" if overrides else flag_values.config
    return validate(values, source), flag_values


def load(path: str | Path) -> dict[str, Any]:
    """The sections in a YAML file, not yet validated. Raises ValueError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        known = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        near = difflib.get_close_matches(str(path), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "scalegpt's own configs are in configs/"
        raise ValueError(f"cannot read config {path}: {error.strerror}; {hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is not UTF-8 text: {error}") from None
    except ValueError as error:  # a path with a NUL in it
        raise ValueError(f"cannot read config {str(path)!r}: {error}") from None
    try:
        values = yaml_files.parse(text)
    except ValueError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from None
    if values is None:  # an empty file
        values = {}
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


def run(main: Main) -> NoReturn:
    """A command's last line: exit with what `exit_code` says."""
    # A terminal without UTF-8 shows "?" for what it has not; a model may write any character.
    sys.stdout.reconfigure(errors="replace")
    sys.exit(exit_code(main, sys.argv[1:]))


def exit_code(main: Main, argv: list[str]) -> int:
    """main's own, or 2 and one message on stderr for a user's mistake.

    Only a ValueError that scalegpt or the command's own script raised is a user's mistake, or a
    disk that is full or not to be written; any other is a fault of ours and keeps its traceback.
    """
    _OURS.add(Path(main.__code__.co_filename).resolve().parent)
    try:
        code = main(argv)
        peers.farewell(code)
        return code
    except SystemExit:
        raise
    except BaseException as error:
        fail(error)
        if isinstance(error, BrokenPipeError):  # else Python would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if (code := _code(error)) == FAILED:
            raise
        _show(error, code)
        return code


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
    text = _message(error) if code == USERS_MISTAKE else f"{type(error).__name__}: {error}"
    peers.leave(code, text, said=True)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130  # as the shell calls a process that Ctrl-C ended
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
        return 141
    if isinstance(error, ValueError):
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if raised_in.parent in _OURS:
            return USERS_MISTAKE
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return USERS_MISTAKE
    return FAILED


def _show(error: BaseException, code: int) -> None:
    if code == USERS_MISTAKE:
        print(f"error: {_message(error)}", file=sys.stderr, flush=True)
    elif code == FAILED:
        traceback.print_exception(error)
    elif code == 130:
        print("\ninterrupted", file=sys.stderr)


def _message(error: BaseException) -> str:
    """Of a bounded size, whatever a user has typed or a file holds."""
    text = str(error)
    if isinstance(error, OSError):
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        text = f"{what}; free some room, or choose another folder"
    lines = [x if len(x) <= 1000 else f"{x[:500]} ... {x[-400:]}" for x in text.splitlines()]
    if len(lines) > 40:
        lines[30:-5] = [f"... {len(lines) - 35} more lines ..."]
    return "\n".join(lines)


class _DataOnCommandLine(DataConfig):
    path: str
    """folder or URL with train.bin, val.bin, meta.json; or a mixture '{path: weight, ...}'"""


class _EvalOnCommandLine(EvalConfig):
    tasks: str = "{}"
    """also score these, '{task: jsonl file}'; see `python -m scalegpt.evaluate --help`"""


class _CommandLine(Config, BaseSettings):
    """Config as pydantic-settings wants it for a command line; nothing reads the environment."""

    # Of a type that may be a dictionary it would split "lang=en" and quote "C:\text".
    data: _DataOnCommandLine
    eval: _EvalOnCommandLine = _EvalOnCommandLine()
    model_config = SettingsConfigDict(extra="forbid", nested_model_default_partial_update=True)


class Parser(argparse.ArgumentParser):
    """Of every command: a mistake is one line, without the usage of all flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses an empty name, and a name given twice: it would be taken for both, and argparse
        would drop the first in silence. Of numbers, choices and configuration keys the later wins.
        """
        given: dict[str, str] = {}
        args = list(sys.argv[1:] if args is None else args)
        for word, following in zip(args, [*args[1:], None], strict=False):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            text = getattr(action, "type", None) in (None, os.path.expanduser)
            if type(action) is not argparse._StoreAction or action.choices or not text:
                continue
            if "." in name:  # a key, whose type tells
                continue
            value = value if equals else following
            if name in given:
                raise ValueError(f"{name} is given twice, as {given[name]!r} and {value!r}")
            if value == "":
                raise ValueError(f"{name}='' is empty; give a value, or leave it out")
            given[name] = value
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """A ValueError like every other mistake, naming the nearest flag."""
        if message.startswith("unrecognized arguments: "):
            flag = (message.removeprefix("unrecognized arguments: ").split() or ["''"])[0]
            known = [name.removeprefix("--") for name in self._option_string_actions]
            near = _nearest(flag.split("=")[0].removeprefix("--"), known, "--")
            raise ValueError(f"unknown argument {flag}; {near or 'see --help'}")
        if message.endswith("expected one argument"):
            message += "; where its value begins with -, write FLAG=VALUE"
        raise ValueError(f"{message}; see --help")


def _mapping(flag: str, value: Any) -> Any:
    """The value of a flag that may be "{name: value, ...}", as in a file."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return yaml_files.parse(value)
    except ValueError as error:
        raise ValueError(f"{flag}={value} is not {{name: value, ...}}: {error}") from None


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
    where = [str(part) for part in detail["loc"] if not str(part).startswith(_BRANCHES)]
    key, kind, value = ".".join(where), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        sections = Config.model_fields
        keys = {s: list(field.annotation.model_fields) for s, field in sections.items()}
        known = [*sections, *(f"{s}.{k}" for s, names in keys.items() for k in names)]
        here = ", ".join(keys.get(where[0], sections))
        return f"unknown key {key}={_shown(value)}; {_nearest(key, known) or f'there are {here}'}"
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
