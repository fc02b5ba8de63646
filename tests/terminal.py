"""A terminal of 80 columns: what a person sees of what a program writes."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence

COLUMNS = 80
PIECE = re.compile(r"\x1b\[(\d*)([AK])|([^\x1b])", re.DOTALL)


class Screen(io.StringIO):
    """A stream to a terminal, within this process."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return shown(self.getvalue())


def shown(text: str) -> list[str]:
    """The lines that are on the terminal, and above it, after this text."""
    lines, row, column = [[]], 0, 0

    def down() -> int:
        if row + 1 == len(lines):
            lines.append([])
        return row + 1

    for count, command, character in PIECE.findall(text):
        if command == "A":
            row = max(0, row - int(count or 1))
        elif command == "K":
            del lines[row][column:]
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = down(), 0
        else:
            if column == COLUMNS:
                row, column = down(), 0
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


def run(command: Sequence[str], watch: Callable[[str, int], None]) -> tuple[int, str]:
    """Run a command on a terminal of its own; return its exit code and what it has written.

    watch: called again and again with all that it has written so far, and the terminal's own end.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C is a signal
    )
    os.close(its)
    written = b""
    try:
        while more := os.read(ours, 1 << 16):
            written += more
            watch(written.decode(errors="replace"), ours)
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    return process.wait(), written.decode(errors="replace")
