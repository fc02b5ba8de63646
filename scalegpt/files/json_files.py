"""JSON from elsewhere is read so that whatever is wrong with it is one message to the user."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake
from scalegpt.files.formats import stand_in


def parse(text: str) -> Any:
    """Return the value in `text`. Raises ValueError for invalid JSON, or JSON nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Mistake("it is nested too deeply") from None


def read_object(path: Path, hint: str = "") -> dict[str, Any]:
    """Return the JSON object in a file. Raises Mistake, ending with `hint`: what to do about it."""
    try:
        values = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}{hint}") from None
    except ValueError as error:  # of JSON or of UTF-8
        what = stand_in(path)
        raise Mistake(f"{path} is not JSON: {f'it is {what}' if what else error}{hint}") from None
    if not isinstance(values, dict):
        raise Mistake(f"{path} holds a {type(values).__name__}, not a JSON object{hint}")
    return values


def complete_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without lines that a killed process left half-written."""
    rows = []
    for line in lines:
        try:
            row = parse(line)
            if math.isfinite(row["step"]) and math.isfinite(row.get("time", 0.0)):
                # json makes each row's keys anew; a million rows share them.
                rows.append({sys.intern(key): value for key, value in row.items()})
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return rows
