"""An ablation trains several arms of one run, each with several seeds, and reports what they cost.

    python tools/ablation.py configs/ablations/NAME.yaml --out out/NAME [--section.key=value ...]
    python tools/ablation.py configs/ablations/NAME.yaml --out out/NAME --report --plot curves.png
    python tools/ablation.py --from NAME.json --plot curves.png --markdown table.md

The file names what all arms have in common and what each changes:

    config: configs/demo.yaml                  # optional; and any section of such a file besides
    optim: {steps: 500}
    arms:
      baseline: {}
      slower: {optim: {lr: 1.0e-3}}
    seeds: [1, 2, 3]
    reference: baseline                        # default: the first arm

Each run is a process of scalegpt.train with DIR/ARM/seed-N as its run.out_dir. Runs are made one
after another, all arms with the first seed first. The same command continues runs that were
interrupted and leaves out those that are done. `--section.key=value` is for all arms. Seconds count
updates alone: compare them only where all runs had the same machine to themselves. Losses of
different tokenizers do not compare.

Exit codes: 0 done; 1 a run failed, as on a loss that is not finite (the others go on); 2 the user's
mistake, such as data that are not there (nothing goes on); 3 stopped by Ctrl-C or SIGTERM, with the
run that was under way saved.
"""

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ablations.plan import Plan, Run, read_plan
from ablations.plot import draw
from ablations.record import Record, existing, finished, measure, read_record, write_record
from ablations.report import markdown, summarise, table

from scalegpt.config import command_line
from scalegpt.errors import Mistake
from scalegpt.files.folder import replacing
from scalegpt.planning.picture import check_file
from scalegpt.processes import streams
from scalegpt.processes.children import Children
from scalegpt.processes.command import run_command
from scalegpt.processes.exits import Exit

A_RUN_FAILED = 1  # exit code: the other runs were made
FILES = ("markdown", "record", "plot")


def main(argv: list[str]) -> int:
    flags, overrides = parse(argv)
    if flags.recorded:
        publish(read_record(flags.recorded), flags)
        return Exit.DONE
    plan = read_plan(flags.file, flags.out, overrides)
    if unknown := [arm for arm in flags.arms or () if arm not in plan.arms]:
        raise Mistake(f"--arms {unknown[0]} is none of the arms {', '.join(plan.arms)}")
    measure(plan)  # before any run begins, this refuses folders that are damaged or another run's
    chosen = [run for run in plan.runs if run.arm in (flags.arms or plan.arms)]
    todo = [run for run in chosen if not finished(run)]
    for run in () if flags.report else todo:
        if not os.access(folder := existing(run.folder), os.W_OK | os.X_OK):
            raise Mistake(f"{folder} may not be written to; give another --out")
    if flags.dry_run:
        print("\n".join(shlex.join(run.command) for run in todo) or "all runs are done")
        return Exit.DONE
    code = Exit.DONE if flags.report else train(todo, plan, sys.stderr if flags.json else None)
    try:
        publish(measure(plan), flags)
    except ValueError as error:
        if code == Exit.DONE:
            raise
        print(f"error: {error}", file=sys.stderr)  # the exit code stays that of the runs
    return code


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the checked flags, and the overrides for all arms. Raises Mistake."""
    parser = command_line.Parser(
        prog="ablation.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="the arms, as above")
    add("--out", metavar="DIR", help="where the runs are, or will be")
    add("--arms", nargs="+", metavar="ARM", help="train only these")
    add("--dry-run", action="store_true", help="print the commands of what is left to train")
    add("--report", action="store_true", help="train nothing, report what is there")
    add("--from", dest="recorded", metavar="RECORD", help="report what --record has kept")
    add("--markdown", metavar="FILE", help="write the table in Markdown")
    add("--record", metavar="FILE", help="keep the curves in a small JSON file")
    add("--plot", metavar="FILE", help="draw loss over tokens, FLOPs and seconds (.png, ...)")
    add("--json", action="store_true", help="print one JSON object at the end")
    flags, overrides = parser.parse_known_args(argv)
    for word in overrides:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or "." not in name or not equals:
            parser.error(f"unrecognized arguments: {word}")
    check_runs(flags, overrides)
    check_files(flags)
    if flags.plot:
        check_file(flags.plot)
    return flags, overrides


def check_runs(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Raise Mistake for flags that do not say, or say twice, which runs are meant."""
    if flags.recorded:
        if flags.file or flags.out or flags.arms or flags.dry_run or overrides:
            raise Mistake("--from reports a record alone: leave out FILE, --out and all of runs")
    elif flags.arms and not flags.file:
        raise Mistake(
            f"--arms takes all words after it for arms: {' '.join(flags.arms)}; "
            "give the file of the arms first, before any flag"
        )
    elif not flags.file or not flags.out:
        raise Mistake("give the file of the arms and --out DIR, or --from RECORD; see --help")
    elif "://" in flags.out:
        raise Mistake(f"--out={flags.out} must be a local folder")
    elif flags.report and not Path(flags.out).is_dir():
        raise Mistake(f"--report: there is no folder --out={flags.out}; give that of the runs")


