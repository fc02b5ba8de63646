"""A job checks, packs, installs, starts and watches one training command on a machine."""

import argparse
import dataclasses
import os
import secrets
import shlex
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tpus import worker_shell
from tpus.machine import Machine, note

from scalegpt.config import Config, command_line
from scalegpt.config.presets import recipe
from scalegpt.data import datatrove
from scalegpt.errors import Mistake
from scalegpt.files.folder import open_folder
from scalegpt.processes.exits import Exit
from scalegpt.processes.handshake import TOKEN

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "scalegpt/**/*.py",
    "tools/**/*.py",
    "configs/*.yaml",
    "data/*/*.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
DATA = (
    *("train.bin", "val.bin", "train.idx", "val.idx", "train.jsonl", "val.jsonl", "meta.*"),
    *("parts-*/*/*.bin", "parts-*/*/*.idx"),
)
# A run's numbers and the form of its checkpoints depend on these packages. Every machine gets the
# versions installed here: one created a month later would otherwise continue with newer ones.
PINNED = ("jax", "flax", "optax", "numpy", "grain", "orbax-checkpoint")
SILENT = 20  # questions in a row to which a machine may give no answer although it is ready


class Job:
    """A job is a training command and its files, checked before a machine is rented.

    Raises Mistake for a command that could not run there.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        if not flags.arguments:
            raise Mistake("say what to train: ... -- --config FILE --run.out_dir=gs://...")
        self.arguments, self.id = flags.arguments, worker_shell.run_id(flags.arguments)
        self.config, parsed = command_line.parse(flags.arguments, "scalegpt.train", {})
        self.out = self.config.run.out_dir
        self.in_bucket = "://" in self.out
        extra = [*filter(None, self.config.eval.tasks.values())]
        if parsed.config and Path(parsed.config).is_file():  # else one of scalegpt's own
            extra.append(parsed.config)
        self.files = [relative(file) for file in extra if file and "://" not in file]
        self.data = local_data(self.config)
        if (source := self.config.run.init_from) and Path(source).is_dir():
            raise Mistake(
                f"run.init_from={source} is a folder here, which the machine has not: give a "
                "bucket's, or a name of Hugging Face"
            )
        if missing := [name for name in flags.env if name not in os.environ]:
            raise Mistake(f"--env {missing[0]}: there is no such variable here")
        # The workers of a slice hear only whoever knows their token.
        variables = {TOKEN: secrets.token_hex(16), **{n: os.environ[n] for n in flags.env}}
        self.env = "".join(f"export {n}={shlex.quote(x)}\n" for n, x in variables.items())
        self.installed_on: int | None = None
        self.archive = f"scalegpt-{flags.name}.tar.gz"

    def check_place(self, several: bool, spot: bool) -> None:
        why = "a spot machine is deleted" if spot else "the hosts of a slice share no disk"
        if (spot or several) and not self.in_bucket:
            raise Mistake(
                f"run.out_dir={self.out} is on the machine, and {why}: "
                f"give a bucket, --run.out_dir=gs://BUCKET/{Path(self.out).name}"
            )

    @contextmanager
    def packed(self) -> Iterator[str]:
        """Pack the sources as they are now, for this machine and any that replaces it."""
        with TemporaryDirectory(prefix="scalegpt-") as folder:
            path = Path(folder, self.archive)
            names = {p.relative_to(ROOT) for pattern in SOURCES for p in ROOT.glob(pattern)}
            with tarfile.open(path, "w:gz", compresslevel=6) as archive:
                for name in sorted(names):
                    archive.add(ROOT / name, f"./{name}")
                for file in self.files:
                    archive.add(file, f"./{file}")
                # In a file, as arguments are printed and visible to other users.
                secret = Path(folder, "run.env")
                secret.touch(0o600)
                secret.write_text(self.env)
                archive.add(secret, "./run.env")
            yield str(path)

    def go_on(self, machine: Machine, archive: str, seconds: float) -> worker_shell.Look:
        """Start the run on a ready machine, or find it there, and show its log to its end."""
        look, offset = look_at(machine, seconds), -4000
        if look.state == "running" and look.run != self.id:
            raise Mistake(f"another run is in progress on {machine.name}; stop it first")
        ended = look.state == "exit" and look.code == Exit.DONE and look.run == self.id
        if look.state == "running" or ended:
            note(f"found the run on {machine.name}")
        else:
            try:
                self.begin(machine, archive)
            except ValueError:  # a machine may be preempted while it is being prepared
                if not machine.is_gone():
                    raise
                return worker_shell.Look("", "gone")
            offset = 0
        return watch(machine, offset, seconds)

    def begin(self, machine: Machine, archive: str) -> None:
        """Install scalegpt, once on each machine, and start the run. Raises Mistake."""
        if self.installed_on != machine.created:
            self.install(machine, archive)
            self.installed_on = machine.created
        machine.must_ssh(worker_shell.start(self.arguments), "starting the run")

    def install(self, machine: Machine, archive: str) -> None:
        """Install the sources, their packages and the data on all workers."""
        if machine.dry_run:
            note(f"{self.archive}: the sources, and what --env names, packed here")
            archive = self.archive
        machine.send([archive], "")
        packages = [f"{name}=={version(name)}" for name in PINNED]
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        machine.must_ssh(worker_shell.install(self.archive, python, packages), "installing")
        for folder, files in self.data.items():
            sizes = {file: Path(file).stat().st_size for file in files}
            if machine.dry_run or machine.ssh(worker_shell.has(sizes), "all", True).returncode:
                place = f"{worker_shell.FOLDER}/{folder}"
                machine.must_ssh(f"mkdir -p {place}", "making a folder")
                machine.send(files, f"{place}/")


def local_data(config: Config) -> dict[str, list[str]]:
    """Return the token files to copy to the workers, by folder; workers read URLs themselves.

    Raises Mistake for a data set that is not here.
    """
    folders: dict[str, list[str]] = {}
    for path in config.data.weights:
        if "://" in path or (config.data.prepare and recipe(Path(path).name)):
            continue
        found = [file for pattern in DATA for file in sorted(Path(path).glob(pattern))]
        found += [Path(path, name) for name in datatrove.names(open_folder(path))]
        if not any(file.name == "train.bin" or file.suffix in (".ds", ".jsonl") for file in found):
            raise Mistake(
                f"data.path={path}: there is no {path}/train.bin here to copy to the machine; "
                f"prepare it, or give a bucket's --data.path=gs://BUCKET/{Path(path).name}"
            )
        for file in found:
            folders.setdefault(relative(str(file.parent)), []).append(relative(str(file)))
    return folders


def relative(path: str) -> str:
    """Return a path that means the same on the machine, with nothing that scp's shell expands.

    Raises Mistake for any other path.
    """
    clean = Path(path).as_posix()
    if Path(path).is_absolute() or ".." in Path(path).parts or clean != shlex.quote(clean):
        raise Mistake(
            f"{path}: give a plain path below this folder, so that the machine can have the same"
        )
    return clean


def look_at(machine: Machine, seconds: float) -> worker_shell.Look:
    """Ask worker 0 of a ready machine for its run; a machine just created may answer late."""
    pretend = "@scalegpt worker-0 none - - 0\n"
    for _ in range(5):
        answer = machine.ssh(worker_shell.look(), capture=True, once="look", pretend=pretend)
        if looks := worker_shell.read(answer.stdout):
            return looks[0]
        time.sleep(seconds)
    raise Mistake(f"worker 0 of {machine.name} does not answer:\n{answer.stderr.strip()}")


def watch(machine: Machine, offset: int, seconds: float) -> worker_shell.Look:
    """Show the log of worker 0 from byte `offset` on, until the run or its machine has ended.

    Worker 0 is asked again and again, because a connection held for days breaks. Returns the last
    look, with the end of the log.
    """
    text, silent, pretend = "", 0, "@scalegpt worker-0 exit 0 - 0\n"
    while True:
        answer = machine.ssh(worker_shell.look(offset), capture=True, once="watch", pretend=pretend)
        if looks := worker_shell.read(answer.stdout):
            look, silent = looks[0], 0
            print(look.log, end="", flush=True)
            # Joined, because the line with the last step may come in two parts.
            text, offset = (text + look.log)[-20_000:], look.size
            if look.state != "running":
                return dataclasses.replace(look, log=text)
        else:
            silent += 1
            note(f"worker 0 does not answer ({silent} of {SILENT})")
            if machine.is_gone():
                return worker_shell.Look("", "gone", log=text)
            if silent == SILENT:
                return worker_shell.Look("", "silent", log=text)
        time.sleep(seconds)


def verdict(machine: Machine, last: worker_shell.Look) -> int | None:
    """Return the exit code that explains the run's end.

    All workers are asked, because one's mistake or non-finite loss is a dead peer to the others.
    """
    if last.code in (None, Exit.DONE):
        return last.code
    answer = machine.ssh(worker_shell.look(), "all", capture=True)
    codes = [look.code for look in worker_shell.read(answer.stdout)]
    return next((code for code in codes if code in (Exit.MISTAKE, Exit.NOT_FINITE)), last.code)
