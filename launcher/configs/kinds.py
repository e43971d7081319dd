"""The config of each stage kind."""

from __future__ import annotations

from typing import Any

from launcher.configs.analyze import AnalyzeConfig
from launcher.configs.checkpoints import ConvertConfig, MergeConfig
from launcher.configs.evaluate import EvaluateConfig
from launcher.configs.prepare import PrepareConfig
from launcher.configs.rl import AnyRL
from launcher.configs.train import TrainConfig

CONFIGS: dict[str, Any] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "rl": AnyRL,
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
}
