"""Start-up of several processes, and the request to stop, which may come at any moment."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils

from scalegpt.config import DistributedConfig


def start(config: DistributedConfig) -> None:
    """Join the other processes of the run, if there are any; before anything asks for a device.

    By flags, or as Slurm, Open MPI and TPU hosts announce themselves. Raises ValueError for
    flags that do not belong together.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError(
                "--distributed.coordinator=HOST:PORT, --distributed.num_processes=N and "
                "--distributed.process_id=I belong together; give all three or none"
            )
        host, _, port = config.coordinator.rpartition(":")
        if not (host and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
            raise ValueError(f"distributed.coordinator={config.coordinator} is not HOST:PORT")
        if config.process_id >= config.num_processes:
            raise ValueError(
                f"distributed.process_id={config.process_id} must be below "
                f"distributed.num_processes={config.num_processes}: they count from 0"
            )
        jax.distributed.initialize(*given)
    elif _announced():
        jax.distributed.initialize()


def _announced() -> bool:
    """Whether something that jax.distributed understands has started several processes."""
    sizes = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(size.isdigit() and int(size) > 1 for size in sizes):
        return True
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    wants_tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return wants_tpu and bool(chips) and importlib.util.find_spec("libtpu") is not None


class StopRequest:
    """Notices Ctrl-C and SIGTERM, so that the run can save at the end of a step and leave.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._asked, self._alone = False, jax.process_count() == 1
        signal.signal(signal.SIGINT, self._notice)
        if self._alone:  # else jax.distributed watches for SIGTERM, in all processes together
            signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step; once more to leave at once", file=sys.stderr)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in every process, without waiting."""
        if self._alone:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
