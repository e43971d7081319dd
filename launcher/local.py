"""The local driver: starts supervisors on this machine in the plan's order and rejoins living ones.

Supervisors are sessions of their own and outlive a killed driver; the next `run` or `resume` finds them by process id
and start time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launcher import store
from launcher.attempts import Attempt, attempts, attempts_at, newest_attempt, step_of, tail_of
from launcher.data import install_command
from launcher.errors import UserError, WorldError
from launcher.interpreter import module_command, module_environment
from launcher.run_record import PlannedStage, RunRecord, claimed, write_run
from launcher.runtimes import check_containers
from launcher.spec import stage_text
from launcher.state import stage_states
from launcher.status import RunStatus, run_status
from launcher.store import Owner, Receipt
from launcher.supervisor.classify import ACTIONS
from launcher.watch import Follower, tell_unheard

#: Modules of the extra `local`, looked for without importing them, and where it is named.
_NEEDS = (
    "torch",
    "megatron",
    "transformers",
    "tokenizers",
    "trl",
    "datasets",
    "reasoning_gym",
    "safetensors",
    "einops",
)
_POLL_S = 0.1
_SHOW_S = 0.5


def run_local(root: Path, record: RunRecord, slots: int, *, detach: bool = False, as_json: bool = False) -> int:
    """Make everything of the plan that is not made yet, `slots` stages side by side; returns the exit code.

    Raises UserError where another process drives this run, or drives another plan of it.
    """
    _refuse_obstacles(root, record)
    check_here(record)
    if detach:
        return _detach(root, record, as_json)
    with claimed(root, record.run):
        _write(root, record)
        return Driver(root, record, slots, as_json).run()


def _refuse_obstacles(root: Path, record: RunRecord) -> None:
    """Refuse a plan with a stage that this version cannot run and that is not made yet."""
    problems = [
        f"stage {stage.spec.stage}: {why}"
        for stage in record.stages
        if stage.obstacles and store.read_receipt(root, stage.spec.artifact) is None
        for why in stage.obstacles
    ]
    if problems:
        raise UserError(problems)


def check_here(record: RunRecord) -> None:
    """Refuse to begin what this machine cannot run: packages, or runtime and images of containers."""
    container = record.stages[0].spec.runtime.container
    if container == "none":
        _check_installed()
    else:
        check_containers(container, [step for stage in record.stages for step in stage.spec.steps])


def _check_installed() -> None:
    absent = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise WorldError(f"not installed here: {', '.join(absent)}; {install_command('local')}")


def _detach(root: Path, record: RunRecord, as_json: bool) -> int:
    with claimed(root, record.run):
        _write(root, record)
    log = store.run_dir(root, record.run) / "driver.log"
    command = module_command("launcher.cli", "resume", record.run, "--root", str(root))
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=module_environment(os.environ),
        )
    # In its name, so that who watches or runs at once finds the run driven.
    store.claim(store.driver_claim(root, record.run), store.this_process(child.pid))
    if as_json:
        print(json.dumps({"schema": 1, "event": "detached", "time": time.time(), "run": record.run, "pid": child.pid}))
    else:
        at = f"{shlex.quote(record.run)} --root {shlex.quote(str(root))}"
        print(f"run {record.run} goes on in the background; follow it with: prism-launch watch {at}")
    return 0


def _write(root: Path, record: RunRecord) -> None:
    """`run.json` and every `stage.json`. Raises UserError where a stage of an earlier plan still runs."""
    problems = [
        f"{a.folder}: stage {stage.spec.stage} of an earlier plan still runs; `prism-launch cancel {record.run}` first"
        for stage in record.stages
        for a, fingerprint in attempts(root, record.run, stage.spec.stage)
        if fingerprint != stage.spec.fingerprint and a.is_living
    ]
    if problems:
        raise UserError(problems)
    write_run(root, record)
    for stage in record.stages:
        store.write_atomic(stage_json(root, stage), stage_text(stage.spec))


def stage_json(root: Path, stage: PlannedStage) -> Path:
    """Where a stage's `stage.json` lies."""
    return store.stage_dir(root, stage.spec.run, stage.spec.stage) / "stage.json"


# ------------------------------------------------------------------------------------------------------------- driver


