"""Start-up of a run's processes, and the check that all of them are set for the same run."""

import contextlib
import importlib.util
import os
import platform
import re
import socket
from collections import Counter
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
from scalegpt.processes import handshake
from scalegpt.processes.agreement import UNLIMITED, Deadline, gather
from scalegpt.processes.group import Alone, Group
from scalegpt.processes.phases import Phases
from scalegpt.processes.stop_request import StopRequest

# Seconds. JAX's service need not find out who is dead: the link does, at once. Nor can the service
# tell a process that is stopped, or a machine that sleeps, from a dead one; a phase's deadline ends
# those.
_HEARTBEAT = 600
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_BY_HAND = "give --distributed.coordinator=HOST:PORT, .num_processes=N, .process_id=I"
_PLUGINS = ("jax-", "libtpu", "nvidia-")  # beginnings of the names of what drives devices
# Variables that change what is computed, or how processes talk while they compute.
_VARIABLES = re.compile(
    r"JAX_|(XLA_FLAGS|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|NCCL_ALGO|NCCL_PROTO)$"
)
# Those that may differ: which process this is, where it keeps what it compiles, what it says.
_OF_A_PROCESS = re.compile(
    r"JAX_(LOCAL_DEVICE_IDS|\w*VISIBLE_DEVICES|PROCESS|COORDINATOR|PORT"
    r"|COMPILATION_CACHE_DIR|PERSISTENT_CACHE|LOG|DEBUG_LOG|DUMP)"
)


def start(config: DistributedConfig, seconds: float = 900.0) -> Group | Alone:
    """Find the processes of the run and join them; see `find` and `join`."""
    group = find(config, seconds)
    join(group, seconds)
    return group


def find(config: DistributedConfig, seconds: float, folder: str | None = None) -> Group | Alone:
    """Return the processes of this run, as flags say, or Slurm, Open MPI or a TPU host.

    folder: the run's own, on a disk or behind a URL, which all processes share. Nothing is
    connected yet; but a TPU host waits at most so many seconds until the name of process 0's host
    is known. Raises Mistake for flags that do not belong together, and where nobody is found.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(value is not None for value in given):
        _check(config)
    elif not _launched():
        _refuse_other_launchers()
        return Alone()
    # Where Slurm or Open MPI has started the processes, JAX would give each of them one GPU only,
    # whatever this variable says.
    numbers = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        devices = [int(number) for number in numbers.split(",")] if numbers else None
    except ValueError:
        raise Mistake(f"JAX_LOCAL_DEVICE_IDS={numbers} is not device numbers, as 0,1") from None
    # Private, for jax.distributed.initialize asks Slurm, Open MPI and TPU hosts for the others and
    # starts JAX's service in one go; the link needs the answer before that.
    from jax._src.clusters import ClusterEnv  # noqa: TID251

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            *given, devices, None, int(seconds)
        )
    except (OSError, RuntimeError) as error:
        raise Mistake(
            f"the host of process 0 was not found: {error}; is the network up? Or else {_BY_HAND}"
        ) from error
    if count == 1:
        return Alone()
    if address is None or count is None or index is None:
        raise Mistake(
            "several processes were started here, but not in a way that tells where the others "
            f"are; {_BY_HAND}"
        )
    host, _, port = address.rpartition(":")
    secret = handshake.shared_secret(config.coordinator is None, folder)
    return Group(host.strip("[]"), int(port), count, index, secret, devices)


def join(
    group: Group | Alone,
    seconds: float,
    phases: Phases | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Connect the processes and start JAX's own service, before anything asks for a device.

    phases, stop: as in `Group.connect`. Ends the process when not all have come after `seconds`.
    """
    if isinstance(group, Alone):
        return
    # The coordinator's port is that of the link. JAX's service has another one, which process 0
    # tells the others.
    port = group.connect(seconds, phases, stop)
    address, listen_at = (
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for host in (group.host, handshake.interface(group.host) or "::")
    )
    # Strangers may connect with JAX's service, too, which keeps each of them in a file descriptor.
    import resource  # there is none on Windows

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # It would swallow SIGTERM; StopRequest agrees with the others on where to stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        group.count,
        group.index,
        group.local_devices,
        coordinator_bind_address=listen_at,
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds) + 60,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=10,
    )


