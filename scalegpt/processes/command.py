"""How a command ends: its exit code, and one message for a user's mistake."""

import errno
import gc
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from scalegpt.errors import Mistake
from scalegpt.processes import streams
from scalegpt.processes.exits import Exit

Main = Callable[[list[str]], int]

# Errors of the operating system that the user can mend: a disk is full, or may not be written.
_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
}


def run_command(main: Main, essential: bool = True) -> NoReturn:
    """Run a command on this process's command line and exit with its code: a script's last line.

    essential: what it prints is its result, so that it fails where that cannot be written.
    """
    streams.prepare(essential)
    gc.freeze()  # modules stay, and looking through them again and again would take time
    gc.enable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by exits.leave_on_interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(exit_code(main, sys.argv[1:]))


def exit_code(main: Main, argv: list[str]) -> int:
    """Return the exit code of main(argv), after showing the exception that ended it, if any.

    A user's mistake is one message on standard error. An exception that is a fault of ours is
    raised again, so that Python shows its traceback.
    """
    try:
        try:
            code = main(argv)
        except SystemExit as end:  # of --help
            code = end.code
        sys.stdout.flush()  # here an error has a message and an exit code
        return code
    except BaseException as error:
        if (code := code_of(error)) == Exit.FAILED:
            raise
        show(error)
        return code


def code_of(error: BaseException) -> Exit:
    """Return the exit code of a command that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return Exit.BROKEN_PIPE
    if isinstance(error, Mistake):
        return Exit.MISTAKE
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return Exit.MISTAKE
    return Exit.FAILED


def show(error: BaseException) -> None:
    """Write on standard error what the user should know of the exception that ends a command."""
    match code_of(error):
        case Exit.MISTAKE:
            print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        case Exit.INTERRUPTED:
            print("\ninterrupted", file=sys.stderr)
        case Exit.FAILED:
            traceback.print_exception(error)


def message_of(error: BaseException) -> str:
    """Return the text of an error in one line, or of a mistake, cut to at most 40 long lines.

    A user may have typed anything, and a file may hold anything, that the message quotes.
    """
    if code_of(error) != Exit.MISTAKE:
        return f"{type(error).__name__}: {error}"
    text = str(error)
    if isinstance(error, OSError):
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        text = f"{what}; free some room, or choose another folder"
    lines = [x if len(x) <= 1000 else f"{x[:500]} ... {x[-400:]}" for x in text.splitlines()]
    if len(lines) > 40:
        lines[30:-5] = [f"... {len(lines) - 35} more lines ..."]
    return "\n".join(lines)


def python() -> str:
    """Return what to type for the Python that runs this: `python`, or `.venv/bin/python`."""
    path = Path(sys.executable)
    if shutil.which(path.name) == str(path):
        return path.name
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
