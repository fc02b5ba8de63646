"""This tool kills a run at random moments and shows that its rows are those of an unbroken run.

    python tools/crash_test.py --config configs/demo.yaml --kills 30 [--processes 2]
        --optim.steps=300 --eval.every=20 --eval.windows=64 --checkpoint.every=10

First the run is made without a fault, in run.out_dir/unbroken. Then it is made again, in
run.out_dir/killed, while SIGKILL ends it during start-up, steps, evaluations and saves, in turn.
With objective.name=grpo a step begins with the answers that are written for it.
After each kill the same command continues the run; a finished run begins anew until all kills are
spent. In the end every row of metrics.jsonl must be there once, with the same losses, digit for
digit: exit code 0, otherwise 1. With --processes N one process is killed, and the others must leave
by themselves with exit code 5.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.config import Config, command_line
from scalegpt.errors import Mistake
from scalegpt.processes.command import run_command
from scalegpt.processes.exits import Exit
from scalegpt.run.resume import with_model

FLAGS = {
    "--kills": {"type": int, "default": 30, "help": "how many (default 30)"},
    "--hours": {"type": float, "help": "go on for so long instead"},
    "--processes": {"type": int, "default": 1, "help": "of the run, on this machine (default 1)"},
    "--devices": {"type": int, "default": 1, "help": "simulated ones, of each process (default 1)"},
    "--moments": {
        "nargs": "+",
        "choices": ("start", "step", "evaluation", "save"),
        "default": ("step", "save", "evaluation", "start"),
        "help": "when to kill",
    },
    "--random-seed": {"type": int, "default": 0, "help": "of the moments (default 0)"},
    "--json": {"action": "store_true", "help": "print one JSON object at the end"},
}
COMPARED = (
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "train/spike",
    "val/loss",
    "val/best_loss",
    "rl/reward",
    "rl/length",
    "rl/entropy",
    "val/reward",
    "val/best_reward",
)
PATIENCE = 60  # seconds in which the other processes must leave
STILL_THERE = 999  # the exit code of a process that did not leave
STUCK = 600  # seconds to wait for the moment to kill, after which the run counts as hung


@dataclass(frozen=True)
class Kill:
    """A kill ended one process of a run during `moment`, after the row of `step`.

    codes: exit codes of all processes. noticed: seconds until the last of the others had left.
    """

    moment: str
    step: int
    process: int
    noticed: float
    codes: tuple[int, ...]

    @property
    def faults(self) -> list[str]:
        others = [code for i, code in enumerate(self.codes) if i != self.process]
        failed = set(others) - {Exit.FAILED}
        return [f"the others left with {others}, not with {Exit.FAILED}"] if failed else []

    def __str__(self) -> str:
        where = f"during {self.moment} after row {self.step}"
        if len(self.codes) == 1:
            return where
        return f"{where}, process {self.process}; the others left after {self.noticed:.1f} s"


def main(argv: list[str]) -> int:
    config, flags = command_line.parse(argv, "tools/crash_test.py", FLAGS)
    config = with_model(config)
    folder = Path(config.run.out_dir)
    check(flags, folder)
    folder.mkdir(parents=True, exist_ok=True)
    command, began = write_command(config, folder, flags), time.time()
    print("the unbroken run ...", flush=True)
    if fault := finish(command.start(folder / "unbroken"), folder / "unbroken"):
        raise Mistake(f"the run itself fails: {fault}")
    expected = rows(folder / "unbroken")
    kills: list[Kill] = []
    faults: list[str] = []
    rng, runs = random.Random(flags.random_seed), 0
    until = began + 3600 * flags.hours if flags.hours else None

    def more() -> bool:
        return time.time() < until if until else len(kills) < flags.kills

    while more() and not faults:
        runs += 1
        shutil.rmtree(folder / "killed", ignore_errors=True)
        for kill in one_run(command, folder / "killed", config, flags, rng, more, len(kills)):
            kills.append(kill)
            print(f"kill {len(kills)}: {kill}", flush=True)
            faults += kill.faults
        faults += compare(expected, folder / "killed")
    report = {
        "kills": len(kills),
        "moments": {m: sum(k.moment == m for k in kills) for m in flags.moments},
        "runs": runs,
        "rows": len(expected),
        "slowest_notice_seconds": round(max((k.noticed for k in kills), default=0.0), 1),
        "seconds": round(time.time() - began),
        "faults": faults,
    }
    print(json.dumps(report) if flags.json else summary(report))
    return 1 if faults else 0


def check(flags: argparse.Namespace, folder: Path) -> None:
    if flags.kills < 1 or flags.processes < 1 or flags.devices < 1:
        raise Mistake("--kills, --processes and --devices are 1 or more")
    if flags.hours is not None and not 0 < flags.hours < 1000:
        raise Mistake(f"--hours={flags.hours} must be above 0 and below 1000")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise Mistake(f"run.out_dir={folder} is not empty; give a folder of its own")


def summary(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    moments = ", ".join(f"{n} during {moment}" for moment, n in report["moments"].items())
    verdict = "each is there once, digit for digit the unbroken run's"
    if report["faults"]:
        verdict = "\n".join(["", *(f"FAULT {fault}" for fault in report["faults"])])
    return (
        f"{report['kills']} kills ({moments}) in {report['runs']} runs of {report['rows']} values: "
        f"{verdict}"
    )


def one_run(
    command: "Command",
    out_dir: Path,
    config: Config,
    flags: argparse.Namespace,
    rng: random.Random,
    more: Callable[[], bool],
    kills: int,
) -> Iterator[Kill]:
    """Start the command until the run is done, and kill it as long as `more()` kills are to come.

    kills: how many there have been.
    """
    while True:
        processes = command.start(out_dir)
        moment = flags.moments[kills % len(flags.moments)]
        if more() and wait_for(moment, processes, out_dir, config, rng):
            kills += 1
            yield kill_one(moment, processes, out_dir, rng)
        elif fault := finish(processes, out_dir):
            raise RuntimeError(f"after {kills} kills the same command does not go on: {fault}")
        else:
            return


@dataclass(frozen=True)
class Command:
    argv: tuple[str, ...]
    processes: int
    environment: dict[str, str]

    def start(self, out_dir: Path) -> list[subprocess.Popen]:
        """Start the run's processes, with output to files: a pipe that nobody reads would fill."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for i in range(self.processes):
            several = (
                [
                    f"--distributed.coordinator=localhost:{port}",
                    f"--distributed.num_processes={self.processes}",
                    f"--distributed.process_id={i}",
                ]
                if self.processes > 1
                else []
            )
            with open(f"{out_dir}.{i}.log", "w") as log:
                argv = [*self.argv, f"--run.out_dir={out_dir}", *several]
                started.append(
                    subprocess.Popen(
                        argv, stdout=log, stderr=subprocess.STDOUT, env=self.environment
                    )
                )
        return started


