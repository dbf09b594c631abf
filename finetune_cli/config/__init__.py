"""Options of every verb: their schema, their composition by Hydra, their saved form.

What is imported from here is plain dataclasses, so that every floor above may use it: Hydra and OmegaConf stay inside this package.
"""

from __future__ import annotations

from finetune_cli.config.choices import (
    DataFormat,
    DeviceName,
    ExtraFields,
    OptimizerName,
    Order,
    Pooling,
    Precision,
    Quoting,
    RowPolicy,
    Schedule,
    Split,
)
from finetune_cli.config.invocation import Invocation
from finetune_cli.config.schema import (
    SCHEMAS,
    CheckConfig,
    DataConfig,
    DeviceConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PredictConfig,
    ReplayConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    TrainDeviceConfig,
    TrainSection,
    option,
)

__all__ = [
    "SCHEMAS",
    "CheckConfig",
    "DataConfig",
    "DataFormat",
    "DeviceConfig",
    "DeviceName",
    "EvalConfig",
    "ExtraFields",
    "Invocation",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerName",
    "Order",
    "Pooling",
    "Precision",
    "PredictConfig",
    "Quoting",
    "ReplayConfig",
    "RowPolicy",
    "RunConfig",
    "Schedule",
    "Split",
    "TaskConfig",
    "TrainConfig",
    "TrainDeviceConfig",
    "TrainSection",
    "option",
]
