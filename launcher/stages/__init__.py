"""The stage kinds, one module each: what a config reads, the ports it fills, and the steps that do it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.configs import CONFIGS
from launcher.spec import SpecError, StageSpec, decode
from launcher.stages.analyze import Analyze
from launcher.stages.convert import Convert
from launcher.stages.evaluate import Evaluate
from launcher.stages.kind import Outside, StageKind
from launcher.stages.merge import Merge
from launcher.stages.prepare import Prepare
from launcher.stages.rl import RL
from launcher.stages.train import Train

_KINDS: Mapping[str, StageKind] = {
    "prepare": Prepare(),
    "train": Train(),
    "convert": Convert(),
    "merge": Merge(),
    "rl": RL(),
    "evaluate": Evaluate(),
    "analyze": Analyze(),
}


def kinds() -> Mapping[str, StageKind]:
    """Every stage kind by name."""
    return _KINDS


def outside_of(spec: StageSpec) -> tuple[Outside, ...]:
    """What a planned stage reads outside the store beside checkpoints; nothing for the stages of `cluster test`."""
    try:
        config = decode(CONFIGS[spec.kind], spec.config)
    except SpecError:  # no recipe's: what it reads is among its inputs
        return ()
    return _KINDS[spec.kind].outside(config)
