"""Where things lie under the store's root."""

from __future__ import annotations

from pathlib import Path

RECEIPT = "artifact.json"


#: In an unfinished artifact: what a later attempt goes on from. Never part of the whole one.
PROGRESS = "progress"


def partial_dir(root: Path, artifact: str) -> Path:
    """Where an artifact is made; `artifact` is relative to the root, as `StageSpec.artifact` gives it."""
    return root / f"{artifact}.partial"


def working_path(root: Path, artifact: str, path: str) -> Path:
    """The place in the unfinished artifact of a path inside the finished one."""
    return partial_dir(root, artifact) / Path(path).relative_to(artifact)


def run_dir(root: Path, run: str) -> Path:
    """The folder of a run."""
    return root / "runs" / run


def stage_dir(root: Path, run: str, stage: str) -> Path:
    """The folder of a stage in a run; attempts are folders inside it."""
    return run_dir(root, run) / "stages" / stage


def claim_dir(root: Path, artifact: str) -> Path:
    """The claim of whoever makes an artifact."""
    return root / f"{artifact}.claim"


def driver_claim(root: Path, run: str) -> Path:
    """The claim of the process that drives a run."""
    return run_dir(root, run) / "driver.claim"
