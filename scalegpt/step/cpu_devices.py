"""Make two JAX devices of a CPU, each with half of the rows, so that two operations overlap."""

import contextlib
import math
import os

import jax

from scalegpt.config import Config, MeshConfig

# Not one a core: each holds a copy of the state, and rounding would depend on the machine.
DEVICES = 2


def choose(config: Config) -> None:
    """Make DEVICES devices of the CPU if the user asked for no number; call it before JAX starts.

    This changes nothing for accelerators: where there is one, JAX does not train on the CPU.
    """
    if not fits(config):
        return
    # XLA's one thread a core is enough: each device waits in one collective at a time.
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", DEVICES)


def fits(config: Config) -> bool:
    """Tell whether batch and cores allow DEVICES, and the user set neither devices nor mesh."""
    xla_flags, batch = os.environ.get("XLA_FLAGS", ""), config.batch
    return not (
        jax.config.jax_num_cpu_devices != -1
        or "device_count" in xla_flags
        or config.mesh != MeshConfig()
        or math.gcd(batch.sequences, *batch.growth.values()) % (DEVICES * (batch.microbatch or 1))
        or _cores() < DEVICES
    )


def _cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
