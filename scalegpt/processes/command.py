"""How a command ends: its exit code, and one message for a user's mistake."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from scalegpt.errors import Mistake
from scalegpt.processes import group
from scalegpt.processes.exits import Exit

Main = Callable[[list[str]], int]

_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
}


def run_command(main: Main) -> NoReturn:
    """A command's last line: exit with what `exit_code` says."""
    # A terminal without UTF-8 shows "?" for what it has not; a model may write any character.
    sys.stdout.reconfigure(errors="replace")
    sys.exit(exit_code(main, sys.argv[1:]))


def exit_code(main: Main, argv: list[str]) -> int:
    """main's own, or 2 and one message on stderr for a user's mistake.

    A `Mistake` is the user's, and so is a disk that is full or not to be written; any other
    exception is a fault of ours and keeps its traceback.
    """
    try:
        code = main(argv)
        group.farewell(code)
        return code
    except SystemExit:
        raise
    except BaseException as error:
        fail(error)
        if isinstance(error, BrokenPipeError):  # else Python would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if (code := _code(error)) == Exit.FAILED:
            raise
        _show(error, code)
        return code


def fail(error: BaseException) -> None:
    """With other processes: show `error`, and end all with it. Alone: nothing.

    To be called before a clean-up that waits for other processes: they may be waiting for this.
    """
    if group.line is None:
        return
    code = _code(error)
    if code == Exit.FAILED:
        group.wait_for_cause(error)
    _show(error, code)
    text = _message(error) if code == Exit.MISTAKE else f"{type(error).__name__}: {error}"
    group.leave(code, text, said=True)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
        return Exit.BROKEN_PIPE
    if isinstance(error, Mistake):
        return Exit.MISTAKE
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return Exit.MISTAKE
    return Exit.FAILED


def _show(error: BaseException, code: int) -> None:
    if code == Exit.MISTAKE:
        print(f"error: {_message(error)}", file=sys.stderr, flush=True)
    elif code == Exit.FAILED:
        traceback.print_exception(error)
    elif code == Exit.INTERRUPTED:
        print("\ninterrupted", file=sys.stderr)


def _message(error: BaseException) -> str:
    """Of a bounded size, whatever a user has typed or a file holds."""
    text = str(error)
    if isinstance(error, OSError):
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        text = f"{what}; free some room, or choose another folder"
    lines = [x if len(x) <= 1000 else f"{x[:500]} ... {x[-400:]}" for x in text.splitlines()]
    if len(lines) > 40:
        lines[30:-5] = [f"... {len(lines) - 35} more lines ..."]
    return "\n".join(lines)
