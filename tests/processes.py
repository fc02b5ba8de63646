"""A command of ours in several processes of several devices each, as on several hosts."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Gloo, which connects processes on CPUs, says so on standard output, too, by several threads at
# once: its words may stand in any order and on any number of lines.
GLOO = set("Gloo Rank is connected to peer ranks Expected number of".split())


def start(
    command: Sequence[object],
    count: int,
    devices: int,
    each: Sequence[Sequence[str]] = (),
    **environment: str,
) -> list[subprocess.Popen]:
    """command: arguments to python. each: what every process gets besides. They write to pipes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = ("SLURM", "OMPI")  # not as children of what starts the tests
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(launched)},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        **environment,
    }
    processes = []
    for index in range(count):
        argv = [sys.executable, *map(str, command), *(each[index] if each else ())]
        if count > 1:
            argv += [
                f"--distributed.coordinator=localhost:{port}",
                f"--distributed.num_processes={count}",
                f"--distributed.process_id={index}",
            ]
        processes.append(
            subprocess.Popen(
                argv,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    return processes


def finish(processes: Sequence[subprocess.Popen], seconds: float = 150) -> list[tuple[str, str]]:
    """(standard output, standard error) of each; no process outlives this."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(_without_gloo(out), err) for out, err in outputs]


def run(module: str, *argv: object, count: int = 2, devices: int = 4) -> list[tuple[str, str]]:
    """(standard output, standard error) of each; all must end well."""
    processes = start(["-m", module, *argv], count, devices)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * count, outputs
    return outputs


def _without_gloo(text: str) -> str:
    return "".join(
        line for line in text.splitlines(True) if not set(re.findall("[A-Za-z]+", line)) <= GLOO
    )
