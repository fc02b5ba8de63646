"""A task's file has one example a line, and whatever is wrong with a line is one message."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake
from scalegpt.files import json_files
from scalegpt.files.text_files import read_text


class Fields:
    """The fields of a line's JSON object, by type; a missing or wrong one raises Mistake."""

    def __init__(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise Mistake(f"it holds a {type(row).__name__}, not an object")
        self._row = row

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def text(self, *names: str) -> str:
        name, value = self._find(names)
        if not isinstance(value, str):
            raise Mistake(f"{name} is {value!r}, not a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._find((name,))[1]
        if (
            not isinstance(value, list)
            or len(value) < 2
            or not all(isinstance(text, str) for text in value)
        ):
            raise Mistake(f"{name} is {value!r}, not a list of two texts or more")
        return value

    def index(self, choices: list[str], *names: str) -> int:
        name, value = self._find(names)
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if type(number) is not int or not 0 <= number < len(choices):
            raise Mistake(f"{name} is {value!r}, not the index of one of {len(choices)} choices")
        return number

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if name in self._row:
                return name, self._row[name]
        present = ", ".join(map(repr, self._row)) or "nothing"
        raise Mistake(f"it has no {' or '.join(map(repr, names))}, only {present}")


def read(path: str | Path, name: str, parse: Callable[[Fields], Any]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line with an example, from 1, and what `parse` makes of its fields.

    name: the task's. Raises Mistake, with file and line, for a line that is no JSON object or that
    `parse` refuses, and for a file without examples.
    """
    empty = True
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            empty = False
            with named(path, number, name):
                example = parse(Fields(_value(line)))
            yield number, example
    if empty:
        raise Mistake(f"{path} is empty")


@contextmanager
def named(path: str | Path, number: int, name: str) -> Iterator[None]:
    """Say of which line a mistake is."""
    try:
        yield
    except ValueError as error:
        raise Mistake(f"{path}, line {number}, is no example of {name}: {error}") from None


def _value(line: str) -> Any:
    try:
        return json_files.parse(line)
    except ValueError as error:
        raise Mistake(f"not JSON: {error}") from None