def _check(config: DistributedConfig) -> None:
    """Raise Mistake for flags that do not say where the processes are and which one this is."""
    if None in (config.coordinator, config.num_processes, config.process_id):
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


def _launched() -> bool:
    """Return whether Slurm or Open MPI has started several processes, or a TPU may have others."""
    sizes = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    # Kaggle calls the only host of a TPU "local", which JAX would look up until the deadline.
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", ","))
    others = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return any(size.isdigit() and int(size) > 1 for size in sizes) or (others and on_tpu())


def _refuse_other_launchers() -> None:
    """Raise Mistake where torchrun, say, has started several processes, each to train alone."""
    for launcher, size, rank in (
        ("torchrun or the like", "WORLD_SIZE", "RANK"),
        ("MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK"),
        ("Kubeflow or the like", "NUM_PROCESSES", "PROCESS_ID"),
    ):
        count, index = os.environ.get(size, ""), os.environ.get(rank, "")
        if count.isdecimal() and index.isdecimal() and int(count) > 1:
            host = os.environ.get("MASTER_ADDR", "HOST")
            raise Mistake(
                f"{launcher} has started this process ({size}={count}, {rank}={index}), whose "
                "variables are not read. On one machine start `python -m scalegpt.train` once: it "
                "drives all GPUs. On several, start it once on each and add "
                f"--distributed.coordinator={host}:PORT --distributed.num_processes=N "
                f"--distributed.process_id=I; or, with a GPU for each process, set "
                f"JAX_LOCAL_DEVICE_IDS and add --distributed.coordinator={host}:PORT "
                f"--distributed.num_processes={count} --distributed.process_id={index}"
            )


def on_tpu() -> bool:
    """Return whether this machine has a TPU that JAX would use, without touching it."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    wants_tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return wants_tpu and bool(chips) and importlib.util.find_spec("libtpu") is not None


def facts(config: Config, data: Mapping[str, str], latest: int | None) -> dict[str, str]:
    """Return what must be the same in all processes of a run: config, data, latest checkpoint.

    data: name -> mark of its tokens and documents. The folders of data and their caches may differ
    between hosts.
    """
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
        **{name: str(value) for name, value in settings.items()},
        **{f"data set {i}": mark for i, mark in enumerate(data.values())},
        "latest checkpoint": "none" if latest is None else f"step {latest}",
    }


def surroundings() -> dict[str, str]:
    """Return what must be the same around all processes: versions of packages, and variables.

    Compare it before anything asks for a device: a process without the others' plugin for GPUs
    would go on with its CPU, while they wait for its GPUs. Where XLA writes what it compiles may
    differ.
    """
    plugins = {d.name for d in metadata.distributions() if (d.name or "").startswith(_PLUGINS)}
    variables = {
        name: " ".join(flag for flag in value.split() if not flag.startswith("--xla_dump"))
        for name, value in sorted(os.environ.items())
        if _VARIABLES.match(name) and not _OF_A_PROCESS.match(name)
    }
    versions = {"python": platform.python_version(), "scalegpt": scalegpt.__version__}
    versions |= {name: metadata.version(name) for name in (*_PACKAGES, *sorted(plugins))}
    return {
        **{f"version of {name}": version for name, version in versions.items()},
        **{f"environment variable {name}": value for name, value in variables.items() if value},
    }


def same_everywhere(facts: Mapping[str, str]) -> None:
    """Check that the facts, name -> value, are the same in all processes.

    Raises Mistake, in all processes, naming those that differ from process 0 and both values.
    """
    ours = {"host": socket.gethostname(), **facts}
    if difference := _difference(gather("facts", ours, Deadline(UNLIMITED))):
        raise Mistake(difference)


def self_check() -> None:
    """Check that all processes have the same devices, and that these work together.

    Raises Mistake as `same_everywhere`.
    """
    kinds = Counter(device.device_kind for device in jax.local_devices())
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    same_everywhere({"devices of a process": text})
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
    """Return the first facts in which a process differs from process 0, or an empty text."""
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
            return "\n  ".join(["the processes are not set for the same work:", *lines[:5]])
    return ""
