"""Start-up of several processes, and whether they are all set for the same run."""

import importlib.util
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import scalegpt
from scalegpt.config import Config, DistributedConfig
from scalegpt.errors import Mistake
from scalegpt.processes import group, meeting
from scalegpt.processes.agreement import Deadline, gather

# JAX's service need not find out who is dead, which the line does, and at once. It cannot tell a
# process that is stopped, or a machine that sleeps, from a dead one; the phases' deadlines judge.
_HEARTBEAT = 600
# Whoever does not come to the self-check is the business of the line, and of the deadline.
_WEEK = 7 * 24 * 3600.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def start(config: DistributedConfig, seconds: float = 900.0) -> None:
    """Join the other processes of the run, if there are any; before anything asks for a device.

    By flags, or as Slurm, Open MPI and TPU hosts announce themselves. Raises ValueError for
    flags that do not belong together. Ends the process when not all have come in so many seconds.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise Mistake(
                "--distributed.coordinator=HOST:PORT, --distributed.num_processes=N and "
                "--distributed.process_id=I belong together; give all three or none"
            )
        host, _, port = config.coordinator.rpartition(":")
        if not (host and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
            raise Mistake(f"distributed.coordinator={config.coordinator} is not HOST:PORT")
        if config.process_id >= config.num_processes:
            raise Mistake(
                f"distributed.process_id={config.process_id} must be below "
                f"distributed.num_processes={config.num_processes}: they count from 0"
            )
    elif not _announced():
        return
    # Slurm's and Open MPI's detection would give each task one GPU, whatever this says.
    said = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(i) for i in said.split(",")] if said else None
    # Private, for jax.distributed.initialize asks Slurm, Open MPI and TPU hosts for the others and
    # starts JAX's service in one go; group.join needs the answer before that.
    from jax._src.clusters import ClusterEnv  # noqa: TID251

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        *given, devices, None, int(seconds)
    )
    if count == 1:
        return
    if address is None or count is None or index is None:
        raise Mistake(
            "several processes were started here, but not in a way that tells where the others "
            "are; give --distributed.coordinator=HOST:PORT, .num_processes=N, .process_id=I"
        )
    host, _, port = address.rpartition(":")
    # The coordinator's port is that of our line; JAX's service gets another one, told there.
    secret = meeting.shared_secret(launched=config.coordinator is None)
    port = group.join(host.strip("[]"), int(port), count, index, seconds, secret)
    listen_at = meeting.interface(host.strip("[]")) or "::"
    listen_at = f"[{listen_at}]" if ":" in listen_at else listen_at
    # It would swallow SIGTERM; StopRequest and the line agree on where to stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{host}:{port}",
        count,
        index,
        devices,
        coordinator_bind_address=f"{listen_at}:{port}",
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds) + 60,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=10,
    )


def _announced() -> bool:
    """Whether something that jax.distributed understands has started several processes."""
    sizes = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    return any(size.isdigit() and int(size) > 1 for size in sizes) or on_tpu()


def on_tpu() -> bool:
    """Whether this is a TPU's host, without touching the TPU."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    wants_tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return wants_tpu and bool(chips) and importlib.util.find_spec("libtpu") is not None


def facts(config: Config, data: Mapping[str, str], latest: int | None) -> dict[str, str]:
    """What must be the same in all processes: config, data, versions, the checkpoint to go on from.

    data: name -> fingerprint. Where the data lie, and where they are staged, is each host's own.
    """
    versions = {"python": platform.python_version(), "scalegpt": scalegpt.__version__}
    versions |= {name: metadata.version(name) for name in _PACKAGES}
    keys = config.model_dump(
        exclude={"distributed": True, "run": {"out_dir"}, "data": {"path", "cache_dir", "prepare"}}
    )
    settings = {
        f"{section}.{key}": value
        for section, values in keys.items()
        for key, value in values.items()
    }
    settings["weights of the data"] = list(config.data.weights.values())
    return {
        **{f"version of {name}": version for name, version in versions.items()},
        **{name: str(value) for name, value in settings.items()},
        **{f"data set {i}": mark for i, mark in enumerate(data.values())},
        "latest checkpoint": "none" if latest is None else f"step {latest}",
    }


def self_check(facts: Mapping[str, str]) -> None:
    """That all processes are set for the same run, and that their devices add up.

    Raises ValueError, in all processes, naming one that differs from process 0 and both values.
    """
    if jax.process_count() > 1:
        every = gather("scalegpt/facts", {"host": group.line.host, **facts}, Deadline(_WEEK))
        if difference := _difference(every):
            raise Mistake(difference)
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, P("all")), NamedSharding(mesh, P())
    numbers = np.arange(1, devices + 1, dtype=np.int32)
    there = jax.make_array_from_callback(numbers.shape, spread, lambda index: numbers[index])
    total = int(jax.jit(lambda x: x.sum(), out_shardings=whole)(there))
    if total != numbers.sum():
        raise RuntimeError(
            f"self-check: the numbers 1 to {devices}, one on each device, add up to {total} "
            f"instead of {numbers.sum()}; a device or the network between them is at fault"
        )


def _difference(every: list[dict[str, str]]) -> str:
    """The first facts in which a process differs from process 0, or an empty text."""
    first = every[0]
    for index, other in enumerate(every):
        keys = [key for key in {**first, **other} if key != "host"]
        lines = [
            f"{key}: process 0 ({first['host']}) has {first.get(key, 'none')}, process {index}"
            f" ({other['host']}) has {other.get(key, 'none')}"
            for key in keys
            if first.get(key) != other.get(key)
        ]
        if lines:
            return "\n  ".join(["the processes are not set for the same run:", *lines[:5]])
    return ""
