"""Questions whose answers can be checked: reverse a word, sort digits, add, spell, count letters.

They are made up, words included, so that there are as many as one wants and none needs a file. A
hash of what a question is about, such as its word, decides whether it is for training or for tests;
so no word of a test was seen in training, in whatever task.
"""

import random
import string
from collections.abc import Callable

from scalegpt.data.prepare import stable_fraction
from scalegpt.data.prompts import Example
from scalegpt.errors import Mistake

TEST_SHARE = 0.1  # of all words, digits and sums
# Parts of syllables, which make words that can be pronounced.
_ONSETS = (
    *("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "qu", "r", "s", "t", "v", "w"),
    *("y", "z", "bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "sp", "st", "tr"),
)
_VOWELS = (*"aeiou" * 3, "y", "ai", "ea", "ee", "oo", "ou")
_CODAS = (*("",) * 20, *"bdgklmnprstx", "ck", "ll", "nd", "rr", "rt", "ss", "st", "tt")


def examples(task: str, seed: int, count: int, split: str = "train") -> list[Example]:
    """Return the first `count` examples of a task, one of TASKS; more of them begin with these.

    split: "train" or "test". They are the same on every machine. Raises Mistake for another task.
    """
    return [example(task, seed, index, split) for index in range(count)]


def example(task: str, seed: int, index: int, split: str = "train") -> Example:
    """Return one of the examples that `examples` lists. Raises Mistake as `examples`."""
    if task not in TASKS:
        raise Mistake(f"no task {task!r}: there are {', '.join(TASKS)}")
    rng = random.Random(f"{task} {split} {seed} {index}")
    while True:
        subject, question, answer = TASKS[task](rng)
        if (stable_fraction(subject) < TEST_SHARE) == (split == "test"):
            return {"messages": [{"role": "user", "content": question}], "answer": answer}


def _word(rng: random.Random) -> str:
    """Return a word of 3 to 8 letters."""
    while True:
        syllables = range(rng.choice((1, 2, 2, 3)))
        word = "".join(
            part for _ in syllables for part in map(rng.choice, (_ONSETS, _VOWELS, _CODAS))
        )
        word = word[rng.random() < 0.15 :]  # some begin with their second letter, as a vowel
        if 3 <= len(word) <= 8:
            return word


def _reverse(rng: random.Random) -> tuple[str, str, str]:
    word = _word(rng)
    return word, f"Reverse the word {word}.", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str, str]:
    digits = "".join(rng.choice(string.digits) for _ in range(rng.choice(range(3, 9))))
    return digits, f"Sort the digits {digits}.", "".join(sorted(digits))


def _add(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.choice(range(100)), rng.choice(range(100))
    return f"{min(a, b)}+{max(a, b)}", f"What is {a} + {b}?", str(a + b)


def _spell(rng: random.Random) -> tuple[str, str, str]:
    word = _word(rng)
    return word, f"Spell the word {word}.", "-".join(word)


def _count(rng: random.Random) -> tuple[str, str, str]:
    some = rng.choice((0, 1, 2))  # most letters are there once, so that "1" would mostly be right
    letters: list[str] = []
    while not letters:
        word = _word(rng)
        letters = [c for c in string.ascii_lowercase if min(word.count(c), 2) == some]
    letter = rng.choice(letters)
    return word, f"How many {letter} are in {word}?", str(word.count(letter))


# Name -> a function to what the question is about, the question and its answer.
TASKS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
    "spell": _spell,
    "count": _count,
}
