"""`--section.key=value` and flags become a validated run; each mistake becomes one clear line."""

import argparse
import json
from typing import Any

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from scalegpt.config import BatchConfig, Config, DataConfig, EvalConfig, ModelConfig, RunConfig
from scalegpt.config.loading import load, parse_yaml, with_overrides
from scalegpt.config.parser import Parser
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
    """folder or URL of a data set (data/README.md); or a mixture '{path: weight, ...}'"""


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


def _mapping(flag: str, value: Any) -> Any:
    """Return a flag's value; "{name: value, ...}" becomes a dictionary, as in a YAML file."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return parse_yaml(value)
    except ValueError as error:
        raise Mistake(f"{flag}={value} is not {{name: value, ...}}: {error}") from None
