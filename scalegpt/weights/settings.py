"""What config.json of Hugging Face says of a model is checked key by key, as a format's table says.

The table is a subclass of `Settings`. Its fields are the keys that shape or change the computation;
all others of a file, such as use_cache or summary_type, change nothing here and are not looked at.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from scalegpt.config.loading import shown
from scalegpt.config.types import Positive
from scalegpt.errors import Mistake


class Settings(BaseModel):
    """The keys of every format; a field's type says which values our model has.

    A value that ours lacks is what a `Literal` leaves out. Types are strict: "12" is no number.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    vocab_size: Positive
    tie_word_embeddings: bool
    quantization_config: None = None

    @classmethod
    def read(cls, values: dict[str, Any], path: Path) -> Self:
        """Return the checked values of the file `path`. Raises Mistake, which names each that is
        missing, wrong or not ours."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_line(detail) for detail in error.errors()]
            raise Mistake(f"{path}: " + "\n  ".join(lines)) from None


def _line(detail: Any) -> str:
    """Return one line for one of pydantic's errors."""
    key, value = ".".join(map(str, detail["loc"])), shown(detail["input"])
    match detail["type"]:
        case "missing":
            return f"{key} is missing"
        case "literal_error":
            known = detail["ctx"]["expected"]
            return f"{key} is {value}, which our model has not; it has {known}"
        case "none_required":  # quantization_config
            return f"{key} is {value}: the weights are quantised; take them as they were before"
        case "value_error":
            return str(detail["ctx"]["error"])
    return f"{key} is {value}: {detail['msg']}"
