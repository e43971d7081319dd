"""The only caller of Slurm's commands: with time-outs, and its answers as values. Standard library only.

It reads `--format` strings and `scontrol show --oneliner`, not JSON, whose layout differs between versions. Run with
Slurm 22.05; the printing code of 24.05 to 25.11 was read (tests/data/slurm-24.05). No call may block: a command that
does not answer in time counts as no answer. Sites put wrappers around these commands that greet or charge a project:
an answer is found by its form (`rows`) among whatever else is printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.errors import WorldError

#: How jobs end. All else waits, runs or comes back: newer versions add flags (EXPEDITING in 25.11), never ends.
#: GONE is ours: the controller does not know the job, or by that number another one, and nothing tells how it ended.
ENDED = frozenset(
    {
        *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"),
        *("OUT_OF_MEMORY", "REVOKED", "GONE"),
    }
)
#: States of a job that has been started and holds its nodes, though it may stand still.
_STARTED = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")
_EMPTY = ("", "None", "N/A", "(null)", "Unknown", "None assigned")
#: Variables of the user's shell that would change what a command does or how it answers.
_OURS = ("SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
#: Of Slurm's own those that say which controller is meant. The others are of a job that the shell stands in: sbatch
#: would hand them on, and `SLURM_MEM_PER_CPU` beside the new job's own memory keeps every srun from starting.
CONTROLLER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
#: What the commands say when slurmctld is down, does not answer or is too busy (slurm_errno.c).
_SILENT = re.compile(
    r"Unable to contact slurm controller|timed out|[Cc]onnection (refused|failure)|Message (send|receive) failure"
    r"|Zero Bytes were transmitted|temporarily unable to accept|Unexpected message received"
)


class NoAnswer(WorldError):
    """The controller does not answer: nothing is known, and what was submitted may have been accepted."""


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

    @property
    def is_silence(self) -> bool:
        """Whether it failed because the controller is down, stuck or too busy."""
        return self.code is None or (not self.ok and bool(_SILENT.search(self.err)))

    def error(self, what: str) -> WorldError:
        """What to raise where it failed: NoAnswer where the controller was silent."""
        if self.is_silence:
            said = [line for line in self.err.splitlines() if _SILENT.search(line)] or self.err.splitlines()
            return NoAnswer(f"{what}: the controller does not answer ({said[-1]})")
        return WorldError(f"{what}: {self.err or plain(self.out.strip()) or 'no answer'}")


@dataclass(frozen=True)
class Job:
    """A job as Slurm tells it. `reason` says why it waits or how it ended, `ended` when, in seconds since the epoch.

    `excluded` are nodes that it may not run on (scontrol alone tells), `time_left` is until its limit, as D-H:M:S.
    `name` and `submitted` are told by sacct alone.
    """

    id: str
    state: str
    reason: str = ""
    restarts: int = 0
    nodes: str = ""
    preempted: bool = False
    ended: float | None = None
    excluded: str = ""
    time_left: str = ""
    name: str = ""
    submitted: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in ENDED

    @property
    def is_started(self) -> bool:
        """Whether it has its nodes, running or suspended."""
        return self.state in _STARTED


def call(*argv: str, timeout: float = 10.0) -> Answer:
    """Run a Slurm command. Raises WorldError where it is not installed.

    Bytes that are no text are kept in its output as Python keeps them in names of files (`plain` is for people).
    """
    inherited = {k: v for k, v in os.environ.items() if k in CONTROLLER or not k.startswith("SLURM_")}
    environment = {k: v for k, v in inherited.items() if not k.startswith(_OURS)}
    environment["SLURM_BITSTR_LEN"] = "0"  # the indices of an array in full
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, env=environment, check=False
        )
    except FileNotFoundError:
        raise WorldError(f"no {argv[0]} here: this needs Slurm's commands, as a login node has them") from None
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{argv[0]} did not answer in {timeout:.0f} s")
    return Answer(done.returncode, os.fsdecode(done.stdout), done.stderr.decode(errors="replace").strip())


def plain(text: str) -> str:
    """Text of a command's output as it can be shown anywhere: what is no character stands as `?`."""
    return text.encode(errors="replace").decode()


