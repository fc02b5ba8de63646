"""A lock file that one process holds."""

import os
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart there
    fcntl = None


def hold(path: Path, wait: bool = True) -> TextIO:
    """The lock file `path`, held until it is closed or this process ends; its holder may remove it.

    Raises BlockingIOError where another process has it and this shall not wait, and OSError.
    """
    while True:
        file = open(path, "w")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:  # whoever had it has removed it: who comes now makes another
            pass
        except BaseException:
            file.close()
            raise
        file.close()
