"""The one exception of a user's mistake, and how messages count."""


class Mistake(ValueError):
    """A mistake of the user, as a wrong key or a missing file; commands print it without traceback.

    The message says what is wrong, the offending value and what to do. A ValueError that is not a
    Mistake is a fault of scalegpt or of a library, and keeps its traceback.
    """


def counted(n: int, noun: str) -> str:
    """Return a number of things in words: "1 token", "2,000 tokens"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
