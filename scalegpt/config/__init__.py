"""This room describes a run on paper: typed keys, YAML, command line, what may differ; no JAX."""

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