#: A job's id as squeue and sacct print it: `63`, `63+1`, `77_2`, `77_[3-9%2]`.
JOB_ID = re.compile(r"[0-9]+(?:\+[0-9]+|_[0-9]+|_\[.+\])?")
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def rows(text: str, count: int, first: re.Pattern[str] = JOB_ID) -> Iterator[list[str]]:
    """Lines of so many fields between bars of which the first is of a form; the last field may hold more bars.

    What a site's wrapper prints beside the answer is passed over.
    """
    for line in text.split("\n"):
        fields = line.split("|", count - 1)
        if len(fields) == count and first.fullmatch(fields[0].strip()):
            yield fields


_ONE_JOB = re.compile(r"([0-9]{1,10})(?:[_+][0-9]{1,9})?")
#: Numbers from here on stand for something else (NO_VAL in slurm.h).
_NO_JOB = 0xFFFFFFFE


def is_job_id(text: str) -> bool:
    """Whether it is a number that a job can have, or that of an element or a part: `63`, `77_2`, `63+1`."""
    match = _ONE_JOB.fullmatch(text)
    return match is not None and 0 < int(match[1]) < _NO_JOB


#: Linux takes no argument of more than 128 KiB.
_LONGEST = 100_000


def _lists(jobs: Iterable[str]) -> Iterator[list[str]]:
    """Ids in order, as many at once as one argument may hold.

    What can be no id is left out: Slurm's commands refuse the whole list for one.
    """
    piece: list[str] = []
    length = 0
    for job in sorted(filter(is_job_id, set(jobs))):
        if length + len(job) >= _LONGEST:
            yield piece
            piece, length = [], 0
        piece.append(job)
        length += len(job) + 1
    if piece:
        yield piece


# --------------------------------------------------------------------------------------------------------------- jobs


def show_job(job: str, timeout: float = 5.0) -> Job | None:
    """A job by the controller's own record; None where it does not know the job (any more) or does not answer."""
    answer = call("scontrol", "show", "job", "--oneliner", job, timeout=timeout)
    return parse_show_job(answer.out) if answer.ok else None


# A job's name, comments and paths may hold anything, `JobState=` too: fields are known by their neighbours.
_IDS = re.compile(r"JobId=(\d+) (?:ArrayJobId=(\d+) ArrayTaskId=(\S+) |HetJobId=(\d+) HetJobOffset=(\d+) )?")
_STATE = re.compile(
    r" QOS=\S* (?:WCKey=\S* )?JobState=(\S+) Reason=(.*?) "
    r"(?:FailedNode=\S* )?Dependency=\S* Requeue=\d+ Restarts=(\d+) "
)
_ENDTIME = re.compile(r" StartTime=\S+ EndTime=(\S+) ")
_NODES = re.compile(r" ReqNodeList=\S+ ExcNodeList=(\S+) NodeList=(\S*) ")


def parse_show_job(text: str) -> Job | None:
    """The first line of `scontrol show job --oneliner`; of a heterogeneous job its leader."""
    line = next((line for line in text.split("\n") if _IDS.match(line)), "")
    ids, state = _IDS.match(line), _STATE.search(line)
    if not ids or not state:
        return None
    nodes, ended = _NODES.search(line, state.end()), _ENDTIME.search(line, state.end())
    preempted = re.search(r" PreemptTime=(\S+) ", line[state.end() :])
    raw, array, index, leader, offset = ids.groups()
    job = Job(
        id=f"{array}_{index}" if array else f"{leader}+{offset}" if leader and offset != "0" else raw,
        state=state[1].split(",")[0],
        reason=plain(state[2]),
        restarts=int(state[3]),
        nodes=_value(nodes[2] if nodes else ""),
        excluded=_value(nodes[1] if nodes else ""),
        preempted=bool(preempted and _value(preempted[1])),
    )
    return _with_end(job, ended[1] if ended else "")


def _value(text: str) -> str:
    return "" if text.strip() in _EMPTY else plain(text.strip())


def _with_end(job: Job, text: str) -> Job:
    """The job with its end, from Slurm's `2026-01-31T23:59:59` in local time; a living job's is only expected."""
    return job if job.is_active else replace(job, ended=_moment(text))


def _moment(text: str) -> float | None:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text.strip()):
        return None
    return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))


