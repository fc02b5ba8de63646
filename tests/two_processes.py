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
    # Gloo, which connects processes on CPUs, says on standard output too to how many: "[Gloo] Rank
    # 0 is connected ... is : 1". Its threads do so at once, so that a number may stand alone.
    noise = re.compile(r".*\[Gloo\].*\n?|[\d\s]*\n")
    return [("".join(line for line in out.splitlines(True) if not noise.fullmatch(line)), err)
            for out, err in outputs]  # fmt: skip
