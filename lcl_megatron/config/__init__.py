"""What can be chosen: frozen dataclasses, no torch. Start at ``RunConfig`` in ``run.py``."""

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.config.model import LanguageConfig, LossConfig, PoolConfig, VisionConfig
from lcl_megatron.config.run import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GuardConfig",
    "LanguageConfig",
    "LoggingConfig",
    "LossConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoolConfig",
    "RunConfig",
    "TrainingConfig",
    "VisionConfig",
]
