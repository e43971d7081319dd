"""One frozen dataclass a stage kind: what a recipe may say under `stages.NAME`, with its default and its meaning.

Standard library only. Training keys are Megatron's, Slurm keys sbatch's long options with underscores. Alternatives,
such as the RL backends, are dataclasses of their own, told apart by a key. References: `launcher.references`.
"""

from __future__ import annotations

from launcher.configs.analyze import LEAST_TEXTS, AnalyzeConfig
from launcher.configs.checkpoints import ConvertConfig, MergeConfig
from launcher.configs.evaluate import EvaluateConfig
from launcher.configs.kinds import CONFIGS
from launcher.configs.model import ModelConfig
from launcher.configs.option import ITEM_NAME, adam_checks, default_of, identity, option, refuse_wrong, with_value
from launcher.configs.prepare import (
    ALLOWED_SPECIAL,
    END,
    PAD,
    AnyProblemSet,
    AnySource,
    DatasetSource,
    FilesSource,
    GeneratedSet,
    PrepareConfig,
    ProblemSetConfig,
    ProblemsSource,
    PublishedSet,
    SourceConfig,
    StdlibSource,
    TokenizerConfig,
)
from launcher.configs.resources import Component, Resources
from launcher.configs.rl import AlignerRL, AnyRL, MegatronRL, NemoRL, OpenInstructRL, RLConfig, TrlRL
from launcher.configs.train import DETERMINISTIC, Parallelism, TrainConfig

__all__ = [
    "ALLOWED_SPECIAL",
    "AlignerRL",
    "AnalyzeConfig",
    "AnyProblemSet",
    "AnyRL",
    "AnySource",
    "CONFIGS",
    "Component",
    "ConvertConfig",
    "DETERMINISTIC",
    "DatasetSource",
    "END",
    "EvaluateConfig",
    "FilesSource",
    "GeneratedSet",
    "ITEM_NAME",
    "LEAST_TEXTS",
    "MegatronRL",
    "MergeConfig",
    "ModelConfig",
    "NemoRL",
    "OpenInstructRL",
    "PAD",
    "Parallelism",
    "PrepareConfig",
    "ProblemSetConfig",
    "ProblemsSource",
    "PublishedSet",
    "RLConfig",
    "Resources",
    "SourceConfig",
    "StdlibSource",
    "TokenizerConfig",
    "TrainConfig",
    "TrlRL",
    "adam_checks",
    "default_of",
    "identity",
    "option",
    "refuse_wrong",
    "with_value",
]