def write_command(config: Config, folder: Path, flags: argparse.Namespace) -> Command:
    file = folder / "config.yaml"
    log = config.log.model_copy(update={"every": 1, "tensorboard": False, "wandb": False})
    file.write_text(config.model_copy(update={"log": log}).to_yaml(), encoding="utf-8")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(flags.devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    argv = (sys.executable, "-u", "-m", "scalegpt.train", "--config", str(file))
    return Command(argv, flags.processes, environment)


def wait_for(
    moment: str,
    processes: list[subprocess.Popen],
    out_dir: Path,
    config: Config,
    rng: random.Random,
) -> bool:
    """Wait until the moment to kill; False when the processes ended before."""
    began, old_step = time.monotonic(), last_step(out_dir)
    if moment == "start":
        delay = rng.uniform(0.2, 8)
        while time.monotonic() < began + delay:
            if processes[0].poll() is not None:
                return False
            time.sleep(0.01)
        return True
    updates = rng.randint(1, 2 * max(1, config.checkpoint.every))  # of this start, before the kill
    saves = {p.name for p in (out_dir / "checkpoints").glob("*")}
    first = None
    while processes[0].poll() is None:
        if time.monotonic() > began + STUCK:
            raise RuntimeError(f"nothing has happened for {STUCK} s in {out_dir}")
        step, val = last_step(out_dir), last_step(out_dir, f"val/{config.goal}")
        if first is None and step != old_step:
            first = step
        ready = first is not None and step >= first + updates
        if moment == "evaluation":
            ready = first is not None and step % max(1, config.eval.every) == 0 and val < step
        elif moment == "save":
            # A new folder is a save that has begun: Orbax's temporary one, or a checkpoint's.
            new = {p.name for p in (out_dir / "checkpoints").glob("*")} - saves
            ready = bool(new)
        if ready:
            time.sleep(rng.uniform(0, 0.05))
            return processes[0].poll() is None
        time.sleep(0.001)
    return False


def kill_one(
    moment: str, processes: list[subprocess.Popen], out_dir: Path, rng: random.Random
) -> Kill:
    """Kill one of the processes, and wait until the others have left."""
    victim = rng.randrange(len(processes))
    step = last_step(out_dir)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, began + PATIENCE - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(STILL_THERE)
    return Kill(moment, step, victim, time.monotonic() - began, tuple(codes))


def finish(processes: list[subprocess.Popen], out_dir: Path) -> str:
    """Wait for all processes; return what went wrong, or ""."""
    codes = [process.wait() for process in processes]
    if not any(codes):
        return ""
    logs = [Path(f"{out_dir}.{i}.log").read_text(errors="replace") for i in range(len(codes))]
    return f"exit codes {codes}\n" + "\n".join(log[-1500:] for log in logs)


def last_step(out_dir: Path, key: str = "train/loss") -> int:
    """Return the step of the last whole row that has the key, -1 without one."""
    try:
        lines = (out_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return -1
    return next((json.loads(x)["step"] for x in reversed(lines) if f'"{key}"'.encode() in x), -1)


def rows(out_dir: Path) -> dict[tuple[int, str], Any]:
    """Return the values to compare, by (step, key).

    Raises ValueError for a value that is there twice and for a row that was torn by a kill.
    """
    values: dict[tuple[int, str], Any] = {}
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in row.keys() - {"step", "time"}:
            if (row["step"], key) in values:
                raise Mistake(f"{key} of step {row['step']} is there twice")
            values[row["step"], key] = row[key]
    return {place: value for place, value in values.items() if place[1] in COMPARED}


def compare(expected: dict[tuple[int, str], Any], out_dir: Path) -> list[str]:
    """Say how the run's values differ from the expected ones."""
    try:
        values = rows(out_dir)
    except ValueError as error:
        return [f"metrics.jsonl: {error}"]
    differences = {
        "rows missing": expected.keys() - values.keys(),
        "rows too many": values.keys() - expected.keys(),
        "rows that differ": [
            x for x in expected.keys() & values.keys() if expected[x] != values[x]
        ],
    }
    return [f"{name}: {len(at)}, first {min(at)}" for name, at in differences.items() if at]


if __name__ == "__main__":
    run_command(main)
