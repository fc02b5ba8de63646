"""Ask XLA's compiler what a training step needs, for this machine or for TPUs that are not there.

The package libtpu is the TPUs' own compiler, and runs on any x86 Linux: `pip install
'scalegpt[plan]'`.
"""

import contextlib
import importlib.util
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from scalegpt.config import Config
from scalegpt.errors import Mistake
from scalegpt.model import flops
from scalegpt.planning import hlo
from scalegpt.planning.chips import CLOCKS
from scalegpt.planning.topologies import Topology
from scalegpt.processes import startup
from scalegpt.step import build_for_training, sharding

_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any
}


@dataclass(frozen=True)
class Compiled:
    """A compiled step is what its compiler says of a run's update; bytes are of each device.

    seconds: that compiling took. state: bytes of weights, moments and a batch. temporary: the
    others' at the peak. host: those in the host's memory. step_seconds and mfu: by the cycles that
    a TPU's compiler expects its operations to take, without collectives and Pallas kernels, of
    which it states none; None elsewhere. cycles: these, of a device, by hlo.PARTS. collectives:
    bytes of an update by (kind, mesh axes, loops around them). unread: why the program could not be
    read, so that neither is known.
    """

    parameters: int
    kind: str
    mesh: dict[str, int]
    accumulation: int
    compiler: str
    seconds: float
    state: int
    temporary: int
    peak: int
    host: int
    step_seconds: float | None
    mfu: float | None
    cycles: Counter
    collectives: Counter
    unread: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return what a script reads."""
        keys = ("kind", "axes", "depth", "bytes")
        rows = [
            dict(zip(keys, (*key, size), strict=True)) for key, size in self.collectives.items()
        ]
        return {"fits": True, **vars(self), "collectives": rows}


class DoesNotFit(Mistake):
    """This is raised for a step that needs more memory than a device has; the compiler says it."""

    def as_dict(self) -> dict[str, Any]:
        """Return what a script reads."""
        return {"fits": False, "message": str(self)}


def compile_step(config: Config, topology: Topology | None) -> Compiled:
    """Compile the training step of scalegpt.train for a TPU topology, or None: this machine.

    Raises Mistake where there is no compiler for it, and where the step does not fit the devices'
    memory.
    """
    mesh = sharding.make_mesh(config.mesh, topology and tpu_devices(topology))
    steps = build_for_training(config, mesh)
    began = time.perf_counter()
    with memory_advice():
        compiled = steps.lower().compile()
    seconds = time.perf_counter() - began
    memory, text, unread = compiled.memory_analysis(), "", None
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # libtpu has operations that this jaxlib has not
        unread = str(error).splitlines()[0]
    cycles = hlo.cycles(text)
    state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    host, peak = memory.host_temp_size_in_bytes, getattr(memory, "peak_memory_in_bytes", 0)
    kind, step_seconds, mfu = mesh.devices.flat[0].device_kind, None, None
    # A TPU's stated peak counts the host's memory, too, and a CPU's no temporaries.
    if host or not peak or kind == "cpu":
        peak = state + temporary
    if cycles and kind in CLOCKS:
        tokens = config.batch.sequences * config.row_width
        step_seconds = cycles.total() / CLOCKS[kind]
        dtype = str(steps.model.dtype)
        mfu = flops.mfu(config.model, tokens / step_seconds, kind, mesh.size, dtype)
    return Compiled(
        parameters=steps.parameters,
        kind=kind,
        mesh=dict(mesh.shape),
        accumulation=steps.layout[0],
        compiler=f"libtpu {_libtpu()}" if topology else f"jax {jax.__version__}",
        seconds=seconds,
        state=state,
        temporary=temporary,
        peak=peak,
        host=host,
        step_seconds=step_seconds,
        mfu=mfu,
        cycles=cycles,
        collectives=hlo.table(hlo.collectives(text, mesh)),
        unread=unread,
    )


def _libtpu() -> str:
    """Return the version of the package, or the path of another library that is named instead."""
    named, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    own = package and package.origin and Path(package.origin).parent  # JAX itself names that one
    return named if named and Path(named).parent != own else version("libtpu")


def tpu_devices(topology: Topology) -> Any:
    """Describe a TPU's devices for its compiler; it need not be there.

    Raises Mistake without libtpu, and for GPUs, which it does not know.
    """
    from jax.experimental import topologies

    name = topology.name
    if not (topology.chip and topology.chip.axes):
        raise Mistake(
            f"{name}: only for TPUs is there a compiler that needs none of them; compile for a GPU "
            "on a machine that has it: python -m scalegpt.train --config CONFIG --compile-only"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise Mistake(
            f"compiling for {name} needs the TPUs' compiler, libtpu, which is not installed; "
            "pip install 'scalegpt[plan]'"
        )
    if not startup.on_tpu():  # it would look for one, and say at length that there is none
        for variable, value in _NO_TPU.items():
            os.environ.setdefault(variable, value)
    extra = {}
    if name.startswith(("v4", "v5p")):  # two cores of a chip act as one device
        extra["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=topology.slices, **extra
        ).devices
    except Exception as error:  # of any type, libtpu's
        raise Mistake(
            f"libtpu cannot compile for {name}: {str(error).splitlines()[0]}; if another program "
            "has it loaded, set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        ) from None


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """Raise DoesNotFit with advice where JAX, at length, reports that a device is out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"the step does not fit: {str(error).splitlines()[0]}\nlower batch.microbatch, "
            "raise mesh.fsdp, or set model.remat=full"
        ) from None
