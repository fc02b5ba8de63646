"""Prompts are questions without the answers that a run learns: it writes these itself.

A file has one example a line, JSON in one form: {"messages": [...], "answer": ..., ...}. The
messages end with the user's question; all else is for the reward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scalegpt.data import tokenizer
from scalegpt.data.chat import encode_prompt
from scalegpt.files import json_files

Example = dict[str, Any]  # messages: those of a prompt; answer: the text that is right


@dataclass(frozen=True, eq=False)
class Prompts:
    """The examples of a file: self[i] is one, self.ids(i) its prompt as int32 [n].

    longest: tokens of the longest prompt.
    """

    examples: list[Example] = field(repr=False)
    spec: dict[str, Any] | str
    longest: int

    @classmethod
    def read(cls, file: Path, spec: dict[str, Any] | str, longest: int) -> "Prompts":
        """Read a file that data/chat/prepare.py or data/tasks/prepare.py has written."""
        with file.open(encoding="utf-8") as lines:
            return cls([json_files.parse(line) for line in lines], spec, longest)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def ids(self, i: int) -> np.ndarray:
        """Return the ids of prompt i, after which a model writes its answer."""
        return encode_prompt(self._codec, self.examples[i]["messages"])

    @cached_property
    def _codec(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.spec)

    def __str__(self) -> str:
        return f"{len(self):,} prompts, the longest of {self.longest:,} tokens"
