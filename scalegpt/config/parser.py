"""A parser of flags makes each mistake one clear line; to import it is quick, without pydantic."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from scalegpt.config.architectures import GPT2_SIZES
from scalegpt.config.predecessors import advice, nearest
from scalegpt.config.presets import own_configs
from scalegpt.errors import Mistake


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
    from scalegpt.config.loading import load  # after a mistake only: pydantic takes long to import

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
