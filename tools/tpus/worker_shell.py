"""These functions write the lines of shell that a TPU's workers run: install, start, look, stop.

Everything is in `scalegpt` below the user's home: the sources, .venv, and the run's run.log,
run.exit (its exit code), run.id (which command it was) and run.lock. The run holds that lock while
it runs; a process id would not tell, as another program may have it after a reboot.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass

FOLDER = "scalegpt"
_STEP = re.compile(r"^step (\d+)/", re.MULTILINE)
_RUNNING = "! flock -n run.lock true"
_ENTER = f"cd {FOLDER} || exit 1"
# Prints the state of the run in one line, by one write: lines of several workers must not mix.
_LOOK = (
    'cd scalegpt 2>/dev/null || { echo "@scalegpt $(hostname) none - - 0"; exit 0; }; c=-; '
    f"if {_RUNNING}; then s=running; elif [ -f run.stopped ]; then s=stopped; "
    "elif [ -f run.exit ]; then s=exit; c=$(cat run.exit); elif [ -f run.id ]; then s=lost; "
    "else s=none; fi; n=$(stat -c %s run.log 2>/dev/null || echo 0); "
    'echo "@scalegpt $(hostname) $s $c $(cat run.id 2>/dev/null || echo -) $n"'
)


@dataclass(frozen=True)
class Look:
    """A look is the state of the run on one worker: none, running, exit, stopped, lost.

    exit comes with `code`; lost is a run that left neither process nor exit code, as after a
    reboot. The caller adds gone (the machine is not there) and silent (it does not answer). size:
    of the log, in bytes.
    """

    worker: str
    state: str
    code: int | None = None
    run: str = ""
    size: int = 0
    log: str = ""

    @property
    def step(self) -> int:
        """Return the last update in the log, -1 without one."""
        return max(map(int, _STEP.findall(self.log)), default=-1)

    def why(self) -> str:
        """Say how the run ended, as the rest of a sentence."""
        return {
            "exit": f"ended with {self.code}",
            "gone": "lost its machine, preempted perhaps",
            "silent": "does not answer",
        }.get(self.state, "left no exit code")


def run_id(arguments: list[str]) -> str:
    return hashlib.sha256(shlex.join(arguments).encode()).hexdigest()[:12]


def install(archive: str, python: str, packages: list[str]) -> str:
    """Unpack the sources and install them, with a newer Python than the 3.10 of the images."""
    uv = "python3 -m uv"
    steps = [
        f"mkdir -p {FOLDER}",
        f"cd {FOLDER}",
        "rm -rf scalegpt configs tools run.env",
        f"tar -xzf ../{archive}",
        f"rm ../{archive}",
        # Ubuntu 24.04 demands this; as a variable, since pip of 22.04 does not know the flag.
        "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv",
        f"{uv} venv --quiet --allow-existing --python {python} .venv",
        f"{uv} pip install --quiet --python .venv/bin/python -e '.[tpu]' {shlex.join(packages)}",
    ]
    return " && ".join(steps)


def start(arguments: list[str]) -> str:
    """Start training so that it outlives the connection and leaves a log and an exit code."""
    program = (
        # This shell ignores the SIGTERM that stops the program, to write down its exit code.
        "trap : TERM; if [ -f run.env ]; then . ./run.env; fi; "
        f".venv/bin/python -u -m scalegpt.train {shlex.join(arguments)}; "
        "echo $? > run.exit.new; mv run.exit.new run.exit"
    )
    return (
        f"{_ENTER}; if {_RUNNING}; then echo a run is in progress >&2; exit 1; fi; "
        "rm -f run.exit run.stopped; if [ -f run.log ]; then mv run.log run.log.old; fi; "
        f"echo {run_id(arguments)} > run.id; "
        f"setsid nohup flock -w 10 run.lock bash -c {shlex.quote(program)} "
        "> run.log 2>&1 < /dev/null & echo $! > run.pid; "
        "for i in $(seq 100); do if ! flock -n run.lock true || [ -f run.exit ]; then exit 0; fi; "
        "sleep 0.1; done; echo the run did not start >&2; exit 1"
    )


def look(offset: int | None = None) -> str:
    """Print the state of the run, and its log from byte `offset`; -n is its last n bytes."""
    if offset is None:
        return _LOOK
    return (
        f"{_LOOK}; b={offset}; if [ $b -lt 0 ]; then b=$((n + b)); fi; "
        "if [ $b -lt 0 ] || [ $b -gt $n ]; then b=0; fi; "
        "if [ $n -gt $b ]; then tail -c +$((b + 1)) run.log | head -c $((n - b)); fi"
    )


def read(text: str) -> list[Look]:
    """Parse what `look` printed on each worker that answered; the log is that of the last one."""
    looks = []
    parts = re.split(r"^@scalegpt (\S+) (\S+) (\S+) (\S+) (\d+)\n", text, flags=re.MULTILINE)
    for worker, state, code, run, size, log in zip(*[iter(parts[1:])] * 6, strict=True):
        looks.append(Look(worker, state, None if code == "-" else int(code), run, int(size), log))
    return looks


def stop(seconds: int, asked: bool) -> str:
    """Send SIGTERM, on which the run saves, and wait for its end.

    asked: by a person, who does not want the run to be started again. Otherwise a run that has not
    ended after `seconds` is killed.
    """
    wait = f"for i in $(seq {seconds}); do flock -n run.lock true && exit 0; sleep 1; done"
    last = "echo it still runs >&2; exit 1" if asked else "kill -KILL -- -$(cat run.pid)"
    return (
        f"{_ENTER}; if {_RUNNING}; then {'touch run.stopped; ' if asked else ''}"
        f"kill -TERM -- -$(cat run.pid); {wait}; {last}; fi"
    )


def follow() -> str:
    """Print the log as it grows, until the run ends."""
    return f"{_ENTER}; tail -n 100 -F --pid=$(cat run.pid) run.log"


def tail(lines: int) -> str:
    """Print the end of the log, each line after the worker's name."""
    return f'{_ENTER}; tail -n {lines} run.log | sed "s/^/$(hostname): /"'


def has(files: dict[str, int]) -> str:
    """Exit with 0 where every file, by its path, is there with its size in bytes."""
    tests = [f'[ "$(stat -c %s {shlex.quote(file)})" = {size} ]' for file, size in files.items()]
    return f"cd {FOLDER} && " + " && ".join(tests)
