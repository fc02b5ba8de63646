"""From a config and a mesh to compiled functions: all that says jit, shard_map or optax."""

from jax.sharding import Mesh

from scalegpt.config import Config
from scalegpt.step import build, pmap
from scalegpt.step.build import Steps
from scalegpt.step.update import State

__all__ = ["State", "Steps", "build_for_training"]


def build_for_training(config: Config, mesh: Mesh) -> Steps:
    """The functions of a run by the backend it asks for."""
    backend = pmap.build_steps if config.run.backend == "pmap" else build.build_steps
    return backend(config, mesh, *build.resolve(config, mesh))
