"""The standard streams of a command, which may be closed, on a full disk, or read by nobody."""

import contextlib
import io
import logging
import os
import select
import sys
from typing import TextIO

from scalegpt.errors import Mistake

_PATIENCE = 10.0  # seconds
_PIECE = getattr(select, "PIPE_BUF", 512)  # bytes that a pipe which is ready takes without waiting


def offer(number: int, data: bytes, patience: float = _PATIENCE) -> bool:
    """Write what a file descriptor takes and drop the rest; return whether it took all.

    It takes nothing more after an error, or when nobody reads it for `patience` seconds.
    """
    with contextlib.suppress(OSError):
        while data:
            # Windows can ask sockets only.
            if os.name != "nt" and not select.select([], [number], [], patience)[1]:
                return False
            data = data[os.write(number, data[:_PIECE]) :]
    return not data


class Output(io.FileIO):
    """Standard output or error, below Python's buffers.

    essential: an error raises BrokenPipeError or Mistake, once. Otherwise what cannot be written is
    dropped, for a run must not end, nor wait for long, because of what it prints.
    """

    def __init__(self, number: int, essential: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.essential, self._patience = essential, _PATIENCE

    def write(self, data: bytes) -> int:
        if not self.essential:
            taken = offer(self.fileno(), bytes(data), self._patience)
            self._patience = _PATIENCE if taken else 0
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.essential = False  # Python tries once more when it ends
            if isinstance(error, BrokenPipeError):
                raise
            raise Mistake(f"cannot write to standard output: {error.strerror}") from None


def prepare(essential: bool) -> None:
    """Put standard output and error on `Output`, and open those of the three that are closed.

    Without that the next file that is opened would take the place of a closed one, and what is
    printed would be written into it. Streams that a caller has put in their place stay.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(0)
    # A model may write any character. A terminal without UTF-8 shows "?" for those it lacks.
    for name, number, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        lines = stream is not None and (stream.line_buffering or stream.write_through)
        buffer = io.BufferedWriter(Output(number, essential and name == "stdout"))
        encoding = stream and stream.encoding
        put(name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=lines))


def put(name: str, stream: TextIO) -> TextIO:
    """Put a stream in the place of sys.stdout or sys.stderr, and return what was there.

    The handlers of Python's logs that write there follow: the import of Orbax makes one.
    """
    before = getattr(sys, name)
    setattr(sys, name, stream)
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(stream)
    return before


_CONTROL = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    """Spell the control characters of a text, as \\x1b, which a terminal would obey."""
    return text.translate(_CONTROL)


def make_optional() -> None:
    """From here on, drop what standard output does not take: results are kept elsewhere."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Output):
        raw.essential = False
