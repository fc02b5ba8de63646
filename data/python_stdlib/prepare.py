"""Prepare the running Python's standard library as bytes: real text that needs no network.

Documents are its .py files, without tests and installed packages, separated by NUL. About a
twentieth of the bytes is for validation: whole files, chosen by a hash of their path.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import platform
import sysconfig
import tokenize
from pathlib import Path

from scalegpt.data.prepare import Corpus, script_parser, stable_fraction, write_dataset
from scalegpt.data.tokenizer import load
from scalegpt.errors import Mistake
from scalegpt.processes.command import run_command

# These folders are not the library's source: tests, what pip and Linux distributions add, caches.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS |= {"_bundled", "node_modules"}
VAL_FRACTION = 0.05


def source_files(root: Path) -> list[Path]:
    """Return the library's own .py files, as paths relative to `root`, sorted."""
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path
        for path in relative
        if SKIPPED_FOLDERS.isdisjoint(path.parts)
        and not path.parts[0].startswith(("config-", "_sysconfigdata"))
    )


def prepare(out_dir: Path, workers: int | None = 0, force: bool = False) -> None:
    """Write the data set into `out_dir`."""

    def corpus() -> Corpus:
        root = Path(sysconfig.get_path("stdlib"))
        texts = {}
        for path in source_files(root):
            with tokenize.open(root / path) as file:  # some name another encoding in line 1
                texts[path.as_posix()] = file.read()
        sizes = {name: len(text.encode()) for name, text in texts.items()}
        left = VAL_FRACTION * sum(sizes.values())
        held_out = set()
        for name in sorted(texts, key=stable_fraction):
            if sizes[name] <= left:
                held_out.add(name)
                left -= sizes[name]
        documents = (("val" if name in held_out else "train", texts[name]) for name in texts)
        return Corpus(load("byte"), documents, sum(sizes.values()))

    source = f"standard library of Python {platform.python_version()}"
    write_dataset(out_dir, corpus, source, workers, force)


def main(argv: list[str]) -> int:
    parser = script_parser(__doc__, __file__)
    args = parser.parse_args(argv)
    if args.input:
        raise Mistake("--input is not for this set; for your own text see data/text/prepare.py")
    prepare(args.out, args.workers, args.force)
    return 0


if __name__ == "__main__":
    run_command(main, essential=False)
