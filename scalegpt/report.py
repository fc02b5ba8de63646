"""This command shows one or several runs on a page: `python -m scalegpt.report out/demo`.

The page is one HTML file with curves, times, samples, checkpoints and what differs in the runs'
settings. It needs no network. A run that is going on, or was interrupted, is shown as far as it is.
Without a run, the command lists those in out/.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import argparse
import shlex
from contextlib import suppress
from pathlib import Path

from scalegpt.config import command_line
from scalegpt.errors import Mistake
from scalegpt.files.folder import replacing
from scalegpt.processes.command import python, run_command
from scalegpt.run.curves import draw
from scalegpt.run.history import read_history
from scalegpt.run.page import NAME, facts, write_page


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    if not flags.runs:
        if flags.out or flags.png:
            raise Mistake("--out and --png are of a run: name its run.out_dir, too")
        print(listing("out"))
        return 0
    if twice := next((run for run in flags.runs if flags.runs.count(run) > 1), None):
        raise Mistake(f"{twice} is given twice")
    histories = [read_history(run) for run in flags.runs]
    if flags.png:
        if not flags.png.endswith(".png"):
            raise Mistake(f"--png={flags.png} must end in .png")
        try:
            with replacing(flags.png) as beside:
                draw(histories).savefig(beside, format="png")
        except OSError as error:
            raise Mistake(f"cannot write --png={flags.png}: {error.strerror}") from None
        print(f"picture in {flags.png}")
    if flags.out or not flags.png:
        # Of one run, the page lies with it: in its folder or in its bucket.
        out = flags.out or (f"{flags.runs[0].rstrip('/')}/{NAME}" if len(flags.runs) == 1 else NAME)
        write_page(out, histories)
        print(f"report in {out}; open it in a browser")
    return 0


def listing(folder: str) -> str:
    """List the runs up to three levels below a folder, with the newest last and what to type next.

    Raises Mistake where there is none.
    """
    levels = ("*", "*/*", "*/*/*")
    runs = [p.parent for level in levels for p in Path(folder).glob(f"{level}/config.yaml")]
    if not runs:
        raise Mistake(f"name the run.out_dir of a training run: none is in {folder}/")
    lines, readable = [("run", "state", "best val loss")], []
    runs.sort(key=_written)
    for run in runs:
        try:
            known = facts(read_history(str(run)))
            lines.append((str(run), known["state"], known["best val loss"]))
            readable.append(shlex.quote(str(run)))
        except Mistake as error:
            lines.append((str(run), str(error).splitlines()[0], ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    newest = " ".join(readable[-2:] or ["RUN"])
    return "\n".join([*table, "next:", f"  {python()} -m scalegpt.report {newest}"])


def _written(run: Path) -> float:
    """Return when the newest file of a run was written, where files may go at any moment."""
    times = [0.0]
    with suppress(OSError):
        for file in run.iterdir():
            with suppress(OSError):
                times.append(file.lstat().st_mtime)
    return max(times)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="scalegpt.report",
        description=__doc__,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the run.out_dir of a training run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"the page (default: {NAME} in the run's folder; of several runs, in this one)",
    )
    parser.add_argument("--png", metavar="FILE", help="the curves alone, as a picture; no page")
    return parser


if __name__ == "__main__":
    run_command(main, essential=False)
