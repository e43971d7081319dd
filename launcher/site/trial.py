"""`cluster test`: a profile proved by a short job, planned, rendered and started as a stage is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import slurm, store
from launcher.cluster import Partition, Profile, alternatives, check_resources, place_stage
from launcher.configs import Resources
from launcher.errors import UserError, WorldError
from launcher.run_record import PlannedStage
from launcher.sbatch import sbatch_text
from launcher.site.ask import Queue, may_start_later, refusal, show_queues
from launcher.spec import Limits, StageSpec, Step, stage_text

RUN = "cluster-test"
#: Cores asked for on each node, where it has them: memory often follows cores, and libraries are large.
_CORES = 8
#: How long a test may wait in the queue while it is followed.
PATIENCE_S = 3600.0
#: A file system may show the last report this much later than Slurm tells the end.
_LATE_S = 70.0
#: The same for one that ended badly, which may have left nothing.
_GONE_S = 2.0
_PAUSE_S = 0.5


@dataclass(frozen=True)
class Trial:
    """A submitted test."""

    folder: Path
    job: str
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a test left: Slurm's word, the job's own log, `job.json` by life, reports by `STEP.RANK`."""

    trial: Trial
    state: str
    reason: str
    log: str
    lives: tuple[Mapping[str, Any], ...]
    reports: Mapping[str, Mapping[str, Any]]

    @property
    def ended(self) -> bool:
        """Whether the job has said its last word."""
        return any(life.get("ended") for life in self.lives)


def plan_trial(profile: Profile, root: Path, partition: str | None, asked_nodes: int | None = None) -> PlannedStage:
    """The test as a stage placed on the cluster. Raises UserError for what the profile says can never run.

    `asked_nodes` None: two, or as many as one job may have.
    """
    if profile.scheduler != "slurm":
        raise UserError(f"cluster {profile.name} has no Slurm: there is nothing to submit a test to")
    name = partition or profile.partition
    told = [profile.partitions[each] for each in alternatives(name) if each in profile.partitions]
    limits = told[0] if told else _limits_by_slurm(name, profile.gpu_type)
    nodes = asked_nodes or min(2, limits.max_nodes or 2)
    gpus = limits.gpus_per_node or 0
    cores = min(_CORES, limits.cpus_per_node or 1)
    resources = Resources(nodes=nodes, cpus_per_task=cores, gpus_per_node=gpus, partition=name, time="5:00")
    steps = tuple(_steps(profile, nodes, gpus, cores))
    paths = [f"+{root}", *([profile.code] if profile.code else []), *_mounted(profile)]
    named = {key: profile.env[key] for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if profile.env.get(key)}
    asked = {"nodes": nodes, "gpus": gpus, "paths": paths, "root": str(root), "interfaces": named}
    spec = StageSpec(
        run=RUN,
        stage=f"{profile.name}.{time.strftime('%Y%m%d-%H%M%S')}",
        kind="train",
        kind_version=1,
        fingerprint="none",
        config=asked,
        seed=0,
        inputs={},
        outputs={},
        steps=steps,
        limits=Limits(save_s=20.0),
        runtime=profile.runtime,
    )
    short = replace(profile, limits=spec.limits, preflight=None)
    problems = [f"cluster test: {key}: {message}" for key, message in check_resources(resources, spec, short)]
    if problems:
        raise UserError(problems)
    return place_stage(PlannedStage(spec, (), resources), short, root)


def _limits_by_slurm(name: str | None, gpu_type: str | None) -> Partition:
    """What Slurm says of a partition that the profile does not describe; of the default one where none is named."""
    for queue in _meant(name):
        gpus = queue.gpus_of(gpu_type)
        return Partition(max_nodes=queue.max_nodes, gpus_per_node=gpus, cpus_per_node=queue.cpus)
    return Partition()


def _meant(name: str | None) -> list[Queue]:
    """The partitions that a name, a list of names or none stands for, as the site has them."""
    names = alternatives(name)
    return [queue for queue in show_queues() if (queue.name in names if names else queue.is_default)]


def _steps(profile: Profile, nodes: int, gpus: int, cores: int) -> Iterator[Step]:
    """One look at every node, the imports in every image, an all-reduce, the signals."""
    images = {} if profile.runtime.container == "none" else dict(profile.images)
    first = images.get("train") or next(iter(images.values()), None)
    if profile.runtime.container != "none" and first is None:
        raise UserError(f"cluster {profile.name}: images: name at least one, for the test to start in")

    def step(name: str, part: str, count: int, image: str | None) -> Step:
        argv = ("{python}", "-m", "launcher.site", "{stage_json}", part)
        return Step(name=name, argv=argv, nodes=count, ntasks=count, gpus=gpus, cpus=cores, image=image)

    yield step("nodes", "nodes", nodes, first)
    kinds = {image: kind for kind, image in reversed(images.items())}
    for image in dict.fromkeys(images.values()) if images else (None,):
        yield step(f"imports-{kinds[image] if image else 'host'}", "imports", 1, image)
    yield step("all-reduce", "all-reduce", nodes, first)
    yield step("signals", "signals", nodes, first)


