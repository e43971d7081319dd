"""What Slurm's answers are read as."""

from __future__ import annotations

import pytest

from launcher.errors import WorldError
from launcher.site import ask
from launcher.slurm import Answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:8", [("", 8)]),
        ("gpu:h100:8(S:0-1)", [("h100", 8)]),
        ("gpu:nvidia_h100_80gb_hbm3:4(S:0-3),shard:16", [("nvidia_h100_80gb_hbm3", 4)]),
        ("nvme:1,gpu:a100:2,gpu:v100:1", [("a100", 2), ("v100", 1)]),
        ("gpu:1g.5gb:7", [("1g.5gb", 7)]),
        ("mps:200,xgpu:3", []),
        ("(null)", []),
    ],
)
def test_gres(text: str, found: list[tuple[str, int]]) -> None:
    assert ask.parse_gres(text) == found


def test_mpi_flavours_in_both_layouts() -> None:
    new = "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4,pmix_v3\n"
    assert ask.parse_mpi(new) == ("none", "pmi2", "pmix", "pmix_v3", "pmix_v4")
    old = "srun: MPI types are...\nsrun: none\nsrun: pmix\n"
    assert ask.parse_mpi(old) == ("none", "pmix")


@pytest.mark.parametrize(
    ("code", "err", "said"),
    [
        (0, "sbatch: Job 1 to start at 2026-11-25T19:58:41 using 1 processors", None),
        (
            1,
            "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name",
            "Invalid partition name",
        ),
        (
            255,
            "sbatch: unrecognized option '--x'\nTry \"sbatch --help\" for more information",
            "unrecognized option '--x'",
        ),
        (1, "sbatch: error: Batch job submission failed: Invalid qos", "Invalid qos"),
        (1, "", "no answer"),
    ],
)
def test_refusals(code: int, err: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "call", lambda *argv, timeout: Answer(code, "", err))
    assert ask.refusal("--x") == said


@pytest.mark.parametrize(
    "answer",
    [
        Answer(None, "", "sbatch did not answer in 30 s"),
        Answer(1, "", "allocation failure: Unable to contact slurm controller (connect failure)"),
    ],
)
def test_a_controller_that_is_silent_is_no_refusal(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "call", lambda *argv, timeout: answer)
    with pytest.raises(WorldError, match="does not answer"):
        ask.refusal("--x")
