"""JSON that somebody else has written: whatever is wrong with it is one ValueError."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake


def parse(text: str) -> Any:
    """The value in `text`. Raises ValueError for what is no JSON, or nested without an end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Mistake("it is nested too deeply") from None


def read_object(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a file. Raises ValueError, with `hint` as what to do about it."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}{hint}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise Mistake(f"{path} is not JSON: {error}{hint}") from None
    if not isinstance(values, dict):
        raise Mistake(f"{path} holds a {type(values).__name__}, not a JSON object{hint}")
    return values


def complete_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what a killed process tore."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            if math.isfinite(row["step"]) and math.isfinite(row.get("time", 0.0)):
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            continue
    return rows
