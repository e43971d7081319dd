"""The supervisor: one attempt of one stage, from the claim on its artifact to the receipt.

Writes `events.jsonl` in the attempt's folder, whose last line says how the attempt ended. Exit code 0 means that the
artifact is whole, or that the job has been requeued for another life; anything unfinished is 1, the user's own mistake
2. USR2 (time limit), TERM (cancel, preemption) and what the allocation notices make it ask the workers to save and
stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher import __version__, store
from launcher.attempts import EVENTS, attempts_at, last_words, next_number
from launcher.containers import RUNTIMES
from launcher.errors import PrismError, UserError
from launcher.notify import LIMIT_S, notify, state_after
from launcher.progress import claim_s
from launcher.spec import SpecError, StageSpec, Step, encode, read_stage
from launcher.steps import Place
from launcher.supervisor import chain, memory, processes, sealing
from launcher.supervisor.allocation import Allocation, Reason, ThisMachine
from launcher.supervisor.beats import Heartbeats, RunningTime
from launcher.supervisor.classify import (
    Evidence,
    Outcome,
    RankExit,
    classify,
    is_secondhand,
    only_secondhand,
    outcome,
)
from launcher.supervisor.preflight import judge
from launcher.supervisor.processes import Process
from launcher.supervisor.slurm_job import SlurmJob

_POLL_S = 0.05
#: Seconds between looks at files that tell of a stop.
_NOTICED_S = 1.0
#: How long the cause is waited for when ranks have only said that they lost others.
_CAUSE_S = 2.0
#: Seconds for the hook when Slurm may be ending the job.
_LEAVING_S = 3.0


def main(argv: Sequence[str]) -> int:
    """`python -m launcher.supervisor STAGE_JSON`; PRISM_ROOT names the root, PRISM_ATTEMPT the attempt's folder.

    Without PRISM_ATTEMPT it is the batch step of a Slurm job.
    """
    if len(argv) != 1 or "PRISM_ROOT" not in os.environ:
        print("prism-launch: the supervisor is started by `prism-launch run` or by a rendered script", file=sys.stderr)
        return 2
    stage_json = Path(argv[0]).resolve()
    try:
        spec = read_stage(stage_json)
        root = Path(os.environ["PRISM_ROOT"])
        over = _chain_is_over(spec, root)
        if over is not None:
            return over
        return Supervisor(spec, root, _allocation(spec, root, stage_json)).run()
    except (PrismError, SpecError) as error:
        print(f"prism-launch: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except OSError as error:
        print(f"prism-launch: {error.filename or stage_json}: {error.strerror}", file=sys.stderr)
        return 1


def _chain_is_over(spec: StageSpec, root: Path) -> int | None:
    """The exit code of a link of a chain that has nothing to do; it is no attempt."""
    job = os.environ.get("SLURM_JOB_ID")
    if spec.limits.continuation != "chain" or job is None or "PRISM_ATTEMPT" in os.environ:
        return None
    over = chain.is_over(root, spec, job)
    if over is None:
        return None
    print(f"{spec.stage}: {over[1]}", flush=True)
    return over[0]


def _allocation(spec: StageSpec, root: Path, stage_json: Path) -> Allocation:
    named = os.environ.get("PRISM_ATTEMPT")
    if named:
        return ThisMachine(spec, root, stage_json, Path(named))
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("the supervisor is started by `prism-launch run` or by a rendered sbatch script")
    found = SlurmJob.current(spec, root, sys.executable)
    folder = store.new_attempt(found.attempt_dir.parent, found.attempt_dir.name)
    return replace(found, attempt=replace(found.attempt, folder=folder.name))


@dataclass
class Supervisor:
    """The state of one attempt; lives for one call of `run`."""

    spec: StageSpec
    root: Path
    allocation: Allocation
    asked: list[signal.Signals] = field(default_factory=list)
    started: list[Process] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    reason: Reason | None = None

    def __post_init__(self) -> None:
        self.owner = store.this_process(job=self.allocation.job)
        self.attempt_dir = self.allocation.attempt_dir
        self.claim = store.claim_dir(self.root, self.spec.artifact)
        self._claim_read = self._looked = time.monotonic()
        # Beside the work, which a slow hook must not hold up.
        before = "waiting" if self.allocation.job is None else "queued"
        self.telling = threading.Thread(target=self._tell, args=(before, "running"), daemon=True)

    # ---- the whole attempt

    def run(self) -> int:
        """Run the attempt; returns the exit code."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda got, _: self.asked.append(signal.Signals(got)))
        try:
            facts = {"fingerprint": self.spec.fingerprint, "number": next_number(self.root, self.spec)}
            self._event("start", owner=encode(self.owner), version=__version__, **facts)
            self.telling.start()
            result = self._make()
        except OSError as error:
            result = outcome("storage", self._storage_message(error))
        except PrismError as error:
            result = outcome("user-error" if error.exit_code == 2 else "storage", str(error))
        finally:
            processes.kill_all(self.started)
            store.release(self.claim, self.owner)
        return self._leave(self.allocation.next_life(result))

    def _leave(self, result: Outcome) -> int:
        """Say how the attempt ended, and ask for another life where there is one to come; returns the exit code."""
        self._end(result)
        again = result.action == "again" and self.allocation.job is not None
        if self.telling.is_alive():
            self.telling.join(_LEAVING_S if self._is_leaving() else None)
        self._tell("running", "queued" if again else state_after(result.exit_class), result)
        if result.action == "again":
            refused = self.allocation.go_on(result.exclude)
            if refused is not None:
                words = "; ".join(filter(None, [result.message, refused]))
                result = replace(result, message=words, action="stop", exclude=(), suspect=())
                self._end(result)
                self._tell("queued", state_after(result.exit_class), result)
            elif again and self.spec.limits.continuation == "requeue":
                # At once: else Slurm waits for KillWait. The exit code of a requeued job counts for nothing.
                os._exit(0)
        return {"finished": 0, "user-error": 2}.get(result.exit_class, 1)

    def _is_leaving(self) -> bool:
        """Whether Slurm may be ending the job by now."""
        return bool(self.asked) or self.reason is not None

    def _storage_message(self, error: OSError) -> str:
        mend = "free some room, then run again" if error.errno in (28, 122) else "mend that, then run again"
        return f"{error.filename or self.root}: {error.strerror or error}; {mend}"

    def _make(self) -> Outcome:
        if not self._take_claim():
            return outcome("cancelled", "stopped while waiting for the artifact's other maker")
        self.began = time.monotonic()  # waiting for another maker is no cost of this stage
        if store.read_receipt(self.root, self.spec.artifact) is not None:
            return outcome("finished", "made by another run in the meantime")
        if sealing.finish_interrupted(self.root, self.spec):
            return outcome("finished", "sealed what an earlier attempt had made whole")
        sealing.check_secrets(self.spec)
        sealing.check_inputs(self.root, self.spec, lambda: bool(self.asked))
        sealing.clear_outputs(self.root, self.spec)
        place = self.allocation.place()
        result = self._preflight(place) or self._work(place)
        if result.exit_class == "requeued" and self._is_superseded():
            return result  # what there is belongs to another life
        sealing.add_cost(self.root, self.spec, **self._cost())
        if result.exit_class == "finished":
            made_in = attempts_at(self.root, self.spec)
            sealing.seal(self.root, self.spec, self.owner, len(made_in))
        return result

    def _work(self, place: Place) -> Outcome:
        kills = memory.kernel_kills()
        evidence = self._watch(place)
        return classify(replace(evidence, memory_kill=memory.kernel_kills() > kills))

    def _take_claim(self) -> bool:
        """Claim the artifact, waiting for as long as another run makes it; False when asked to stop before that."""
        folder = self.claim
        before, told = store.claim_holder(folder), None
        while (holder := store.claim(folder, self.owner, self.allocation.lives)) is not None:
            if holder != told:
                gone = f"; if {holder.host} is gone, remove {folder}" if store.is_alive(holder) is None else ""
                self._event("waiting", message=f"process {holder.pid} on {holder.host} makes the same artifact{gone}")
                told = holder
            if self.asked:
                return False
            time.sleep(0.5)
        if before is not None and told is None and store.is_alive(before) is None:
            self._event("waiting", message=f"an earlier life on {before.host} was cut off: it gets time to notice")
            # An earlier one that Slurm has given up on, but cannot reach: it has to notice that its claim is gone.
            time.sleep(3 * claim_s(self.spec))
        self._claim_read = time.monotonic()
        return True

    def _is_superseded(self) -> bool:
        """Whether a later life has taken the claim over: Slurm thinks that this one is gone."""
        try:
            holder = store.claim_holder(self.claim)
        except OSError:  # a file system that is away for a while
            return False
        return holder is not None and holder != self.owner

    def _preflight(self, place: Place) -> Outcome | None:
        """How the attempt ends if the nodes are not fit for it."""
        found = self.allocation.preflight(place, lambda: bool(self.asked))
        if found is None:
            return None
        failed = {node: problems for node, problems in found.problems.items() if problems}
        facts = {"failed": failed, "seconds": found.seconds, "argv": found.argv, **found.facts}
        self._event("preflight", nodes=found.nodes, **facts)
        if self.asked:
            self._stop()
            return classify(self._evidence([]))
        return judge(found)

    def _cost(self) -> dict[str, float]:
        """Seconds, CPU seconds of all processes and the largest one's peak memory, in bytes."""
        seconds = time.monotonic() - self.began
        if self.allocation.job is None and not RUNTIMES[self.spec.runtime.container].is_detached:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        else:  # the children are sruns or clients of containers; ranks that were killed told nothing
            told = [said for path in self.attempt_dir.glob("exit.*.json") if (said := processes.read_said(path))]
            cpu = sum(said.cpu_seconds for said in told)
            peak = int(max((said.peak_memory_bytes for said in told), default=0))
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_memory_bytes": peak}

    # ---- steps

    def _watch(self, place: Place) -> Evidence:
        """Start the steps, servers first, and watch them until the attempt is decided."""
        for step in sorted(self.spec.steps, key=lambda s: s.role == "main"):
            self._launch(step, place)
            if step.probe is not None and not self._wait_ready(step, place):
                exits = self._exits()
                failed = None if exits or self.asked else step.name
                return replace(self._stopped(exits), ready_failed=failed)
        return self._until_decided()

    def _launch(self, step: Step, place: Place) -> None:
        new = self.allocation.start(step, place)
        self.started += new
        for process in new:
            argv = list(process.popen.args)  # type: ignore[arg-type]
            self._event("launched", step=step.name, rank=process.rank, pid=process.popen.pid, argv=argv)

    def _wait_ready(self, step: Any, place: Place) -> bool:
        clock = RunningTime()
        while clock() < step.probe.deadline and not self.asked and not self._exits():
            if processes.is_ready(step.probe, place):
                self._event("ready", step=step.name)
                return True
            time.sleep(0.2)
        return False

    def _until_decided(self) -> Evidence:
        noticed: list[RankExit] = []
        clock, lost = RunningTime(), None  # the wall clock may jump, and this process be stopped
        beats = Heartbeats(self.spec, self.attempt_dir, clock())
        while True:
            noticed += [e for e in self._exits() if (e.step, e.rank) not in {(n.step, n.rank) for n in noticed}]
            now = clock()
            if only_secondhand(noticed) and not self.asked:
                lost = now if lost is None else lost
                if now - lost < _CAUSE_S:
                    time.sleep(_POLL_S)
                    continue
                noticed += self._on_their_way_out(noticed)
            self.reason = self.reason or self._noticed()
            if self.asked or self.reason or self._decided(noticed):
                return self._stopped(noticed)
            if beats.silence(now) > self.spec.limits.hang_s:
                return self._hang()
            time.sleep(_POLL_S)

    def _noticed(self) -> Reason | None:
        now = time.monotonic()
        if now - self._looked < _NOTICED_S:
            return None
        self._looked = now
        if now - self._claim_read > claim_s(self.spec):
            self._claim_read = now
            if self._is_superseded():
                processes.kill_all(self.started)
                return Reason("requeued", leaving=True)
        return self.allocation.noticed()

    def _stopped(self, noticed: list[RankExit]) -> Evidence:
        """Stop what still runs, and say what is known."""
        before = list(noticed)
        if not self.asked and not self.reason and classify(Evidence(before)).exit_class != "finished":
            # First of all: where Slurm has told the steps to end, a server may be dead and a worker be saving.
            self.reason = self.allocation.why(None)
        self._stop()
        late = [e for e in self._exits() if (e.step, e.rank) not in {(n.step, n.rank) for n in before}]
        if self.reason is None:
            # A server is stopped when the work is done: how it takes that is no evidence.
            return self._evidence([*before, *(e for e in late if self._is_main(e) and e.said)])
        exits = [*before, *late]
        return self._evidence([e for e in exits if self._is_main(e) or e.code > 0] or exits)

    def _evidence(self, exits: list[RankExit], **facts: Any) -> Evidence:
        asked, nodes = (self.reason.exit_class, self.reason.nodes) if self.reason else (None, ())
        return Evidence(exits, asked, bad_nodes=nodes, **facts)

    def _decided(self, noticed: list[RankExit]) -> bool:
        """Whether the attempt is over: a process ended badly, a server ended at all, or every main process ended."""
        mains = [p for p in self.started if p.step.role == "main"]
        ended = {(e.step, e.rank) for e in noticed}
        watched = noticed if self.spec.first_exit == "any" else [e for e in noticed if self._is_main(e)]
        bad = any(e.code != 0 or not self._is_main(e) for e in watched)
        return bad or all((p.step.name, p.rank) in ended for p in mains)

    def _is_main(self, exit: RankExit) -> bool:
        return next(s.role for s in self.spec.steps if s.name == exit.step) == "main"

    def _exits(self) -> list[RankExit]:
        return [e for p in self.started for e in p.exits()]

    def _stop(self) -> None:
        """Let what still runs save where a stop was asked for; otherwise end it."""
        if not self.asked and self.reason is None:
            processes.stop_all(self.started, 0.5)
            return
        signalled = self.asked[0] if self.asked else None
        self.reason = self.reason or self.allocation.why(signalled) or Reason("cancelled")
        self._event("stopping", signal=signalled and signalled.name, why=self.reason.exit_class)
        # When Slurm itself is ending the job, its KillWait is all the time there is; without a node nobody can save.
        short = self.reason.leaving or self.reason.exit_class == "node-failure"
        grace = min(3.0, self.spec.limits.save_s) if short else self.spec.limits.save_s
        processes.stop_all(self.started, grace)

    def _on_their_way_out(self, noticed: list[RankExit]) -> list[RankExit]:
        """Ranks that have said why they fail, and are still there: they may wait for those that wait for them."""
        known = {(e.step, e.rank) for e in noticed}
        ranks = [(s.name, rank) for s in self.spec.steps for rank in range(s.ntasks) if (s.name, rank) not in known]
        ends = [RankExit(*r, 1, processes.read_said(self.attempt_dir / f"exit.{r[0]}.{r[1]}.json")) for r in ranks]
        bad = [e for e in ends if e.said is not None and e.said.exit_class not in ("finished", "time-limit")]
        return [e for e in bad if not is_secondhand(e)]

    def _hang(self) -> Evidence:
        for process in self.started:
            process.signal(signal.SIGUSR1)  # the worker writes the stacks of all its threads
        time.sleep(1.0)
        before = self._exits()
        processes.kill_all(self.started)
        self.reason = self.allocation.why(None)  # a node that is gone looks the same from here
        return self._evidence(before, hang_s=self.spec.limits.hang_s)

    # ---- speaking

    def _tell(self, old: str, new: str, result: Outcome | None = None) -> None:
        """Tell the hook; when Slurm is ending the job there is little time."""
        facts = {"attempt": self.attempt_dir.name, "job": self.allocation.job}
        if result is not None:
            facts |= {"exit_class": result.exit_class, "message": result.message, "action": result.action}
        trouble = notify(self.spec, old, new, _LEAVING_S if self._is_leaving() else LIMIT_S, **facts)
        if trouble is not None:
            with contextlib.suppress(OSError):
                self._event("notify", message=trouble)

    def _event(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time": time.time(), "event": event, **facts})
        with (self.attempt_dir / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _end(self, result: Outcome) -> None:
        body = {"class": result.exit_class, "message": result.message, "action": result.action}
        nodes = {"excluded": result.exclude, "suspect": result.suspect}
        words = last_words(self.attempt_dir, *result.blamed) if result.blamed else {}
        try:
            self._event("end", **body, **{k: v for k, v in nodes.items() if v}, **words, **self._cost())
        except OSError as error:  # the disk that is full holds our own words too
            print(f"{self.spec.stage}: {result.message}; {self._storage_message(error)}", flush=True)
            return
        print(f"{self.spec.stage}: {result.exit_class}{': ' if result.message else ''}{result.message}", flush=True)