@dataclass
class Driver:
    """A run being driven from this process."""

    root: Path
    record: RunRecord
    slots: int
    as_json: bool = False
    done: dict[str, Receipt] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    running: dict[str, Owner] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    without_progress: dict[str, int] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Drive to the end; 0 when everything is made, 1 when something failed, 130 when stopped."""
        self._look()
        with Follower(self.record.run, self.as_json) as follower, _terminated_as_interrupted():
            try:
                self._drive(follower)
            except KeyboardInterrupt:
                self._stop(follower)
                return 130
            status = run_status(self.root, self.record)
            follower.show(status)
            follower.end(status)
        for line in self._failures():
            print(line, file=sys.stderr)
        return self._exit_code()

    def _exit_code(self) -> int:
        """2 where the user's input is the only fault, 1 where something else failed too."""
        failed = [s for s in stage_states(self.root, self.record, self.done) if s.stage in self.failed]
        if not failed:
            return 0
        return 2 if all(s.exit_class == "user-error" for s in failed) else 1

    def _drive(self, follower: Follower) -> None:
        shown = 0.0
        while self._start_ready() or self.running:
            if time.monotonic() - shown > _SHOW_S:
                follower.show(self._status())
                shown = time.monotonic()
            time.sleep(_POLL_S)
            for name in [n for n, owner in self.running.items() if not self._lives(n, owner)]:
                self._ended(name)

    def _status(self) -> RunStatus:
        return run_status(self.root, self.record, done=self.done)

    def _look(self) -> None:
        """What is made already, and what still runs from before."""
        for stage in self.record.stages:
            name = stage.spec.stage
            attempt = newest_attempt(self.root, stage.spec)
            receipt = store.read_receipt(self.root, stage.spec.artifact)
            if receipt is not None:
                self.done[name] = receipt
            elif attempt is not None and attempt.is_living and attempt.owner is not None:
                self.running[name] = self._rejoinable(name, attempt, attempt.owner)
                self.names[name] = attempt.name

    @staticmethod
    def _rejoinable(name: str, attempt: Attempt, owner: Owner) -> Owner:
        if store.is_alive(owner) is None:
            raise UserError(
                f"{attempt.folder}: stage {name} runs on {owner.host}, which cannot be looked at from here; go on "
                f"there, or, if {owner.host} is gone, remove {attempt.folder}"
            )
        return owner

    def _start_ready(self) -> bool:
        """Start what can start now; returns whether anything was started."""
        started = False
        for stage in self.record.stages:
            name = stage.spec.stage
            free = self.slots - sum(self._slots_of(s) for s in self.record.stages if s.spec.stage in self.running)
            ready = name not in {*self.done, *self.failed, *self.running} and set(stage.depends) <= set(self.done)
            if ready and (self._slots_of(stage) <= free or not self.running):
                self._start(stage)
                started = True
        return started

    @staticmethod
    def _slots_of(stage: PlannedStage) -> int:
        return sum(step.ntasks * step.cpus for step in stage.spec.steps)

    def _start(self, stage: PlannedStage) -> None:
        path = stage_json(self.root, stage)
        folder = store.new_attempt(path.parent)
        variables = {"PRISM_ROOT": str(self.root), "PRISM_ATTEMPT": str(folder)}
        with (folder / "supervisor.log").open("ab") as log:
            child = subprocess.Popen(
                module_command("launcher.supervisor", str(path)),
                env={**module_environment(os.environ), **variables},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children[stage.spec.stage] = child
        self.running[stage.spec.stage] = store.this_process(child.pid)
        self.names[stage.spec.stage] = folder.name

    def _lives(self, name: str, owner: Owner) -> bool:
        child = self.children.get(name)
        if child is not None and child.pid == owner.pid:
            return child.poll() is None
        return store.is_alive(owner) is not False

    def _ended(self, name: str) -> None:
        """Take note of an attempt's end: made, to be tried again, or failed."""
        del self.running[name]
        stage = self.record.stage(name)
        receipt = store.read_receipt(self.root, stage.spec.artifact)
        if receipt is not None:
            self.done[name] = receipt
            return
        # None: its supervisor ended before it could say anything.
        attempt = next((a for a in attempts_at(self.root, stage.spec) if a.name == self.names[name]), None)
        if attempt is None:
            self.silent[name] = self._last_words(stage, self.names[name])
        if attempt is None or attempt.end is None:  # its supervisor could not tell the hook
            tell_unheard(self.root, self.record, self._status(), {})
        if self._action(stage, attempt) != "again":
            self.failed.add(name)

    def _last_words(self, stage: PlannedStage, attempt: str) -> str:
        """What a supervisor that could not even begin left in its log."""
        words = tail_of(stage_json(self.root, stage).with_name(attempt) / "supervisor.log", 1)
        return f"its supervisor could not begin: {words[-1] if words else 'it said nothing'}"

    def _action(self, stage: PlannedStage, attempt: Attempt | None) -> str:
        if attempt is None:
            return "stop"  # the supervisor could not even begin; its log says why
        if (attempt.end.action if attempt.end else ACTIONS["crashed"]) != "again":
            return "stop"
        count = 0 if self._got_further(stage, attempt) else self.without_progress.get(stage.spec.stage, 0) + 1
        self.without_progress[stage.spec.stage] = count
        return "again" if count <= stage.spec.limits.max_no_progress else "stop"

    def _got_further(self, stage: PlannedStage, attempt: Attempt) -> bool:
        earlier = [a for a, _ in attempts(self.root, self.record.run, stage.spec.stage) if a.name != attempt.name]
        best = max((step_of(a) for a in earlier), default=0)
        return step_of(attempt) > best

    def _failures(self) -> list[str]:
        lines = []
        for state in stage_states(self.root, self.record, self.done):
            if state.stage in self.failed:
                why = f"{state.exit_class or 'crashed'}: {state.message}" if state.message else state.exit_class
                why = self.silent.get(state.stage) or why or "see its log"
                lines.append(f"prism-launch: stage {state.stage} failed: {why}")
                lines.append(f"  log: prism-launch logs {self.record.run} {state.stage} --root {self.root}")
        return lines

    def _stop(self, follower: Follower) -> None:
        """Ask every living stage to save and stop; asked a second time, kill."""
        follower.say(
            f"stopping {', '.join(self.running) or 'nothing'}; stages save first, interrupt again to kill them"
        )
        try:
            stop_owners(list(self.running.values()))
        except KeyboardInterrupt:
            for owner in self.running.values():
                _signal(owner, signal.SIGKILL)
        status = run_status(self.root, self.record)
        follower.show(status)
        follower.end(status)
        follower.say(f"stopped; go on with: prism-launch resume {self.record.run} --root {self.root}")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """TERM stops a run as Ctrl-C does: `cancel` sends it, and SIGINT may be ignored in a background process."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# ------------------------------------------------------------------------------------------------------------- cancel


def cancel_run(root: Path, record: RunRecord) -> list[str]:
    """Stop the driver and every living stage of a run, letting them save; returns the names of the stages stopped."""
    living = [(s.spec.stage, a.owner) for s, a in _living(root, record) if a.owner is not None]
    driver = store.claim_holder(store.driver_claim(root, record.run))
    owners = ([driver] if driver is not None else []) + [owner for _, owner in living]
    elsewhere = [o.host for o in owners if store.is_alive(o) is None]
    if elsewhere:
        raise UserError(f"run {record.run} runs on {', '.join(sorted(set(elsewhere)))}; cancel it there")
    stop_owners([o for o in owners if store.is_alive(o)])
    return [name for name, _ in living]


def _living(root: Path, record: RunRecord) -> Iterator[tuple[PlannedStage, Attempt]]:
    for stage in record.stages:
        attempt = newest_attempt(root, stage.spec)
        if attempt is not None and attempt.is_living:
            yield stage, attempt


def stop_owners(owners: list[Owner]) -> None:
    """Send TERM to processes of this machine and wait until they are gone."""
    for owner in owners:
        _signal(owner, signal.SIGCONT)  # a stopped process hears nothing
        _signal(owner, signal.SIGTERM)
    while any(store.is_alive(owner) for owner in owners):
        for owner in owners:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(owner.pid, os.WNOHANG)
        time.sleep(_POLL_S)


def _signal(owner: Owner, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if store.is_alive(owner):
            os.kill(owner.pid, number)
