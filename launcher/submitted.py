"""The jobs of a run as its own notes and Slurm tell them, while their numbers still name them. Standard library only.

ROOT/runs/NAME/jobs.jsonl    every job submitted for the run: stage, fingerprint, job id, time, user, chain, script

Slurm gives numbers out again: where they wrap, where a controller comes back without its last seconds, where its state
is restored. What it runs under a number is compared with the script that was submitted before anything is believed of
the job or done to it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from launcher import slurm, store
from launcher.errors import MOST_SHOWN, WorldError, listed
from launcher.slurm import Job
from launcher.spec import SpecError, decode, encode, read_stage
from launcher.units import NO_TIME
from launcher.users import user_name

JOBS = "jobs.jsonl"
#: The script of a stage that is in no job array; those of arrays are called NAME.sbatch.
SCRIPT = "job.sbatch"
#: By how much clocks, time zones among them, may differ before a job is taken for one of an earlier time.
_CLOCKS_S = 7200.0


@dataclass(frozen=True)
class Submitted:
    """A job of a run; the newest submission of a stage counts. An element of an array is known as ARRAYJOB_INDEX.

    `chain`: the first of the jobs that continue each other. `script`: what was submitted.
    """

    stage: str
    fingerprint: str
    job: str
    time: float
    user: str = ""
    chain: str | None = None
    script: str = ""

    @property
    def number(self) -> str:
        """What sbatch answered: of an element its array's id."""
        return _number(self.job)


def _number(job: str) -> str:
    return re.split("[_+]", job)[0]


# -------------------------------------------------------------------------------------------------------------- notes


def read_submitted(root: Path, run: str) -> list[Submitted]:
    """Every job that was submitted for a run, the oldest first; of lines with the same id the last one counts."""
    return newest_by_id(line for _, line in read_lines(store.run_dir(root, run) / JOBS) if line)


def newest_by_id(lines: Iterable[Submitted]) -> list[Submitted]:
    """One line an id, the last. It stands where the first stood, unless the number was given to another job."""
    found: dict[str, Submitted] = {}
    for line in lines:
        before = found.get(line.job, line)
        if (before.stage, before.fingerprint, before.chain) != (line.stage, line.fingerprint, line.chain):
            del found[line.job]
        found[line.job] = line
    return list(found.values())


def damaged_lines(root: Path, run: str) -> list[str]:
    """Lines of a run's notes that tell of no job, as messages."""
    path = store.run_dir(root, run) / JOBS
    bad = [number for number, line in read_lines(path) if line is None]
    what = "damaged, left out; a job that it told of is found again by its script while Slurm knows it"
    return [f"{path}: line {listed(map(str, bad), MOST_SHOWN)}: {what}"] if bad else []


def read_lines(path: Path) -> Iterator[tuple[int, Submitted | None]]:
    """Each line's number and job; None where the line is damaged."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            yield number, _read_line(line)


def _read_line(line: bytes) -> Submitted | None:
    names = {f.name for f in fields(Submitted)}
    try:
        data = json.loads(line.decode(errors="replace"))
        found = decode(Submitted, {k: v for k, v in data.items() if k in names})
    except (ValueError, AttributeError, SpecError, RecursionError):
        return None
    return found if slurm.is_job_id(found.job) and 0 <= found.time < NO_TIME else None


def write_down(root: Path, run: str, jobs: Iterable[Submitted]) -> None:
    """Add jobs to a run's notes."""
    path = store.run_dir(root, run) / JOBS
    text = "".join(json.dumps(encode(job)) + "\n" for job in jobs)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            text = "\n" + text  # half a line, from a login node that went down
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# --------------------------------------------------------------------------------------------------- by Slurm's word


def told_states(
    root: Path,
    run: str,
    lines: Iterable[Submitted],
    own: Mapping[str, Sequence[str]] | None = None,
    seen: Set[str] = frozenset(),
) -> dict[str, Job]:
    """What Slurm tells of jobs, by their ids: GONE where it knows another job by the number, absent where none.

    `own` is `slurm.own_scripts()` where it has been asked already; the jobs in `seen` were found to be the same a
    moment ago. Raises NoAnswer where the controller is silent.
    """
    listed = {line.job: line for line in lines}
    known = slurm.job_states(listed)
    words = _words_of({name: job for name, job in known.items() if name not in seen}, own)
    return {
        name: job if _is_same(root, run, listed[name], job, words.get(_number(name), ())) else Job(name, "GONE")
        for name, job in known.items()
    }


def _words_of(known: Mapping[str, Job], own: Mapping[str, Sequence[str]] | None) -> Mapping[str, list[str]]:
    """What each number stands for: scripts, or what else was submitted. Nothing where Slurm does not say."""
    if not known:
        return {}
    own = slurm.own_scripts() if own is None else own
    seen = {job for jobs in own.values() for job in jobs}
    others = slurm.scripts_of_jobs(name for name, job in known.items() if job.is_active and _number(name) not in seen)
    found: dict[str, list[str]] = {}
    for told in (own, others):
        for script, jobs in told.items():
            for job in jobs:
                found.setdefault(job, []).append(script)
    return found


def renamed(root: Path, run: str, lines: Iterable[Submitted], own: Mapping[str, Sequence[str]]) -> Sequence[Submitted]:
    """The lines of jobs whose scripts Slurm calls otherwise than we do, with its word.

    `own` is `slurm.own_scripts()`, asked when they had just been submitted.
    """
    told = ((line, [script for script, jobs in own.items() if line.number in jobs]) for line in lines)
    return [
        replace(line, script=words[-1])
        for line, words in told
        if words and not any(script == line.script or _is_script_of(root, run, line, script) for script in words)
    ]


