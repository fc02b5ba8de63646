"""Prompt lookup proposes what may come next from what a text itself has said before.

A step of decoding takes about as long for a few tokens as for one, since it reads the same weights.
So the model reads proposed tokens ahead and draws the next one after each: where it draws what was
proposed, it need not be asked again. What is written does not depend on what is proposed, as each
token is drawn from the model's own distribution, with the random key of its place. Sources:
arXiv:2211.17192 (speculative decoding), https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Sequence

import numpy as np

from scalegpt.data.calculator import Results

# Tokens at the end of a text that are searched for. Fewer than LEAST stand in any text, and reading
# what followed them costs more time than it saves.
LEAST, LONGEST = 3, 16


def proposed(text: np.ndarray, most: int) -> np.ndarray:
    """Return ids that may follow a text [T]: none, or `most` from where its end stood before.

    Of the places that share most tokens with its end, LEAST or more, the last one counts. From the
    text's end on, the proposed ids are repeated.
    """
    places, shared, best = np.flatnonzero(text[:-1] == text[-1]), 0, 0
    while len(places) and shared < LONGEST:
        best, shared = places[-1], shared + 1
        places = places[places >= shared]
        places = places[text[places - shared] == text[-shared - 1]]
    return np.resize(text[best + 1 :], most) if shared >= LEAST else text[:0]


class Growing:
    """A text that grows by `count` tokens, several at a time where they are as proposed."""

    def __init__(self, text: Sequence[int], count: int, most: int, results: Results | None):
        self.begun = self.length = len(text)
        self.full = len(text) + count
        self.ids = np.array([*text, *[0] * (count + most)], np.int32)  # with what is proposed
        self._most, self._results, self._must = most, results, None

    @property
    def new(self) -> int:
        return self.length - self.begun

    def add(self, drawn: Sequence[int]) -> None:
        """Add the ids that were drawn after the text and after each proposed token, as far as the
        tokens before them are right. Those of a calculator's results are certain."""
        for token in drawn[: self.full - self.length]:
            token = token if self._must is None else self._must
            proposal, self.ids[self.length] = self.ids[self.length], token
            self.length += 1
            self._must = self._results.add(token) if self._results else None
            if token != proposal:
                break

    def propose(self) -> bool:
        """Write proposed ids behind the text; return whether there are any."""
        ids = proposed(self.ids[: self.length], self._most)
        self.ids[self.length :][: len(ids)] = ids
        return len(ids) > 0 and self.length < self.full

    def end(self, before: int, length: int) -> np.ndarray:
        """Return `length` ids from the text's last on, after the `before` ids before that."""
        last = self.length - 1
        return np.pad(self.ids, (before, 0))[last : last + before + length]
