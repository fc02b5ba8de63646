"""This tool trains on a Cloud TPU VM or pod slice, from creating the machine to deleting it.

    python tools/tpu.py train NAME --type v3-8 --spot --zone ZONE -- \\
        --config configs/v3_8.yaml --data.path=gs://BUCKET/owt --run.out_dir=gs://BUCKET/v3_8

`train` creates the machine, installs scalegpt on all its workers, starts the same command on each,
shows the log, creates the machine again after a preemption, and deletes it at the end. `train` may
be interrupted and typed again at any time: the run goes on, and the command finds it. Its parts are
commands too: up, run, logs, status, stop, fetch, down. After "--" come the arguments of
scalegpt.train. Every command is printed before it runs; --dry-run only prints.

Exit codes: those of the run, 0 done, 2 the user's mistake, 3 stopped, 4 not finite; and 5 gave up
after --max-restarts without progress.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from tpus import worker_shell
from tpus.job import Job, look_at, verdict
from tpus.machine import Machine, accelerator, note

from scalegpt.config import command_line
from scalegpt.errors import Mistake
from scalegpt.processes.command import run_command
from scalegpt.processes.exits import Exit

UNTRIED = (
    "This is the largest piece of scalegpt that never met its real counterpart: it was run against "
    "the stand-in for gcloud of tests/test_tpu.py alone, never on Google Cloud. Read what "
    "--dry-run prints before you rent a machine."
)


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    flags = parser().parse_args(argv[:cut])
    flags.arguments, flags.argv = argv[cut + 1 :], argv
    if flags.arguments and flags.function not in (train, run):
        raise Mistake("only train and run take arguments of scalegpt.train after --")
    flags.machine = Machine(flags.name, flags.zone, flags.project, flags.dry_run)
    if flags.dry_run:
        flags.poll = 0
    try:
        return flags.function(flags)
    except KeyboardInterrupt:
        if flags.function in (up, stop, down, fetch, status):
            raise
        again = shlex.join(["python", "tools/tpu.py", *argv])
        print(
            f"\n# interrupted here; a run that has started on {flags.name} goes on.\n"
            f"# back to it:   {again}\n# save and stop: {tpu_command(flags, 'stop')}\n"
            f"# delete:       {tpu_command(flags, 'down')}",
            file=sys.stderr,
        )
        return Exit.INTERRUPTED


def parser() -> command_line.Parser:
    whole = command_line.Parser(
        prog="tpu.py", description=(__doc__ or "").partition("\n")[0], epilog=UNTRIED
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    creating, starting = (train, up), (train, run)
    for function, summary in (
        (train, "all of it: up, run, logs, again after a preemption, fetch, down"),
        (up, "create the machine, or wait until it is ready"),
        (run, "install, and start the training command on all workers"),
        (logs, "the log of worker 0 as it grows"),
        (status, "how the machine and the run on each worker are"),
        (stop, "ask the run to save and to leave"),
        (fetch, "copy a run's folder here"),
        (down, "delete the machine"),
    ):
        sub = commands.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        add = sub.add_argument
        add("name", metavar="NAME", help="of the machine")
        add("--zone", help="default: compute/zone of gcloud's configuration")
        add("--project", help="default: project of gcloud's configuration")
        add("--dry-run", action="store_true", help="only print the commands")
        add("--poll", type=float, default=30, metavar="SECONDS", help="between two looks at it")
        if function in creating:
            add("--type", required=True, help="v3-8, v4-32, v5litepod-16, v5p-8, v6e-8, ...")
            add("--spot", action="store_true", help="cheap, and may be taken away at any time")
            add("--runtime-version", metavar="NAME", help="default: Google's choice for the type")
            add(
                "--create-flag",
                action="append",
                default=[],
                metavar="FLAG",
                help="another flag of queued-resources create: --create-flag=--network=NAME",
            )
        if function in starting:
            add(
                "--env",
                action="append",
                default=[],
                metavar="NAME",
                help="variable of this machine that the run gets too, such as WANDB_API_KEY",
            )
        if function is train:
            add(
                "--max-restarts",
                type=int,
                default=5,
                metavar="N",
                help="in a row without a new update (default: 5)",
            )
            add("--keep", action="store_true", help="do not delete the machine at the end")
        if function is fetch:
            add("--run", required=True, metavar="OUT_DIR", help="the run's out_dir, gs:// or not")
        if function in (train, fetch):
            add(
                "--to",
                metavar="DIR",
                required=function is fetch,
                help="folder here for the run's "
                "files"
                + (" (default: the same out_dir; of a URL: none)" if function is train else ""),
            )
    return whole


# --- the commands ---


def train(flags: argparse.Namespace) -> int:
    """Take a run from creating its machine to deleting it, or join one begun by this command."""
    create, several = creation(flags)
    job, machine = Job(flags), flags.machine
    job.check_place(several, flags.spot)
    to = flags.to or (None if job.in_bucket else job.out)
    check_target(to)
    try:
        with job.packed() as archive:
            code = to_its_end(flags, job, archive, create)
    except ValueError:
        if machine.exists:
            note(left_over(flags))
        raise
    if code == Exit.DONE and to:
        bring(machine, job.out, to)
    if code == Exit.DONE and not flags.keep:
        machine.down()
    note(f"done; the run is in {to or job.out}" if code == Exit.DONE else left_over(flags))
    return code


def to_its_end(flags: argparse.Namespace, job: Job, archive: str, create: list[str]) -> int:
    """Run the job to its end, on one machine after another if need be; return the exit code."""
    machine = flags.machine
    reached, stuck = -1, 0  # the last update made; how often the run ended without a new one
    while True:
        machine.up(create, flags.poll)
        last = job.go_on(machine, archive, flags.poll)
        code = verdict(machine, last)
        if code == Exit.DONE:
            return Exit.DONE
        if last.state == "stopped":
            note("stopped on request, state saved")
            return Exit.STOPPED
        if code in (Exit.MISTAKE, Exit.NOT_FINITE):
            machine.ssh(worker_shell.tail(30), "all")
            note(f"the run ended with {code}, see above, and would again")
            return code
        stuck = 0 if last.step > reached else stuck + 1
        reached = max(reached, last.step)
        if stuck > flags.max_restarts:
            note(f"{stuck} times in a row it ended without a new update")
            return Exit.FAILED
        if last.state == "gone" and not job.in_bucket:
            raise Mistake(f"{flags.name} is gone, and {job.out} with it; it was on its disk")
        note(f"the run {last.why()}; again, from its last checkpoint")
        if last.state != "gone":
            # A worker that still waits for the others would keep its TPU from the restart.
            machine.ssh(worker_shell.stop(60, asked=False), "all", capture=True)
        if last.state == "silent" or (stuck > 1 and last.state != "gone"):
            if job.in_bucket:  # another machine may not have this one's fault
                machine.down()
        time.sleep(flags.poll if stuck else 0)


def up(flags: argparse.Namespace) -> int:
    flags.machine.up(creation(flags)[0], flags.poll)
    return Exit.DONE


def run(flags: argparse.Namespace) -> int:
    """Install scalegpt and start the run without waiting for its end."""
    job = Job(flags)
    if look_at(flags.machine, flags.poll).state == "running":
        raise Mistake(f"a run is in progress; stop it first: {tpu_command(flags, 'stop')}")
    with job.packed() as archive:
        job.begin(flags.machine, archive)
    note(f"started; its log: {tpu_command(flags, 'logs')}")
    if not job.in_bucket:
        note(f"{job.out} is on the machine's own disk and goes with it; fetch it before `down`")
    return Exit.DONE


def logs(flags: argparse.Namespace) -> int:
    return flags.machine.ssh(worker_shell.follow()).returncode


def status(flags: argparse.Namespace) -> int:
    state = flags.machine.state()
    note(f"{flags.name}: {state}")
    if state == "ACTIVE, node READY":
        output = flags.machine.ssh(worker_shell.look(), "all", capture=True).stdout
        for look in worker_shell.read(output):
            code = "" if look.code is None else f" {look.code}"
            note(f"{look.worker}: {look.state}{code}, log of {look.size:,} bytes")
    return Exit.DONE


def stop(flags: argparse.Namespace) -> int:
    flags.machine.must_ssh(worker_shell.stop(600, asked=True), "stopping the run")
    return Exit.DONE


def fetch(flags: argparse.Namespace) -> int:
    check_target(flags.to)
    bring(flags.machine, flags.run, flags.to)
    return Exit.DONE


def down(flags: argparse.Namespace) -> int:
    if flags.machine.state() == "ABSENT" and not flags.dry_run:
        note(f"there is no {flags.name}")
    else:
        flags.machine.down()
    return Exit.DONE


# --- parts of the commands ---


def creation(flags: argparse.Namespace) -> tuple[list[str], bool]:
    """Return flags of `queued-resources create`, and whether the slice has several hosts."""
    name, runtime, several = accelerator(flags.type)
    create = [f"--accelerator-type={name}", f"--runtime-version={flags.runtime_version or runtime}"]
    return [*create, *["--spot"] * flags.spot, *flags.create_flag], several


def check_target(to: str | None) -> None:
    if to and Path(to).exists():
        raise Mistake(f"{to} is there already and is not overwritten; choose another --to")


def bring(machine: Machine, out_dir: str, to: str) -> None:
    """Copy a run's folder from its bucket or from the machine to the folder `to`."""
    if "://" not in out_dir:
        if not machine.dry_run:
            Path(to).parent.mkdir(parents=True, exist_ok=True)
        folder = out_dir if out_dir.startswith("/") else f"{worker_shell.FOLDER}/{out_dir}"
        return machine.fetch(folder, to)
    if not machine.dry_run:
        Path(to).mkdir(parents=True)
    machine.must(["gcloud", "storage", "rsync", "--recursive", out_dir, to], "fetching")


def tpu_command(flags: argparse.Namespace, command: str) -> str:
    """Write a command of this tool for the same machine."""
    where = [f"--{k}={v}" for k in ("zone", "project") if (v := getattr(flags, k))]
    return shlex.join(["python", "tools/tpu.py", command, flags.name, *where])


def left_over(flags: argparse.Namespace) -> str:
    return (
        f"{flags.name} is still there and may cost money; delete it: {tpu_command(flags, 'down')}"
    )


if __name__ == "__main__":
    run_command(main, essential=False)
