"""A CPU as two JAX devices, each with half of the rows: two operations at work at a time."""

import contextlib
import os

import jax

from scalegpt.config import Config, MeshConfig

# Not one a core: each holds a copy of the state, and the rounding of a run would be the machine's.
DEVICES = 2


def choose(config: Config) -> None:
    """Make DEVICES of the CPU if nobody asked for another number; before JAX has its devices.

    It says nothing about accelerators: where there is one, JAX does not train on the CPU.
    """
    if not fits(config):
        return
    # XLA takes a thread a core. That is enough: each device waits in one collective at a time.
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", DEVICES)


def fits(config: Config) -> bool:
    """Whether DEVICES devices would do, and nothing was said about devices or mesh."""
    said = jax.config.jax_num_cpu_devices != -1 or "device_count" in os.environ.get("XLA_FLAGS", "")
    batch = config.batch
    return not (
        said
        or config.mesh != MeshConfig()
        or batch.sequences % (DEVICES * (batch.microbatch or 1))
        or _cores() < DEVICES
    )


def _cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
