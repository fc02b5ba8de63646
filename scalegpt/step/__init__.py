"""This room turns a config and a mesh into compiled functions, by jit, shard_map and optax."""

from jax.sharding import Mesh

from scalegpt.config import Config
from scalegpt.step import build, pmap
from scalegpt.step.build import Steps
from scalegpt.step.update import State

__all__ = ["State", "Steps", "build_for_training"]


def build_for_training(config: Config, mesh: Mesh) -> Steps:
    """Build the functions of a run with the backend that run.backend names."""
    backend = pmap.build_steps if config.run.backend == "pmap" else build.build_steps
    return backend(config, mesh, *build.resolve(config, mesh))
