"""What a job's sbatch options and the shell that submits would make of every step stays out of the steps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from on_slurm import CHECKOUT
from test_submit import OnSlurm, on

from launcher.cluster import place_record
from launcher.configs import Resources
from launcher.spec import Step
from launcher.steps import SRUN_DEFAULTS

__all__ = ["on"]

LOOKING = CHECKOUT / "tests" / "cluster" / "looking_worker.py"


def looked(on: OnSlurm, **options: Any) -> list[dict[str, str]]:
    """The environments of two ranks on two nodes, in a job with these further options of sbatch."""
    on.profile = replace(on.profile, sbatch={**on.profile.sbatch, **options})
    record = on.plan(("a", (), {}))
    step = Step("look", ("{python}", str(LOOKING), "{stage_json}"), nodes=2, ntasks=2)
    planned = replace(
        record.stages[0],
        spec=replace(record.stages[0].spec, steps=(step,)),
        resources=Resources(nodes=2, mem="200M", time="5:00"),
    )
    record = place_record(replace(record, stages=(planned,)), on.profile, on.root)
    on.submit(record)
    ended = on.finish(record)
    logs = [path.read_text() for path in (on.root / "runs" / "run" / "stages" / "a").glob("*log*")]
    assert ended == {"a": "done"}, logs
    found = sorted((on.root / record.stages[0].spec.artifact).rglob("[01].json"))
    return [json.loads(path.read_text())["env"] for path in found]


@pytest.mark.parametrize(
    "options",
    [
        {"export": "NONE"},
        {"export": "HOME,MINE=1", "distribution": "plane=1"},
        {"distribution": "cyclic:cyclic", "hint": "nomultithread", "mem_bind": "local", "overcommit": True},
        {"threads_per_core": 1, "ntasks_per_core": 1, "cpu_freq": "high", "no_kill": True, "use_min_nodes": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_steps_run_whatever_sbatch_was_told(on: OnSlurm, options: dict[str, Any]) -> None:
    environments = looked(on, **options)
    assert [env["SLURM_PROCID"] for env in environments] == ["0", "1"]
    for env in environments:
        assert env["SLURM_STEP_NUM_NODES"] == "2" and env["SLURM_NTASKS"] == "2" and "PATH" in env
        said = {name for name in SRUN_DEFAULTS if env.get(name)}
        # What srun tells a step of its own options.
        assert said <= {
            *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_DISTRIBUTION"),
            *("SLURM_GPUS_PER_NODE", "SLURM_UMASK", "SLURM_CPU_BIND"),
        }
        assert env["SLURM_DISTRIBUTION"] == "block:block"


def test_a_shell_that_submits_from_within_a_step_hands_nothing_on(on: OnSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --pty bash`, then `prism-launch run`: sbatch passes the shell's variables on, and srun would obey them."""
    leaks = {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_DISTRIBUTION": "arbitrary", "SLURM_NNODES": "1"}
    leaks |= {"SLURM_LABELIO": "1", "SLURM_STDOUTMODE": "none", "SLURM_EXPORT_ENV": "NONE", "SRUN_EXPORT_ENV": "NONE"}
    for name, value in leaks.items():
        monkeypatch.setenv(name, value)
    environments = looked(on)
    assert [env["SLURM_PROCID"] for env in environments] == ["0", "1"]
    assert {env["SLURM_DISTRIBUTION"] for env in environments} == {"block:block"}
