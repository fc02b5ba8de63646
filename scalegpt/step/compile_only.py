"""Compile the training step for this machine's devices, or for a TPU slice that need not exist."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from scalegpt.config import Config
from scalegpt.errors import Mistake
from scalegpt.step import build_for_training, sharding


def compile_only(config: Config, where: str) -> None:
    """Compile the step and print its memory and compile time. where: "here" or a TPU topology.

    Raises Mistake for an unknown topology and for a step that does not fit the devices' memory.
    """
    mesh = sharding.make_mesh(config.mesh, None if where == "here" else tpu_devices(where))
    steps = build_for_training(config, mesh)
    began = time.perf_counter()
    with memory_advice():
        compiled = steps.lower().compile()
    memory = compiled.memory_analysis()
    kind, gib = mesh.devices.flat[0].device_kind, 2**30
    print(
        f"{steps.parameters:,} parameters on {mesh.size} x {kind}, "
        f"{dict(mesh.shape)}, accumulation {steps.layout[0]}\n"
        f"compiled in {time.perf_counter() - began:.0f} s; GiB a device: "
        f"state and batch {memory.argument_size_in_bytes / gib:.2f}, "
        f"temporary {memory.temp_size_in_bytes / gib:.2f}"
    )


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """Raise Mistake with advice where JAX, at length, reports that a device is out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Mistake(
            f"the step does not fit: {str(error).splitlines()[0]}\nlower batch.microbatch, "
            "raise mesh.fsdp, or set model.remat=full"
        ) from None


def tpu_devices(name: str) -> Any:
    """Describe the devices of a TPU slice for the compiler; it need not exist. Raises Mistake."""
    from jax.experimental import topologies

    extra = {}
    if name.startswith(("v4", "v5p", "v5:")):  # two cores of a chip act as one device
        extra["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
    except Exception as error:  # of any type: libtpu's, about the name that the user typed
        raise Mistake(
            f"--compile-only={name}: {str(error).splitlines()[0]}; names are like v3-8, v4:2x2x1, "
            "v5e:4x4, v6e:2x2, and the package libtpu must be installed"
        ) from None