def check_files(flags: argparse.Namespace) -> None:
    """Raise Mistake for a file that could not be written, or that is the file of another flag."""
    taken = {
        os.path.realpath(path): use
        for use, path in (
            ("the file of the arms", flags.file),
            ("--out", flags.out),
            ("--from", flags.recorded),
        )
        if path
    }
    for name in FILES:
        if not (file := getattr(flags, name)):
            continue
        path = Path(os.path.realpath(file))
        if not path.parent.is_dir():
            raise Mistake(f"--{name}={file}: there is no folder {Path(file).parent}")
        if use := taken.get(str(path)):
            raise Mistake(f"--{name}={file} is {use}, too; give another file")
        if path.exists() and not path.is_file():  # replacing it would delete a /dev/null
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise Mistake(f"--{name}={file} is {kind}; give a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise Mistake(f"--{name}={file} may not be written; give another file")
        taken[str(path)] = f"--{name}"


def train(runs: list[Run], plan: Plan, output: Any) -> int:
    """Train the runs, print a table after each seed, and return the exit code.

    output: a file, or None for standard output. A run that ends with a user's mistake is the last:
    the arms' own keys were checked before, so every other run would make the same mistake.
    """
    children, result = Children(), Exit.DONE
    if output is None:
        streams.make_optional()  # days of runs do not end for a table, which --report shows again
    say = partial(print, file=output, flush=True)
    try:
        for i, run in enumerate(runs):
            if i and run.seed != runs[i - 1].seed:
                say(f"\n{table(summarise(measure(plan)))}")
            say(f"\n=== {run.arm}, seed {run.seed} (run {i + 1} of {len(runs)})")
            code = children.run(run.command, output)
            if children.stopped or code == Exit.STOPPED:
                say("\nstopped; the same command continues")
                return Exit.STOPPED
            if code == Exit.MISTAKE:
                say(
                    f"\n{run.arm}, seed {run.seed} failed with exit code {code}, for the reason "
                    "given above; the same command goes on once that is mended"
                )
                return Exit.MISTAKE
            if code:
                say(f"\n{run.arm}, seed {run.seed} failed with exit code {code}; going on")
                result = A_RUN_FAILED
        return result
    finally:
        children.close()


def publish(record: Record, flags: argparse.Namespace) -> None:
    """Print the report, and write the files that the flags name.

    Raises Mistake where a file cannot be written, or there is no evaluation to write.
    """
    summary = summarise(record)
    print(json.dumps(summary, indent=2) if flags.json else f"\n{table(summary)}", flush=True)
    writers = {
        "markdown": lambda file: Path(file).write_text(markdown(summary), encoding="utf-8"),
        "record": lambda file: write_record(record, file),
        "plot": lambda file: draw(record, file),
    }
    for name in FILES:
        if file := getattr(flags, name):
            if not record.evaluated:
                raise Mistake(
                    f"--{name}={file} is not written: no run has an evaluation yet; "
                    "train first, or give the --out of runs that have"
                )
            try:
                # The real path, as otherwise the file would take the place of a link to it.
                with replacing(os.path.realpath(file)) as beside:
                    writers[name](str(beside))
            except OSError as error:
                raise Mistake(f"cannot write --{name}={file}: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)
