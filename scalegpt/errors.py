"""The one exception of a user's mistake."""


class Mistake(ValueError):
    """A mistake of the user, as a wrong key or a missing file; commands print it without traceback.

    The message says what is wrong, the offending value and what to do. A ValueError that is not a
    Mistake is a fault of scalegpt or of a library, and keeps its traceback.
    """
