"""A reward says how good an answer is, from 0 to 1, by the example alone: f(example, answer).

An example has the right answer under "answer". Rewards are pure functions, so that every process
that has the same answers computes the same.
"""

import copy
import importlib
import json
import math
import re
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from scalegpt.errors import Mistake

Reward = Callable[[Mapping[str, Any], str], float]

# A minus after a digit or letter subtracts, or joins words.
_TEXT = r"((?:(?<![\w)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+))"
_NUMBER, _FINAL_NUMBER = re.compile(_TEXT), re.compile(rf"####\s*{_TEXT}")


def exact(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 for the right answer, whatever space is around it."""
    return float(answer.strip() == _right(example))


def in_place(example: Mapping[str, Any], answer: str) -> float:
    """Return the share of characters that are right and in their place, out of the longer text's.

    So an answer that is nearly right is better than one that is not, and only the right one has 1.
    """
    answer, right = answer.strip(), _right(example)
    same = sum(a == b for a, b in zip(answer, right, strict=False))
    return same / max(len(answer), len(right), 1)


def number(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the first number after "####" is the last one of the right answer.

    Numbers are compared by value, so 1,000.0 is 1000. The harness calls this "strict-match".
    """
    return float(_right_number(example) == stated(answer))


def last_number(example: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the last number is that of the right answer; the harness's "flexible-extract"."""
    return float(_right_number(example) == last(answer))


REWARDS: dict[str, Reward] = {f.__name__: f for f in (exact, in_place, number, last_number)}


def load(name: str) -> Reward:
    """Return a reward by its name, one of REWARDS or a user's "module:function".

    A user's is trusted: it runs in the training process as it is. Raises Mistake for one that is
    not there. The reward that is returned raises Mistake, with the example, where the function
    fails or does not return a finite number.
    """
    module, colon, function = name.partition(":")
    reward = _imported(module, function) if colon else REWARDS.get(name)
    if reward is None:
        raise Mistake(
            f"no reward {name!r}: there are {', '.join(REWARDS)}, and your own as module:function"
        )

    def checked(example: Mapping[str, Any], answer: str) -> float:
        try:
            # A copy, as a function that changes its example would change later updates, too.
            value = reward(copy.deepcopy(example), answer)
            if math.isfinite(value):
                return float(value)
            what = f"is {value}"
        except Exception as error:  # of a user's code, which may raise whatever it likes
            what = f"fails, {_cause(error)}"
        shown = json.dumps(example, ensure_ascii=False, default=str)
        raise Mistake(
            f"reward {name} {what}, of the answer {answer[:200]!r} to {shown[:500]}: it must "
            "return a finite number for every answer"
        )

    return checked


def _imported(module: str, function: str) -> Reward:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the module is the user's
        raise Mistake(
            f"cannot import {module!r}, of the reward {module}:{function}: {_cause(error)}; it "
            "is looked for in the current folder and among installed packages"
        ) from None
    reward = getattr(found, function, None)
    if not callable(reward):
        raise Mistake(f"{module} has no function {function!r}, as {module}:{function} says")
    return reward


def _cause(error: Exception) -> str:
    """Return an error with the line where it was raised."""
    if isinstance(error, Mistake):
        return str(error)
    (*_, frame) = traceback.extract_tb(error.__traceback__)
    where = "" if frame.filename[0] == "<" else f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _right(example: Mapping[str, Any]) -> str:
    if not isinstance(answer := example.get("answer"), str):
        raise Mistake('it has no text under "answer" to compare with')
    return answer.strip()


def _right_number(example: Mapping[str, Any]) -> Decimal:
    value = last(_right(example))
    if value is None:
        raise Mistake('there is no number in its "answer"')
    return value


def stated(text: str) -> Decimal | None:
    """Return the first number after "####", or None where there is none."""
    match = _FINAL_NUMBER.search(text)
    return _value(match[1]) if match else None


def last(text: str) -> Decimal | None:
    """Return the last number of a text, or None where there is none."""
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))
