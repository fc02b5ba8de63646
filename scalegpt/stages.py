"""Train a model in stages, each a run that starts from the weights of the one before:
`python -m scalegpt.stages configs/stages/laptop.yaml`.

A stages file names the stages in their order, and `config`s as scalegpt.train takes them:

    stages:
      - name: base
        config: configs/demo.yaml
      - name: sft
        config: configs/sft.yaml
        prepare: tasks --tasks=reverse,sort       # data/tasks/prepare.py makes this stage's data
        overrides: {optim: {steps: 200}}          # sections of keys over those of the config
      - name: other
        from: base                                # starts from this stage, not from the one before
        config: configs/sft.yaml
    text: --tokenizer=byte                        # flags of data/text/prepare.py, for --text
    chat: sft                                     # whom one talks with; default: the last stage

Each stage is a process of scalegpt.train, with OUT/NAME as its run.out_dir; what it prepares is in
OUT/data/NAME, by default in the tokens of the run that it starts from. Stages that are done are
left out, so that the same command goes on after a stop, a fault or a kill. At the end there is a
table, and on a terminal the chat begins.

Exit codes: 0 done; 2 the user's mistake; else that of the stage that has ended otherwise.
"""

if __name__ == "__main__":
    from scalegpt.processes.exits import leave_on_interrupt

    leave_on_interrupt()

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, ValidationError

from scalegpt.config import Config, command_line
from scalegpt.config.differences import curve_diff, resolved_as
from scalegpt.config.loading import load
from scalegpt.config.presets import recipe
from scalegpt.config.types import Name, Section
from scalegpt.errors import Mistake
from scalegpt.processes import streams
from scalegpt.processes.children import Children
from scalegpt.processes.command import python, run_command
from scalegpt.processes.exits import Exit
from scalegpt.run.curves import ledger_of
from scalegpt.run.history import DONE, History, read_history, state
from scalegpt.run.resume import with_model


def _whole_words(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise Mistake(f"{text!r} is no list of words and flags: {error}; mend it") from None
    return text


class StageFile(Section):
    """One entry of `stages`."""

    name: Annotated[Name, Field(pattern=r"^\w[\w.-]*$")]
    config: Name
    source: Annotated[Name | None, Field(alias="from")] = None
    prepare: Annotated[Name, AfterValidator(_whole_words)] | None = None
    overrides: dict[str, dict[str, Any] | None] = {}


class StagesFile(Section):
    """A whole stages file."""

    stages: Annotated[list[StageFile], Field(min_length=1)]
    text: Annotated[str, AfterValidator(_whole_words)] = ""
    chat: Name | None = None


class Stage(NamedTuple):
    """A stage as it is run. argv are scalegpt.train's, which mean `config`; prepare is a command,
    [] where there is nothing to prepare."""

    name: str
    argv: list[str]
    config: Config
    prepare: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out_dir)


def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    file = read_file(flags.file)
    out = flags.out or str(Path("out", Path(flags.file).stem))
    stages = plan(file, flags.file, out, flags.text)
    names = [stage.name for stage in stages]
    for what, name in (("--stop-after", flags.stop_after), (f"{flags.file}: chat", file.chat)):
        if name and name not in names:
            raise Mistake(f"{what}={name} is none of the stages {', '.join(names)}")
    last = flags.stop_after or names[-1]
    if code := train(stages, names.index(last) + 1):
        return code
    begun = [stage for stage in stages if (stage.folder / "config.yaml").is_file()]
    print(f"\n{table(begun)}\n", flush=True)
    if flags.stop_after and last != names[-1]:
        print(f"stopped after {last}; the same command without --stop-after goes on")
        return Exit.DONE
    return talk(Path(out, file.chat or last))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="scalegpt.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the stages, as above")
    parser.add_argument("--out", help="folder of the stages' runs (default: out/NAME of the file)")
    parser.add_argument("--stop-after", metavar="STAGE", help="do this stage and none after it")
    parser.add_argument(
        "--text",
        metavar="INPUT",
        help="train the first stage on this text instead: a file, a folder or a pattern in quotes",
    )
    return parser


def read_file(path: str) -> StagesFile:
    """Return what a stages file says. Raises Mistake with one line for each mistake."""
    try:
        return StagesFile.model_validate(load(path))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise Mistake("\n  ".join([f"{path} holds no stages:", *lines])) from None


def _explain(detail: Any) -> str:
    key, kind = ".".join(map(str, detail["loc"])), detail["type"]
    if kind == "extra_forbidden":
        section = StageFile if len(detail["loc"]) > 1 else StagesFile
        known = [field.alias or name for name, field in section.model_fields.items()]
        return f"unknown key {key}; there are {', '.join(known)}"
    what = detail["ctx"]["error"] if kind == "value_error" else detail["msg"]
    return f"{key} is missing" if kind == "missing" else f"{key}: {what}"


def plan(file: StagesFile, path: str, out: str, text: str | None) -> list[Stage]:
    """Return the stages as commands, of which each has been checked. Raises Mistake.

    text: what the first stage is to read in place of its data, or None.
    """
    if "://" in out:
        raise Mistake(f"--out={out} must be a local folder")
    stages: list[Stage] = []
    for given in file.stages:
        names = [stage.name for stage in stages]
        where = f"{path}: stage {given.name}"
        if given.name in [*names, "data"]:
            raise Mistake(f"{where}: another stage, or the folder of data, has this name")
        source = given.source or (names[-1] if names else None)
        if source and source not in names:
            raise Mistake(f"{where}: from={source} is no stage before it")
        prepare = shlex.split(given.prepare or "")
        if text and not stages:
            prepare = ["text", "--input", text, *shlex.split(file.text)]
            given = given.model_copy(update={"overrides": {**given.overrides, "data": {}}})
        stages.append(_stage(given, where, out, source, prepare))
    return stages


