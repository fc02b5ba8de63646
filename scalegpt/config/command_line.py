"""From `--section.key=value` and flags to a validated run; a mistake becomes one clear line."""

import argparse
import os
import sys
from typing import Any, NoReturn

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from scalegpt.config import Config, DataConfig, EvalConfig
from scalegpt.config.loading import load, nearest, parse_yaml, validate
from scalegpt.errors import Mistake


def parse(
    argv: list[str],
    prog: str,
    flags: dict[str, dict[str, Any]],
    defaults: dict[str, dict[str, Any]] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Command line -> the run and the values of `flags` (name -> keywords of `add_argument`).

    Later wins: Config's defaults, then `defaults` (section -> key -> value), then `--config FILE`,
    then `--section.key=value`. Raises ValueError with one line for each mistake.
    """
    parser = Parser(prog=prog, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of one in configs/"
    )
    for name, keywords in flags.items():
        parser.add_argument(name, **keywords)
    try:
        source = CliSettingsSource(
            _CommandLine, root_parser=parser, cli_parse_args=argv, cli_hide_none_type=True
        )
        overrides, flag_values = source(), parser.parse_args(argv)
    except SettingsError as error:
        raise Mistake(f"{error}; write --section.key=value, one for each key") from None
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
                raise Mistake(f"{name} is given twice, as {given[name]!r} and {value!r}")
            if value == "":
                raise Mistake(f"{name}='' is empty; give a value, or leave it out")
            given[name] = value
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """A ValueError like every other mistake, naming the nearest flag."""
        if message.startswith("unrecognized arguments: "):
            flag = (message.removeprefix("unrecognized arguments: ").split() or ["''"])[0]
            known = [name.removeprefix("--") for name in self._option_string_actions]
            near = nearest(flag.split("=")[0].removeprefix("--"), known, "--")
            raise Mistake(f"unknown argument {flag}; {near or 'see --help'}")
        if message.endswith("expected one argument"):
            message += "; where its value begins with -, write FLAG=VALUE"
        raise Mistake(f"{message}; see --help")


def _mapping(flag: str, value: Any) -> Any:
    """The value of a flag that may be "{name: value, ...}", as in a file."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return parse_yaml(value)
    except ValueError as error:
        raise Mistake(f"{flag}={value} is not {{name: value, ...}}: {error}") from None