def _mounted(profile: Profile) -> Iterator[str]:
    """Targets of the profile's mounts, with a + where they may be written."""
    if profile.runtime.container != "none":
        for mount in profile.mounts:
            source, *rest = mount.split(":")
            yield ("" if rest[1:] == ["ro"] else "+") + (rest[0] if rest else source)


def submit_trial(stage: PlannedStage, profile: Profile, root: Path) -> Trial:
    """Submit it, unless Slurm would refuse it: then UserError with the reason, and nothing is queued."""
    spec = stage.spec
    folder = store.stage_dir(root, spec.run, spec.stage)
    script = folder / "job.sbatch"
    short = replace(profile, limits=spec.limits, preflight=None)
    store.write_atomic(script, sbatch_text(stage, short, root, "launcher.site"))
    refused = refusal(str(script))
    if refused and _holds_for_now(refused, stage.resources.partition, "reservation" in profile.sbatch):
        print(f"cannot start for now, and waits in the queue: {refused}", file=sys.stderr)
    elif refused:
        raise UserError(f"cluster {profile.name}: Slurm refuses the test: {refused}\n  script: {script}")
    store.write_atomic(folder / "stage.json", stage_text(spec))
    trial = Trial(folder, slurm.submit(str(script)), spec.config)
    store.write_json(folder / "submitted.json", {"job": trial.job, "asked": dict(trial.asked)})
    return trial


def _holds_for_now(refused: str, partition: str | None, reserved: bool) -> bool:
    """Whether Slurm would queue a test that it cannot start: because nodes of its partition are out of service, say."""
    if may_start_later(refused, away=False, reserved=reserved):
        return True
    return may_start_later(refused, away=True, reserved=reserved) and any(q.away for q in _meant(partition))


def find_trial(root: Path, job: str) -> Trial:
    """A test that was submitted before. Raises UserError where this root has none of that id."""
    for path in (store.run_dir(root, RUN) / "stages").glob("*/submitted.json"):
        known = store.read_json(path) or {}
        if known.get("job") == job:
            return Trial(path.parent, job, known["asked"])
    raise UserError(f"{root}: no cluster test of job {job} here; name the --root that it was submitted with")


# ----------------------------------------------------------------------------------------------------------- following


def follow(trial: Trial, profile: Profile) -> Outcome:
    """Wait until it has ended; told on standard error. Interrupted, it cancels the job.

    Raises WorldError where it is still in the queue after `PATIENCE_S`; there it stays.
    """
    try:
        return _await_end(trial, profile.poll_s)
    except KeyboardInterrupt:
        slurm.cancel([trial.job])
        print(f"cancelled job {trial.job}", file=sys.stderr)
        raise


def _await_end(trial: Trial, poll_s: float) -> Outcome:
    began, asked_slurm, told = time.monotonic(), float("-inf"), ""
    job: slurm.Job | None = None
    gone_since: float | None = None
    while True:
        now = time.monotonic()
        if now - asked_slurm >= poll_s:
            job, asked_slurm = _ask(trial.job, job), now
        outcome = read_outcome(trial, job)
        if outcome.ended:
            return outcome
        if job is None or not job.is_active:
            gone_since = gone_since or now
            # Only a job that calls itself well owes us a report.
            if now - gone_since > (_LATE_S if job and job.state == "COMPLETED" else _GONE_S):
                return outcome
        if now - began > PATIENCE_S:
            raise WorldError(f"job {trial.job} still waits ({outcome.reason}); later: --job {trial.job} shows it")
        told = _tell(trial.job, outcome, told)
        time.sleep(_PAUSE_S)


def _ask(job: str, before: slurm.Job | None) -> slurm.Job | None:
    """What Slurm knows of the job; a controller that does not answer for a while changes nothing."""
    try:
        return slurm.job_states([job]).get(job)
    except WorldError:
        return before or slurm.Job(job, "PENDING", "Slurm does not answer")


def _tell(job: str, outcome: Outcome, told: str) -> str:
    why = "" if outcome.reason in ("", "None") else f" ({outcome.reason})"
    now = f"waits{why}" if outcome.state == "PENDING" else outcome.state.lower()
    if outcome.state == "RUNNING" and outcome.lives:
        now += f", {len(outcome.lives[0].get('steps', {}))} steps done"
    if now != told:
        print(f"job {job}: {now}", file=sys.stderr)
    return now


def read_outcome(trial: Trial, job: slurm.Job | None) -> Outcome:
    """What stands in the test's folder by now."""
    folders = sorted(trial.folder.glob(f"{trial.job}.*/"), key=lambda p: int(p.name.rpartition(".")[2]))
    lives = [(folder, store.read_json(folder / "job.json")) for folder in folders]
    reports = {
        path.stem: report
        for folder, life in lives
        if life and "steps" in life
        for path in folder.glob("*.json")
        if path.name != "job.json" and (report := store.read_json(path)) is not None
    }
    logs = [path.read_text(errors="replace", encoding="utf-8") for path in trial.folder.glob(f"{trial.job}_0_log.*")]
    return Outcome(
        trial=trial,
        state=job.state if job else "UNKNOWN",
        reason=job.reason if job else "Slurm does not know it any more",
        log="\n".join(logs),
        lives=tuple(life for _, life in lives if life),
        reports=reports,
    )
