"""The kinds of values that a configuration has, with limits that hold wherever they are used."""

import math
import os.path
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


LARGEST = 2**31 - 1  # JAX counts in int32
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
MeshAxis = Annotated[int, Field(ge=-1, le=LARGEST)]  # -1: what is left
Width = Annotated[int, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Share


def _plain(text: str) -> str:
    """Such names are those of files and logs, where control characters are a trap."""
    if bad := [c for c in text if unicodedata.category(c) in ("Cc", "Cs")]:
        said = "holds the character {character}, which is no part of a name"
        raise PydanticCustomError("plain", said, {"character": repr(bad[0])})
    return text


def checkpoint(text: str) -> str:
    """Which of a run's checkpoints."""
    if text in ("best", "latest") or (text.isdecimal() and text.isascii() and len(text) <= 10):
        return text
    raise PydanticCustomError("checkpoint", "is not best, latest or the number of a step")


def _named(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("name", "is blank; give a name, or leave the key out")
    return text


Text = Annotated[str, AfterValidator(_plain)]
Which = Annotated[str, AfterValidator(checkpoint)]
Name = Annotated[Text, AfterValidator(_named)]  # of a file, a folder, a project
# A shell leaves the "~" of --key=~/runs as it is, and rm -r of a folder "~" is a trap.
Place = Annotated[Name, AfterValidator(os.path.expanduser)]


def divisors(n: int) -> list[int]:
    """In order, by trial up to the root: n may be what somebody has mistyped."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def divisors_near(n: int, wanted: int) -> str:
    near = sorted(divisors(n), key=lambda d: abs(d - wanted))
    return " or ".join(str(d) for d in sorted(near[:2]))