def job_states(jobs: Iterable[str]) -> Mapping[str, Job]:
    """Every job that Slurm knows, by its id as asked: `77`, an array's element `77_2`, a heterogeneous job's leader.

    A whole array stands as an element that has not ended, else as one that did not end well. One squeue, and one sacct
    for those that have left the queue: accounting tells how a job ended, never that it lives. Raises NoAnswer where the
    controller is silent: then nothing is known, which is not the same as gone.

    A number may by now name a job of somebody else's: `launcher.submitted.told_states` tells them apart.
    """
    wanted = sorted(set(jobs))
    found: dict[str, Job] = {}
    for some in _lists(wanted):
        asked = ("--states=all", "--array", f"--jobs={','.join(some)}", f"--format={_SQUEUE}")
        answer = call("squeue", "--noheader", *asked)
        if not answer.ok and "Invalid job id" not in answer.err:
            raise answer.error("squeue")
        told = parse_squeue(answer.out)
        found |= _by_asked_id(some, told)
        found |= _with_all_nodes(found[job] for job in some if job in found and found[job].state == "COMPLETING")
        missing = [job for job in some if job not in found]
        # An answer of which nothing could be read tells nothing either of what is missing in it.
        is_told = bool(told) or not answer.ok or not answer.out.strip()
        past = _in_accounts(missing)
        found |= {name: _not_alive(job) if is_told or _is_unknown(job) else job for name, job in past.items()}
    return found


def _is_unknown(job: Job) -> bool:
    """Whether the controller says that it does not know a job that lives by accounting."""
    if not job.is_active:
        return False
    answer = call("scontrol", "show", "job", "--oneliner", job.id, timeout=5.0)
    return not answer.ok and "Invalid job id" in answer.err


def _in_accounts(jobs: Sequence[str]) -> dict[str, Job]:
    """What accounting tells of jobs; nothing where there is none."""
    if not jobs:
        return {}
    asked = ("--parsable2", "--allocations", f"--jobs={','.join(jobs)}", f"--format={_SACCT}")
    told = call("sacct", "--noheader", *asked)
    return _by_asked_id(jobs, parse_sacct(told.out)) if told.ok else {}


def _with_all_nodes(completing: Iterable[Job]) -> dict[str, Job]:
    """Jobs with the nodes that they were started on, by accounting: squeue has those that are still completing."""
    jobs = {job.id: job for job in completing}
    told = _in_accounts(list(jobs))
    return {name: replace(job, nodes=told[name].nodes if name in told else "") for name, job in jobs.items()}


def _not_alive(job: Job) -> Job:
    """A job that the controller does not know, by accounting: one whose end was never written down is gone."""
    return replace(job, state="GONE") if job.is_active else job


_SQUEUE = "%i|%T|%N|%e|%L|%r"
_SACCT = "JobID,State,NodeList,End,Reason,Submit,JobName"


def parse_squeue(text: str) -> list[Job]:
    """Lines of `squeue --array --format=%i|%T|%N|%e|%L|%r`; the reason, which may hold anything, is last."""
    found = (fields for fields in rows(text, 6) if fields[1].strip())
    return [_row(i, state, nodes, end, why, left) for i, state, nodes, end, left, why in found]


def parse_sacct(text: str) -> list[Job]:
    """Lines of `sacct --parsable2` with the fields of `_SACCT`, of which the last two may be missing.

    `CANCELLED by 1000` is CANCELLED.
    """
    found = []
    for job, state, nodes, end, rest in rows(text, 5):
        reason, _, more = rest.partition("|")
        submitted, _, name = more.partition("|")
        if state.strip():
            found.append(replace(_row(job, state, nodes, end, reason), submitted=_moment(submitted), name=name))
    return found


def _row(job: str, state: str, nodes: str, end: str, reason: str, left: str = "") -> Job:
    word = state.split()[0].split(",")[0].rstrip("+")
    return _with_end(Job(job.strip(), word, _value(reason), nodes=_value(nodes), time_left=left.strip()), end)


def _by_asked_id(wanted: Iterable[str], told: Iterable[Job]) -> dict[str, Job]:
    # The last one counts: of a whole array, one that is active or has failed.
    ordered = sorted(told, key=lambda job: (job.is_active, job.state != "COMPLETED"))
    known = {name: job for job in ordered for name in _names(job.id)}
    return {name: replace(known[name], id=name) for name in wanted if name in known}


