"""`--section.key=value` and flags become a validated run; each mistake becomes one clear line."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from scalegpt.config import BatchConfig, Config, DataConfig, EvalConfig, ModelConfig, RunConfig
from scalegpt.config.architectures import GPT2_SIZES
from scalegpt.config.loading import load, nearest, parse_yaml, with_overrides
from scalegpt.config.predecessors import advice
from scalegpt.config.presets import own_configs
from scalegpt.errors import Mistake


def parse(
    argv: list[str],
    prog: str,
    flags: dict[str, dict[str, Any]],
    defaults: dict[str, dict[str, Any]] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Return the run that a command line describes, and the values of the command's own flags.

    flags: name -> keywords of argparse's `add_argument`. Later sources win over earlier ones:
    Config's defaults, `defaults` (section -> key -> value), `--config FILE`, `--section.key=value`.
    Raises Mistake with one line for each mistake.
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
    mappings = ("model.rope_scaling", "data.path", "eval.tasks", "batch.growth")
    for section, _, key in (name.partition(".") for name in mappings):
        if isinstance(keys := overrides.get(section), dict) and key in keys:
            overrides[section] = {**keys, key: _mapping(f"--{section}.{key}", keys[key])}
    values = {} if flag_values.config is None else load(flag_values.config)
    for section, keys in (defaults or {}).items():
        if isinstance(stored := values.get(section, {}), dict):
            values[section] = {**keys, **stored}
    source = "this command line"
    if flag_values.config:
        source = f"{flag_values.config} with {source}" if overrides else flag_values.config
    return with_overrides(values, overrides, source), flag_values


def text_of(value: Any) -> str:
    """Write a value for a command line, where `parse` reads JSON's true, null and {...}."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


class _ModelOnCommandLine(ModelConfig):
    rope_scaling: str | None = None
    """with rope: slower rotations for texts longer than before, '{rope_type: linear, llama3 or
    yarn, factor: ...}' with the keys of transformers"""


class _BatchOnCommandLine(BatchConfig):
    growth: str = "{}"
    """later batches, '{update: sequences, ...}': from that update on, each has so many sequences"""


class _DataOnCommandLine(DataConfig):
    path: str
    """folder or URL with train.bin, val.bin, meta.json; or a mixture '{path: weight, ...}'"""


class _EvalOnCommandLine(EvalConfig):
    tasks: str = "{}"
    """also score these, '{task: jsonl file}', or null for one without a file; see
    `python -m scalegpt.evaluate --help`"""


class _RunOnCommandLine(RunConfig):
    allow_config_change: str = "false"
    """true, or the keys that may differ from the stored run's, as optim.steps,data.path"""


class _CommandLine(Config, BaseSettings):
    """Config in the form that pydantic-settings parses; environment variables are not read."""

    # Texts here, because pydantic-settings would split "lang=en" and quote "C:\text" for a key
    # that may be a dictionary; `_mapping` makes the dictionary.
    model: _ModelOnCommandLine = _ModelOnCommandLine()
    batch: _BatchOnCommandLine = _BatchOnCommandLine()
    data: _DataOnCommandLine
    eval: _EvalOnCommandLine = _EvalOnCommandLine()
    run: _RunOnCommandLine
    model_config = SettingsConfigDict(extra="forbid", nested_model_default_partial_update=True)


class Parser(argparse.ArgumentParser):
    """Every command parses its flags with this; a mistake is one line, not the usage of all."""

    _unknown: Sequence[str] = ()  # words of the last command line that no flag takes

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse a text flag that is empty or given twice; argparse would silently keep the last.

        For numbers, choices and configuration keys the last one wins.
        """
        given: dict[str, str] = {}
        args = list(sys.argv[1:] if args is None else args)
        for word, following in zip(args, [*args[1:], None], strict=False):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            text = getattr(action, "type", None) in (None, os.path.expanduser)
            if type(action) is not argparse._StoreAction or action.choices or not text:
                continue
            if "." in name:  # a configuration key, which pydantic checks
                continue
            value = value if equals else following
            if name in given:
                raise Mistake(f"{name} is given twice, as {given[name]!r} and {value!r}")
            if value == "":
                raise Mistake(f"{name}='' is empty; give a value, or leave it out")
            given[name] = value
        # First without what is required: that something is unknown says more than that, say, --run
        # is missing.
        required = [x for x in (*self._mutually_exclusive_groups, *self._actions) if x.required]
        for part in required:
            part.required = False
        try:
            self._unknown = super().parse_known_args(args)[1]
        finally:
            for part in required:
                part.required = True
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise Mistake, naming the nearest flag, where argparse would print its usage and exit."""
        # A word after an unknown flag is its value.
        pairs = zip(["", *self._unknown], self._unknown, strict=False)
        unknown = [
            word
            for before, word in pairs
            if word.startswith("-") or not before.startswith("--") or "=" in before
        ]
        if message.startswith("unrecognized arguments") or ("required" in message and unknown):
            lines = [f"unknown argument {w or repr(w)}; {self._near(w)}" for w in unknown]
            raise Mistake("\n  ".join(lines))
        if message.endswith("expected one argument"):
            message += "; where its value begins with -, write FLAG=VALUE"
        raise Mistake(f"{message}; see --help")

    def _near(self, word: str) -> str:
        """Return a clause that says what to type instead of an unknown word."""
        known = [name.removeprefix("--") for name in self._option_string_actions]
        if word.endswith(".py"):
            return advice("config/x.py", known) or "see --help"
        if not word.startswith("-"):
            if flag := _flag_for(word, known):
                return f"did you mean {flag}?"
        return nearest(word.removeprefix("--"), known, "--") or "see --help"


def _flag_for(word: str, known: list[str]) -> str:
    """Return a flag with `word` as its value, or with what `word` stands for; or ""."""
    if "run.out_dir" in known:  # a command that takes a configuration
        names = (
            [word]
            if word.endswith((".yaml", ".yml"))
            else difflib.get_close_matches(word, own_configs())
        )
        return f"--config {names[0]}" if names else ""
    if "run" not in known:
        return ""
    if word in GPT2_SIZES:
        return f"--hf {word}"
    try:
        section = load(word).get("run")
    except Mistake:  # it is no config
        if "/" in word or Path(word).is_dir():
            return f"--run {word}"
        return f"--prompt {shlex.quote(word)}" if "prompt" in known else ""
    run = section if isinstance(section, dict) else {}
    if "init_from" in run and "config" in known:
        return f"--config {word}"
    return f"--run {run.get('out_dir', word)}"


def _mapping(flag: str, value: Any) -> Any:
    """Return a flag's value; "{name: value, ...}" becomes a dictionary, as in a YAML file."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return parse_yaml(value)
    except ValueError as error:
        raise Mistake(f"{flag}={value} is not {{name: value, ...}}: {error}") from None