def _is_same(root: Path, run: str, line: Submitted, job: Job, words: Sequence[str]) -> bool:
    if words:
        return any(script == line.script or _is_script_of(root, run, line, script) for script in words)
    # Only accounting knows it, which tells no script.
    named = Path(line.script).parts[-4:-3] or (run,)
    name = job.name.removeprefix(f"{named[0]}.") if job.name.startswith(f"{named[0]}.") else None
    if job.name and (name is None or not (line.stage == name or line.stage.startswith(f"{name}."))):
        return False
    return job.submitted is None or line.time - job.submitted < _CLOCKS_S


def _is_script_of(root: Path, run: str, line: Submitted, script: str) -> bool:
    """Whether a script lies where those of the line's stage do. An older version noted no scripts."""
    where = _place(root, run, script)
    if where is not None:
        folder, name = where
        is_part = line.stage.startswith(f"{folder}.") and name != SCRIPT
        return is_part if "_" in line.job else (folder, name) == (line.stage, SCRIPT)
    if line.script or not script.endswith(".sbatch"):
        return False
    beside = Path(script).with_name(f"{line.stage}.stage.json")  # a folder that `render` made
    return _dict(store.read_json(beside)).get("fingerprint") == line.fingerprint


def _place(root: Path, run: str, script: str) -> tuple[str, str] | None:
    """Folder and name of a script of this run, `stages/FOLDER/NAME`; None of any other."""
    if not script.endswith(".sbatch") or "/stages/" not in script:
        return None
    stages, real = os.path.realpath(store.run_dir(root, run) / "stages"), os.path.realpath(script)
    folder, name = os.path.split(real)
    return (os.path.basename(folder), name) if os.path.dirname(folder) == stages else None


def unheard(root: Path, run: str, own: Mapping[str, Sequence[str]]) -> list[Submitted]:
    """Jobs of a run that Slurm took in without our hearing of it: sbatch timed out, or its caller was killed.

    `own` is `slurm.own_scripts()`.
    """
    lines = read_submitted(root, run)
    found: list[Submitted] = []
    for script, jobs in own.items():
        where = _place(root, run, script)
        for job in sorted(jobs, key=int) if where is not None else ():
            numbered = [line for line in lines if line.number == job]
            if where is not None and not any(
                line.script == script or _is_script_of(root, run, line, script) for line in numbered
            ):
                found += _lost(root, run, where, script, job, [*lines, *found])
    return found


def _lost(
    root: Path, run: str, where: tuple[str, str], script: str, job: str, lines: Sequence[Submitted]
) -> list[Submitted]:
    """The jobs that one unheard call of sbatch made: of an array those elements that Slurm knows."""
    folder, name = where
    ids = {job: folder} if name == SCRIPT else {f"{job}_{i}": s for i, s in enumerate(_elements(script))}
    there = ids if name == SCRIPT else slurm.job_states(ids)
    written = os.stat(script).st_mtime if os.path.exists(script) else time.time()
    found = []
    for number, stage in ((n, s) for n, s in ids.items() if n in there):
        path = store.stage_dir(root, run, stage) / "stage.json"
        fingerprint = _dict(store.read_json(path)).get("fingerprint", "")
        chain = _chain_of(path, stage, job, lines)
        found.append(Submitted(stage, str(fingerprint), number, written, user_name(), chain, script))
    return found


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _elements(script: str) -> list[str]:
    """The stages of an array's elements, as its script lists them."""
    try:
        text = Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    listed = re.search(r"^stages=\(\n(.*?)^\)$", text, re.MULTILINE | re.DOTALL)
    return shlex.split(listed[1]) if listed else []


def _chain_of(stage_json: Path, stage: str, job: str, lines: Sequence[Submitted]) -> str | None:
    """The chain that an unheard job is a link of: the one before it where that is not whole, else its own."""
    try:
        limits = read_stage(stage_json).limits
    except (SpecError, OSError, ValueError):
        return None
    if limits.continuation != "chain":
        return None
    before = [line for line in lines if line.stage == stage and line.number.isdigit() and int(line.number) < int(job)]
    chain = before[-1].chain if before else None
    is_whole = sum(line.chain == chain for line in before) >= limits.chain_jobs
    return job if chain is None or is_whole else chain


def lives(root: Path, job: str) -> bool | None:
    """Whether a job that holds a claim under a root waits or runs; None where nothing knows it, or nobody answers."""
    try:
        known = slurm.job_states([job])
        return bool(_claimants(root, known)) if known else None
    except WorldError:  # a controller that does not answer for a while
        return None


def living(root: Path, jobs: Iterable[str]) -> set[str]:
    """Those of the jobs of runs and claims under a root that wait or run. Raises NoAnswer where Slurm is silent."""
    return _claimants(root, slurm.job_states(jobs))


def _claimants(root: Path, known: Mapping[str, Job]) -> set[str]:
    active = {name: job for name, job in known.items() if job.is_active}
    words = _words_of(active, None)
    noted: dict[str, list[tuple[str, Submitted]]] = {}
    for path in (root / "runs").glob(f"*/{JOBS}") if words else ():
        for _, line in read_lines(path):
            if line is not None:
                noted.setdefault(line.number, []).append((path.parent.name, line))
    return {
        name
        for name in active
        if (told := words.get(_number(name), [])) == [] or _is_claimant(root, noted.get(_number(name), ()), told)
    }


def _is_claimant(root: Path, noted: Sequence[tuple[str, Submitted]], words: Iterable[str]) -> bool:
    """Whether one of these scripts is that of a job as it was noted, or where none was, one of a store."""
    if not noted:
        return any(re.search(r"/runs/[^/]+/stages/[^/]+/[^/]+\.sbatch$", script) for script in words)
    return any(s == line.script or _is_script_of(root, run, line, s) for s in words for run, line in noted)