def _stage(given: StageFile, where: str, out: str, source: str | None, prepare: list[str]) -> Stage:
    keys = {
        f"{section}.{key}": value
        for section, values in given.overrides.items()
        for key, value in (values or {}).items()
    }
    here = {"run.out_dir": str(Path(out, given.name))}
    if source:
        here["run.init_from"] = str(Path(out, source))
    command = []
    if prepare:
        here["data.path"] = str(Path(out, "data", given.name))
        if not (script := recipe(prepare[0])):
            raise Mistake(f"{where}: prepare: there is no data/{prepare[0]}/prepare.py")
        command = [sys.executable, str(script), *prepare[1:], "--out", here["data.path"]]
        if source and not any(word.startswith("--tokenizer") for word in prepare):
            command += ["--tokenizer", here["run.init_from"]]
    if twice := here.keys() & keys:
        raise Mistake(f"{where}: {min(twice)} follows from the stages; leave it out")
    argv = [f"--{key}={command_line.text_of(value)}" for key, value in (keys | here).items()]
    argv = ["--config", given.config, *argv]
    try:
        config, _ = command_line.parse(argv, "scalegpt.train", {})
    except Mistake as error:
        raise Mistake(f"{where}: {error}") from None
    return Stage(given.name, argv, config, command)


def finished(stage: Stage) -> bool:
    """Tell whether the run of a stage is done, and is the one that is planned."""
    if not (stage.folder / "config.yaml").is_file():
        return False
    run, planned = read_history(str(stage.folder)), with_model(stage.config)
    steps = run.config.optim.steps
    saved = not isinstance(run.checkpoints.get(steps, ""), str)
    return (
        saved
        and state(run.rows, steps) == DONE
        and run.config.data.path == planned.data.path
        and run.config.run.init_from == planned.run.init_from
        and not curve_diff(run.config, resolved_as(run.config, planned))
    )


def train(stages: Sequence[Stage], count: int) -> int:
    """Do what is left of the first `count` stages. Returns 0, or the exit code of what failed."""
    streams.make_optional()
    children = Children()
    try:
        for number, stage in enumerate(stages[:count], 1):
            title = f"=== {stage.name} (stage {number} of {len(stages)})"
            if finished(stage):
                print(f"{title}: done", flush=True)
                continue
            typed = f"{python()} -m scalegpt.train {shlex.join(stage.argv)}"
            print(f"\n{title}\n{typed}", flush=True)
            _wait_for_the_run_before(stage.folder)
            command = [sys.executable, "-m", "scalegpt.train", *stage.argv]
            for part in filter(None, (stage.prepare, command)):
                code = children.run(part, None)
                # What is prepared is there whole or not at all; a run may have left at once.
                kept = part is stage.prepare or code in (Exit.DONE, Exit.STOPPED)
                if children.stopped and kept:
                    print("\nstopped; the same command goes on", flush=True)
                    return Exit.STOPPED
                if code:
                    code = code if code > 0 else 128 - code  # of a signal, as a shell says it
                    print(
                        f"\n{stage.name} ended with exit code {code}, for the reason given above; "
                        "the same command goes on once that is mended"
                        + ("; the stages file has prepare.py's flags" * (part is stage.prepare)),
                        flush=True,
                    )
                    return code
        return Exit.DONE
    finally:
        children.close()


def _wait_for_the_run_before(folder: Path) -> None:
    """Give a run whose command was killed a minute to save: it hears that its parent is gone."""
    if (folder / ".lock").exists():
        try:
            with FileLock(folder / ".lock", timeout=60):
                pass
        except Timeout:
            pass  # scalegpt.train will say that another process trains there


def table(stages: Sequence[Stage]) -> str:
    """Return a table for a person: what each stage has reached, from its start to its end."""
    lines = [f"{'stage':<10} {'updates':>7} {'minutes':>7}  figures"]
    for stage in stages:
        run = read_history(str(stage.folder))
        times = ledger_of(run)
        minutes = (sum(times.values()) - times.get("down", 0.0)) / 60
        begin = f"{stage.name:<10} {run.config.optim.steps:>7,} {minutes:>7.1f}  "
        # A figure is not broken between its key and its values.
        shown = ", ".join(figure.replace(" ", "\xa0") for figure in figures(run))
        lines += textwrap.wrap(begin + shown, 79, subsequent_indent=" " * len(begin))
    return "\n".join(lines).replace("\xa0", " ")


def figures(run: History) -> list[str]:
    """Return the first and the last value of a run's figures, each as "val/loss 5.55 -> 1.83"."""
    curves = {key: run.curve(key)[1] for row in run.rows for key in row if _is_shown(key)}
    return [f"{key} {values[0]:.3g} -> {values[-1]:.3g}" for key, values in curves.items()]


def _is_shown(key: str) -> bool:
    shown = (
        "val/loss",
        "val/bits_per_byte",
        "val/accuracy",
        "val/reward",
        "val/ended",
        "rl/reward",
    )
    return key in shown or key.endswith(("/acc", "/pass@1"))


def talk(run: Path) -> int:
    """Begin the chat with a run on a terminal; elsewhere print its command."""
    argv = ["-m", "scalegpt.chat", "--run", str(run)]
    print(f"{python()} {shlex.join(argv)}", flush=True)
    if sys.stdin.isatty() and sys.stdout.isatty():
        os.execv(sys.executable, [sys.executable, *argv])
    return Exit.DONE


if __name__ == "__main__":
    run_command(main, essential=False)