def _names(job: str) -> Iterator[str]:
    """What a job may be asked for as: `63+0` leads 63; `77_[0-2,5%4]` stands for elements that have not started."""
    if "_" in job or job.endswith("+0"):
        yield re.split("[_+]", job)[0]
    pending = re.fullmatch(r"(\d+)_\[([^]%]+)(?:%\d+)?\]", job)
    if pending is None:
        yield job
        return
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", pending[2]):
        yield from (f"{pending[1]}_{n}" for n in range(int(first), int(last or first) + 1, int(step or 1)))


# ---------------------------------------------------------------------------------------------- submitting, ending them


class SubmitLimit(WorldError):
    """Slurm takes no more jobs of this user for now: MaxSubmitJobs of an association or a QOS."""


def submit(script: str, *options: str, known: Container[str] = ()) -> str:
    """Submit a script file; returns the job's id. `known` are jobs that the script was submitted as before.

    Where sbatch's answer is not the number alone, Slurm is asked at once which job of this script is new. Raises
    WorldError with what sbatch said, SubmitLimit for one kind of that; NoAnswer where the job may have been accepted
    all the same: a controller that was busy for sbatch's whole time-out takes it in later, and `own_scripts` finds it.
    """
    answer = call("sbatch", "--parsable", *options, script, timeout=60.0)
    said = parse_submitted(answer.out) if answer.ok else ()
    if len(said) == 1 and said[0] == answer.out.strip().partition(";")[0]:
        return said[0]
    refused = not answer.ok and not answer.is_silence and "Batch job submission failed" in answer.err
    new = () if refused else _new_jobs(script, known)
    found = [job for job in said if job in new] or new or said
    if found:
        return found[-1]
    if answer.ok:
        words = plain(answer.out.strip()[:200]) or answer.err[-200:] or "nothing"
        raise WorldError(f"{script}: sbatch said {words!r}, which names no job, and squeue knows none of this script")
    error = answer.error(f"{script}: sbatch")
    if isinstance(error, NoAnswer):
        raise NoAnswer(f"{error}; run again later: a job that it took in all the same is found and joined")
    raise SubmitLimit(str(error)) if "MaxSubmit" in answer.err else error


def parse_submitted(text: str) -> tuple[str, ...]:
    """Numbers of jobs in what sbatch printed: lines that are one, with `;CLUSTER` in a federation, or its sentence."""
    alone = re.findall(r"^[ \t]*([0-9]+)(?:;[^;\s]*)?[ \t\r]*$", text, re.MULTILINE)
    return tuple(filter(is_job_id, alone + re.findall(r"Submitted batch job ([0-9]+)", text)))


def _new_jobs(script: str, known: Container[str]) -> Sequence[str]:
    """Jobs of a script that are not known yet, the newest last; none where Slurm does not say."""
    try:
        there = own_scripts().get(script, ())
    except WorldError:
        return ()
    return sorted((job for job in there if job not in known), key=int)


def own_scripts() -> Mapping[str, tuple[str, ...]]:
    """The user's jobs in the controller's memory by their script's path; of arrays the array's id.

    Raises NoAnswer where the controller is silent.
    """
    answer = call("squeue", "--me", "--noheader", "--states=all", "--format=%i|%o")
    if not answer.ok:
        raise answer.error("squeue")
    return parse_scripts(answer.out)


def scripts_of_jobs(jobs: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """The scripts of jobs, whosever, as `own_scripts`. Raises NoAnswer where the controller is silent."""
    found: dict[str, tuple[str, ...]] = {}
    for some in _lists(re.split(r"[_+]", job)[0] for job in jobs):
        asked = ("--states=all", f"--jobs={','.join(some)}", "--format=%i|%o")
        answer = call("squeue", "--noheader", *asked)
        if not answer.ok and "Invalid job id" not in answer.err:
            raise answer.error("squeue")
        for script, there in parse_scripts(answer.out).items():
            found[script] = (*found.get(script, ()), *there)
    return found


def job_of_script(job: str, script: str) -> Job | None:
    """The job of this number, if Slurm still knows a job of this script by it."""
    known = job_states([job]).get(job)
    words = scripts_of_jobs([job]) if known is not None else {}
    return known if not words or os.path.realpath(script) in map(os.path.realpath, words) else None


def parse_scripts(text: str) -> Mapping[str, tuple[str, ...]]:
    """Lines of `squeue --format=%i|%o`; a path may hold a `|`. A job without a script has other words, or `(null)`."""
    found: dict[str, dict[str, None]] = {}
    for job, words in rows(text, 2):
        script = words.strip()
        if script.startswith("/") or "|" not in script:
            found.setdefault(script, {})[re.split(r"[_+]", job.strip())[0]] = None
    return {script: tuple(jobs) for script, jobs in found.items()}


def test_only(script: str) -> str | None:
    """Why sbatch would refuse a script; None where it would not, or cannot be asked. Submits nothing."""
    answer = call("sbatch", "--test-only", script, timeout=60.0)
    if answer.ok or "MaxSubmit" in answer.err or isinstance(answer.error(""), NoAnswer):
        return None
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in answer.err.splitlines()]
    return "; ".join(filter(None, lines)) or f"exit code {answer.code}"


