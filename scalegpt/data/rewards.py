"""A reward says how good an answer is, from 0 to 1, by the example alone: f(example, answer).

An example has the right answer under "answer". Rewards are pure functions, so that every process
that has the same answers computes the same.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# A minus after a digit or letter subtracts, or joins words.
_TEXT = r"((?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+))"
_NUMBER, _FINAL_NUMBER = re.compile(_TEXT), re.compile(rf"####\s*{_TEXT}")


def exact(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 for the right answer, whatever space is around it."""
    return float(answer.strip() == example["answer"].strip())


def number(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the first number after "####" is the last one of the right answer.

    Numbers are compared by value, so 1,000.0 is 1000. The harness calls this "strict-match".
    """
    stated = _FINAL_NUMBER.search(answer)
    return float(stated is not None and _value(stated[1]) == last(example["answer"]))


def last_number(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the last number is that of the right answer; the harness's "flexible-extract"."""
    value = last(answer)
    return float(value is not None and value == last(example["answer"]))


def last(text: str) -> Decimal | None:
    """Return the last number of a text, or None where there is none."""
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))
