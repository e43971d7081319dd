"""The only caller of Slurm's commands: with time-outs, and its answers as values. Standard library only.

It reads `--format` strings and `scontrol show --oneliner`, not JSON, whose layout differs between versions; tried with
Slurm 22.05. No call may block: a command that does not answer in time counts as no answer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.errors import WorldError

#: States of a job that has not ended; Slurm may add a flag such as COMPLETING to them.
ACTIVE = frozenset(
    {
        *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
        *("RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    }
)
_FIELD = re.compile(r"(\w+)=(.*?)(?=\s\w+(?::\w+)?=|\s*$)")
_EMPTY = ("", "None", "N/A", "(null)", "Unknown")


@dataclass(frozen=True)
class Answer:
    """What a command said; `code` None means that it did not answer in time."""

    code: int | None
    out: str
    err: str

    @property
    def ok(self) -> bool:
        """Whether it answered and succeeded."""
        return self.code == 0


@dataclass(frozen=True)
class Job:
    """A job as Slurm tells it. `reason` says why it waits or how it ended."""

    id: str
    state: str
    reason: str = ""
    restarts: int = 0
    nodes: str = ""
    preempted: bool = False
    excluded: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def call(*argv: str, timeout: float = 10.0) -> Answer:
    """Run a Slurm command. Raises WorldError where it is not installed."""
    # Variables of the user's shell would change what a script says.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SBATCH_")}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, env=environment
        )
    except FileNotFoundError:
        raise WorldError(f"no {argv[0]} here: this needs Slurm's commands, as a login node has them") from None
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{argv[0]} did not answer in {timeout:.0f} s")
    return Answer(done.returncode, done.stdout, done.stderr.strip())


def show_job(job: str, timeout: float = 5.0) -> Job | None:
    """A job by the controller's own record; None where it does not know the job (any more) or does not answer."""
    answer = call("scontrol", "show", "job", "--oneliner", job, timeout=timeout)
    return parse_show_job(answer.out) if answer.ok else None


def parse_show_job(text: str) -> Job | None:
    """The first line of `scontrol show job --oneliner`."""
    fields = dict(_FIELD.findall(text.strip().split("\n", 1)[0]))
    if "JobId" not in fields or "JobState" not in fields:
        return None
    return Job(
        id=fields["JobId"].split()[0],
        state=fields["JobState"].split(",")[0],
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
        nodes=fields.get("NodeList", "") if fields.get("NodeList") not in _EMPTY else "",
        excluded=fields.get("ExcNodeList", "") if fields.get("ExcNodeList") not in _EMPTY else "",
        preempted=fields.get("PreemptTime", "None") not in _EMPTY,
    )


def job_states(jobs: Iterable[str]) -> Mapping[str, Job]:
    """Every job that Slurm knows, by id: one squeue, and one sacct for those that have left the queue.

    Raises WorldError where the controller does not answer: then nothing is known, which is not the same as gone.
    """
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    ids = ",".join(wanted)
    answer = call("squeue", "--noheader", "--states=all", "--array", f"--jobs={ids}", "--format=%i|%T|%r|%N")
    if not answer.ok and "Invalid job id" not in answer.err:
        raise WorldError(f"squeue: {answer.err or 'no answer'}")
    found = {job.id: job for job in parse_squeue(answer.out)}
    missing = [job for job in wanted if job not in found]
    if missing:
        # Without accounting there is no sacct, and a job that has left the queue stays unknown.
        told = call(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(missing)}", f"--format={_SACCT}"
        )
        found |= {job.id: job for job in parse_sacct(told.out)} if told.ok else {}
    return found


_SACCT = "JobIDRaw,State,Reason,NodeList"


def parse_squeue(text: str) -> list[Job]:
    """Lines of `squeue --format=%i|%T|%r|%N`."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") >= 3)
    return [Job(row[0].strip(), row[1].split(",")[0], row[2], nodes=row[3]) for row in rows]


def parse_sacct(text: str) -> list[Job]:
    """Lines of `sacct --parsable2 --format=JobIDRaw,State,Reason,NodeList`; `CANCELLED by 1000` is CANCELLED."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") >= 3)
    return [Job(row[0].strip(), row[1].split()[0], row[2], nodes=row[3]) for row in rows if row[1]]


def submit(script: str, *options: str) -> str:
    """Submit a script file; returns the job's id. Raises WorldError with what sbatch said."""
    answer = call("sbatch", "--parsable", *options, script, timeout=60.0)
    job = answer.out.strip().split(";")[0]
    if not answer.ok or not job.isdigit():
        raise WorldError(f"{script}: sbatch: {answer.err or answer.out.strip() or 'no answer'}")
    return job


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are no failure. Raises WorldError where Slurm refuses."""
    wanted = sorted(set(jobs))
    if wanted:
        answer = call("scancel", *wanted)
        if not answer.ok and "Invalid job id" not in answer.err:
            raise WorldError(f"scancel: {answer.err}")


def requeue(job: str) -> str | None:
    """Put the job back into the queue; returns what Slurm said where it refused."""
    answer = call("scontrol", "requeue", job)
    return None if answer.ok else answer.err or "no answer"


def exclude(job: str, nodes: Iterable[str], before: str, timeout: float = 4.0) -> str | None:
    """Keep a waiting job off nodes, besides those that it is kept off already (`before`: `Job.excluded`).

    Returns what Slurm said where it refused. It refuses that for a job that runs, and takes it from the batch script
    itself once that is requeued.
    """
    listed = ",".join([*filter(None, [before]), *nodes])
    answer = call("scontrol", "update", f"jobid={job}", f"ExcNodeList={listed}", timeout=timeout)
    return None if answer.ok else answer.err or "no answer"


#: What slurmstepd writes into a batch script's log as it ends it.
_ENDING = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+[A-Z]))?")


def reason_in_log(text: str) -> str | None:
    """`PREEMPTION`, `NODE FAILURE`, `JOB REQUEUE`, `TIME LIMIT`, or "" where no reason is given; None: not ended.

    From what slurmstepd adds to a batch script's log, of which `text` is the part of this life (Slurm 22.05).
    """
    found: list[str] = _ENDING.findall(text)
    return found[-1] if found else None


def host_names(nodes: str) -> tuple[str, ...]:
    """The nodes of a compressed list, in its order; empty where Slurm does not answer."""
    answer = call("scontrol", "show", "hostnames", nodes, timeout=2.0)
    return tuple(answer.out.split()) if answer.ok else ()


def bad_nodes(nodes: str, timeout: float = 5.0) -> tuple[str, ...]:
    """Of a node list, those that are down, draining, failing or do not respond."""
    answer = call("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N|%T", timeout=timeout)
    rows = (line.strip().split("|") for line in answer.out.splitlines() if "|" in line)
    return tuple(sorted({n for n, state in rows if state.endswith("*") or state.startswith(("down", "drain", "fail"))}))