def count_jobs(user: str) -> int:
    """How many jobs of a user wait or run, elements of arrays counted each. Raises WorldError for no answer."""
    answer = call("squeue", "--noheader", "--array", f"--user={user}", "--format=%i")
    if not answer.ok:
        raise answer.error("squeue")
    return sum(1 for _ in rows(answer.out, 1))


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are no failure. Raises WorldError where Slurm refuses."""
    for some in _lists(jobs):
        answer = call("scancel", *some)
        if not answer.ok and "Invalid job id" not in answer.err:
            raise answer.error("scancel")


def requeue(job: str, patience_s: float = 600.0) -> str | None:
    """Put the job back into the queue; returns what Slurm said where it refused.

    A silent controller is asked again for so long: a job that ends meanwhile would need somebody to submit it anew.
    """
    end = time.monotonic() + patience_s
    while True:
        answer = call("scontrol", "requeue", job)
        if answer.ok:
            return None
        if not answer.is_silence or time.monotonic() > end:
            return answer.err or "no answer"
        time.sleep(2.0)


def hostnames(nodes: str, timeout: float = 5.0) -> list[str]:
    """A node list such as `n[1-3]` as names, in its order. Raises WorldError where scontrol does not say."""
    answer = call("scontrol", "show", "hostnames", nodes, timeout=timeout)
    form = _form_of_names(nodes)
    names = [word for word in answer.out.split() if form.fullmatch(word)] if answer.ok else []
    if not names:
        raise WorldError(
            f"scontrol show hostnames {nodes}: {answer.err or plain(answer.out.strip()[:200]) or 'no answer'}"
        )
    return names


def _form_of_names(nodes: str) -> re.Pattern[str]:
    """What the names in a node list look like: `n[1-3],gpu7` are `n`, a number, or `gpu7`."""
    listed = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.compile("|".join("[0-9]+".join(map(re.escape, re.split(r"\[[^\]]*\]", name))) for name in listed))


# -------------------------------------------------------------------------------------------------------------- nodes

#: Starts of the states in which a node runs nothing or not for long; a flag such as `*` or `$` may follow.
_LOST = ("down", "inval", "unknown", "powered_down", "powering_down")
_BAD = (*_LOST, "drain", "fail")


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


def bad_nodes(nodes: str, timeout: float = 5.0) -> tuple[str, ...]:
    """Of a node list, those that are down, draining, failing, powered down or do not respond."""
    return parse_bad_nodes(_node_states(nodes, timeout))


def lost_nodes(nodes: str, timeout: float = 5.0) -> tuple[str, ...]:
    """Of a node list, those that can run nothing any more; what drains or is failing lets its jobs go on."""
    return parse_bad_nodes(_node_states(nodes, timeout), _LOST)


def _node_states(nodes: str, timeout: float) -> str:
    return call("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N|%T", timeout=timeout).out


def parse_bad_nodes(text: str, starts: tuple[str, ...] = _BAD) -> tuple[str, ...]:
    """Lines of `sinfo --Node --format=%N|%T`, which names a node once for each of its partitions.

    `starts` are the states that count.
    """
    told = ((name.strip(), state.strip()) for name, state in rows(text, 2, NODE_NAME))
    # After the state: * does not respond, ~ powered down, % powering down, ! about to be.
    return tuple(sorted({n for n, s in told if s.endswith(("*", "~", "%", "!")) or s.lower().startswith(starts)}))
