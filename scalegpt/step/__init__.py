"""This room turns a config and a mesh into compiled functions, by jit, shard_map and optax."""

import sys

import jax
from jax.sharding import Mesh

from scalegpt.config import Config
from scalegpt.step import build, pmap
from scalegpt.step.build import Steps
from scalegpt.step.update import State

__all__ = ["State", "Steps", "build_for_training"]


def build_for_training(config: Config, mesh: Mesh) -> Steps:
    """Build the functions of a run with the backend that run.backend names."""
    if jax.config.jax_debug_nans:
        # A state holds NaN on purpose (health.Health), which JAX would take for a fault.
        jax.config.update("jax_debug_nans", False)
        note = "note: JAX_DEBUG_NANS is off in a run, which reports each update that is not finite"
        print(note, file=sys.stderr)
    backend = pmap.build_steps if config.run.backend == "pmap" else build.build_steps
    return backend(config, mesh, *build.resolve(config, mesh))
