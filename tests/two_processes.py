"""A command of ours in two processes of four devices each, as on two hosts."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path


def run(module: str, *argv: object) -> list[tuple[str, str]]:
    """(standard output, standard error) of each; both must end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", module, *map(str, argv), "--distributed.num_processes=2",
               f"--distributed.coordinator={address}"]  # fmt: skip
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))},
        "JAX_NUM_CPU_DEVICES": "4",
    }
    processes = [
        subprocess.Popen(
            [*command, f"--distributed.process_id={i}"], cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Gloo, which connects processes on CPUs, says so on standard output, too, by several threads at
    # once: its words may stand in any order and on any number of lines.
    gloo = set("Gloo Rank is connected to peer ranks Expected number of".split())
    return [("".join(line for line in out.splitlines(True)
                     if not set(re.findall("[A-Za-z]+", line)) <= gloo), err)
            for out, err in outputs]  # fmt: skip
