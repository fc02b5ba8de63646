"""These types of configuration values carry limits that hold for every key of that type."""

import math
import os
import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from scalegpt.config.limits import LARGEST


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors, and a key's docstring is its `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def number(value: Any) -> Any:
    """Return the number that a text like "1e5" means, or else `value` itself.

    YAML and a command line leave it a text, and pydantic takes no such text for a whole number.
    """
    like_one = r"[0-9]+(\.[0-9]*)?[eE]\+?[0-9]{1,2}"
    return float(value) if isinstance(value, str) and re.fullmatch(like_one, value) else value


Integer = Annotated[int, BeforeValidator(number)]
Positive = Annotated[Integer, Field(ge=1, le=LARGEST)]
Whole = Annotated[Integer, Field(ge=0, le=LARGEST)]
MeshAxis = Annotated[Integer, Field(ge=-1, le=LARGEST)]  # -1: all devices that are left
Width = Annotated[Integer, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Share


def _plain(text: str) -> str:
    """Refuse control characters, which hide in the names of files and in logs."""
    if bad := [c for c in text if unicodedata.category(c) in ("Cc", "Cs")]:
        message = "holds the character {character}, which is no part of a name"
        raise PydanticCustomError("plain", message, {"character": repr(bad[0])})
    return text


def checkpoint(text: str) -> str:
    """Return `text` if it chooses a checkpoint: best, latest or a step; raise pydantic's error."""
    if text in ("best", "latest") or (text.isdecimal() and text.isascii() and len(text) <= 10):
        return text
    raise PydanticCustomError("checkpoint", "is not best, latest or the number of a step")


def _named(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("name", "is blank; give a name, or leave the key out")
    return text


def _expanded(text: str) -> str:
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise PydanticCustomError("home", "is in a home folder that is not known here")
    return path


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Text = Annotated[str, BeforeValidator(_path), AfterValidator(_plain)]
Which = Annotated[str, AfterValidator(checkpoint)]
Name = Annotated[Text, AfterValidator(_named)]  # of a file, a folder, a project
# A shell does not expand "~" in --key=~/runs, and a folder named "~" invites rm -r ~.
Place = Annotated[Name, AfterValidator(_expanded)]


def divisors(n: int) -> list[int]:
    """Return the divisors of n in order, in sqrt(n) steps: a mistyped n may be huge."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def divisors_near(n: int, wanted: int) -> str:
    """Return the two divisors of n nearest to `wanted`, for a message: "6 or 8"."""
    near = sorted(divisors(n), key=lambda d: abs(d - wanted))
    return " or ".join(str(d) for d in sorted(near[:2]))
