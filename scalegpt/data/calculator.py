"""A calculator answers the calls in a model's answers: <|call|>12/60<|result|>0.2<|back|>.

Whoever talks with a model decides what is calculated, so that nothing here is ever run as Python:
an expression is taken apart, and only numbers, + - * / // % **, parentheses and 'word'.count('a')
are understood. Its length and its numbers are bounded, and with them time and memory.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

from scalegpt.data.tokenizer import Tokenizer
from scalegpt.errors import Mistake

MOST_CHARACTERS = 200
LARGEST = 10**30
LARGEST_EXPONENT = 100
DIGITS = 10  # that a result has, unless it is a whole number
_GROUPS = re.compile(r"(?<=\d),(?=\d\d\d)")  # of digits, as in 1,000
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(text: str) -> str:
    """Return the value of an expression: 12/60 is 0.2, and 48/2 is 24.

    Numbers are exact, so 1.1*3 is 3.3. Raises Mistake for what is no such expression or too large.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise Mistake(f"it has {len(text):,} characters, at most {MOST_CHARACTERS} are read")
        tree = ast.parse(_GROUPS.sub("", text).replace("$", "").strip(), mode="eval")
        return _written(_value(tree.body))
    except Mistake as error:
        raise Mistake(f"cannot calculate {text[:60]!r}: {error}") from None
    except ZeroDivisionError:
        raise Mistake(f"cannot calculate {text[:60]!r}: it divides by 0") from None
    except OverflowError:  # of a power of floats
        raise Mistake(f"cannot calculate {text[:60]!r}: a number is too large") from None
    # Python's own parser refuses what is no expression, or nested too deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Mistake(f"cannot calculate {text[:60]!r}: it is no expression") from None


class Results:
    """Results of the calls in one answer, which are written for the model, token by token."""

    def __init__(self, codec: Tokenizer):
        self._codec = codec
        self._call: list[int] | None = None  # ids since <|call|>
        self._next: list[int] = []

    def add(self, token: int) -> int | None:
        """Return which id has to follow the id that an answer has got, or None for any.

        After <|result|> these are the ids of the value and <|back|>; of a call that cannot be
        calculated, <|back|> alone.
        """
        marks = self._codec.marks
        if token == marks["call"]:
            self._call = []
        elif token == marks["result"] and self._call is not None:
            try:
                value = self._codec.encode(calculate(self._codec.decode(self._call))).tolist()
            except Mistake:
                value = []
            self._next, self._call = [*value, marks["back"]], None
        elif self._call is not None:
            self._call.append(token)
        return self._next.pop(0) if self._next else None


def _value(node: ast.expr) -> Fraction:
    """Return the value of a part of an expression. Raises Mistake for what is not understood."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if not abs(number) <= LARGEST:  # nor is it inf
                raise Mistake(f"a number is larger than {LARGEST:.0e}")
            return Fraction(repr(number))  # of 0.1 a tenth, not the float nearest to it
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(Fraction(_OPERATORS[type(op)](_value(left), _value(right))))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(word)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return Fraction(word.count(part))
    raise Mistake("only numbers, + - * / // % **, ( ) and 'word'.count('a') are understood")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if abs(exponent) > LARGEST_EXPONENT:
        raise Mistake(f"the exponent {_written(exponent)} is larger than {LARGEST_EXPONENT}")
    if exponent.denominator == 1:
        return base ** int(exponent)
    if base < 0:
        raise Mistake("a root of a number below 0 is no number")
    return Fraction(repr(float(base) ** float(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > LARGEST or value.denominator > LARGEST**2:
        raise Mistake(f"a number is larger than {LARGEST:.0e}, or as near to 0")
    return value


def _written(value: Fraction) -> str:
    """Return a number in decimals, rounded to DIGITS; 24, not 24.0."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext(prec=DIGITS):
        return f"{(Decimal(value.numerator) / Decimal(value.denominator)).normalize():f}"
