"""This room describes a run on paper: typed keys, YAML, command line, what may differ; no JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalegpt.config.recipe import ModelConfig, OptimConfig
    from scalegpt.config.schema import (
        BatchConfig,
        CheckpointConfig,
        Config,
        DataConfig,
        DistributedConfig,
        DpoConfig,
        EvalConfig,
        GrpoConfig,
        LogConfig,
        MeshConfig,
        ObjectiveConfig,
        RunConfig,
    )

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "DpoConfig",
    "EvalConfig",
    "GrpoConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only now: preparing data reads flags, and needs no pydantic."""
    if name not in __all__:
        raise AttributeError(f"module 'scalegpt.config' has no attribute {name!r}")
    from scalegpt.config import schema  # which has those of recipe, too

    return getattr(schema, name)
