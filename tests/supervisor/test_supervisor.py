"""One attempt: what is made, what is never taken for made, and how every kind of end is told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import store
from launcher.spec import Input, Limits, Probe, StageSpec, Step, encode, stage_text
from launcher.supervisor.allocation import Reason, ThisMachine
from launcher.supervisor.main import Supervisor
from tests.supervisor.counting import Store, counting_stage, counting_step


def weights(at: Store, spec: StageSpec) -> str | None:
    path = at.root / spec.artifact / "checkpoint" / "weights"
    return path.read_text() if path.exists() else None


def test_a_finished_attempt_leaves_a_whole_artifact(at: Store) -> None:
    spec = counting_stage(counting_step(until=3))
    assert at.run(spec) == 0
    receipt = store.read_receipt(at.root, spec.artifact)
    assert receipt is not None and list(receipt.files) == ["checkpoint/weights"]
    assert receipt.record == {"steps": 3} and receipt.attempts == 1 and receipt.seconds > 0
    assert sorted(p.name for p in (at.root / spec.artifact).iterdir()) == ["artifact.json", "checkpoint"]
    assert [p.name for p in (at.root / "artifacts/train").iterdir()] == [spec.fingerprint]
    assert at.end(spec)["class"] == "finished" and at.end(spec)["action"] == "done"


def test_several_ranks_finish_together(at: Store) -> None:
    spec = counting_stage(counting_step(ntasks=3, until=3))
    assert at.run(spec) == 0
    launched = [e for e in at.events(spec) if e["event"] == "launched"]
    assert [e["rank"] for e in launched] == [0, 1, 2]
    assert {p.name for p in at.attempt_dir(spec).glob("exit.*")} == {f"exit.count.{i}.json" for i in range(3)}


@pytest.mark.parametrize(
    ("options", "exit_class", "action", "code", "message"),
    [
        ({"fail": "raise"}, "crashed", "stop", 1, "RuntimeError: a fault of the code"),
        ({"fail": "user"}, "user-error", "stop", 2, "data.jsonl:3: not text; mend it"),
        ({"fail": "diverge"}, "diverged", "stop", 1, "step 2: loss is nan"),
        ({"fail": "memory"}, "out-of-memory", "stop", 1, "ask for more memory a node"),
        ({"fail": "gpu-memory"}, "out-of-memory", "stop", 1, "out of GPU memory: CUDA out of memory"),
        ({"fail": "full"}, "storage", "stop", 1, "No space left"),
        ({"fail": "exit"}, "crashed", "stop", 1, "exit code 7"),
        ({"fail": "kill"}, "crashed", "again", 1, "killed by SIGKILL"),
    ],
)
def test_every_bad_end_has_its_class(
    at: Store, options: dict[str, str], exit_class: str, action: str, code: int, message: str
) -> None:
    spec = counting_stage(counting_step(until=5, fail_at=2, **options))
    assert at.run(spec) == code
    end = at.end(spec)
    assert (end["class"], end["action"]) == (exit_class, action) and message in end["message"]
    assert store.read_receipt(at.root, spec.artifact) is None and not (at.root / spec.artifact).exists()
    assert not at.processes()


def test_what_the_kernel_kills_for_want_of_memory_is_not_tried_again(at: Store, small_memory: Path) -> None:
    """In a control group of 48 MiB: Linux kills the worker as it does on a node that is full."""
    spec = counting_stage(counting_step(until=5, fail_at=3, fail="oom", cgroup=small_memory))
    assert at.run(spec) == 1
    end = at.end(spec)
    assert (end["class"], end["action"]) == ("out-of-memory", "stop") and "killed because" in end["message"], end
    assert end["tail"] == ["from step 0", "taking memory"] and end["log"] == "count.0.log"


def test_the_last_lines_of_the_log_stand_in_the_events(at: Store) -> None:
    spec = counting_stage(counting_step(until=5, ntasks=2, fail_at=2, fail="exit"))
    at.run(spec)
    end = at.end(spec)
    assert end["tail"][-3:] == ["one", "two", "the last words"] and end["log"] in ("count.0.log", "count.1.log")
    assert (at.attempt_dir(spec) / end["log"]).read_text().splitlines()[-1] == end["tail"][-1]


def test_one_rank_that_dies_ends_the_others_at_once(at: Store) -> None:
    spec = counting_stage(counting_step(ntasks=2, until=1000, sleep=0.05))
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    victim = next(e["pid"] for e in at.events(spec) if e["event"] == "launched" and e["rank"] == 1)
    os.kill(victim, signal.SIGKILL)
    assert supervisor.wait(timeout=30) == 1
    assert "rank 1: killed by SIGKILL" in at.end(spec)["message"]
    assert not at.processes()


@pytest.mark.parametrize(("number", "exit_class"), [(signal.SIGTERM, "cancelled"), (signal.SIGUSR2, "time-limit")])
def test_asked_to_stop_it_lets_the_worker_save(at: Store, number: signal.Signals, exit_class: str) -> None:
    spec = counting_stage(counting_step(until=1000, sleep=0.05, save=1000))
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 3))
    supervisor.send_signal(number)
    supervisor.send_signal(number)  # Slurm may send a signal twice
    assert supervisor.wait(timeout=30) == 1
    assert at.end(spec)["class"] == exit_class
    saved = int((store.partial_dir(at.root, spec.artifact) / "progress" / "count").read_text())
    assert saved >= 3
    again = replace(spec, steps=(counting_step(until=saved + 2),))
    assert at.run(again) == 0
    assert f"from step {saved}" in (at.attempt_dir(spec, 2) / "count.0.log").read_text()
    receipt = store.read_receipt(at.root, spec.artifact)
    assert receipt is not None and receipt.attempts == 2


def test_a_worker_that_does_not_listen_is_killed_when_its_time_to_save_is_over(at: Store) -> None:
    limits = Limits(hang_s=30.0, save_s=0.5)
    spec = counting_stage(counting_step(until=1000, sleep=0.05, ignore=1), limits=limits)
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    supervisor.terminate()
    assert supervisor.wait(timeout=30) == 1
    assert at.end(spec)["class"] == "cancelled" and "not all processes saved" in at.end(spec)["message"]
    assert not at.processes()


def test_a_hang_is_seen_and_the_stacks_are_kept(at: Store) -> None:
    spec = counting_stage(counting_step(until=9, hang_at=3), limits=Limits(hang_s=4.0, save_s=1.0))
    assert at.run(spec) == 1
    assert at.end(spec)["class"] == "hang" and at.end(spec)["action"] == "again"
    assert "in fail" in (at.attempt_dir(spec) / "count.0.log").read_text()


def test_no_worker_outlives_a_killed_supervisor(at: Store) -> None:
    spec = counting_stage(counting_step(ntasks=2, until=1000, sleep=0.05))
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    supervisor.kill()
    supervisor.wait()
    at.wait_for(lambda: not at.processes())
    assert at.events(spec)[-1]["event"] != "end"
    # The claim of the dead is no obstacle, and the next attempt goes on from what was saved.
    assert at.run(replace(spec, steps=(counting_step(until=4),))) == 0
    assert weights(at, spec) is not None


def test_a_life_whose_claim_is_taken_over_ends_at_once(at: Store) -> None:
    """As when Slurm cannot reach the node, gives it up and starts the job elsewhere."""
    spec = counting_stage(counting_step(until=1000, sleep=0.05))
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    claim = store.claim_dir(at.root, spec.artifact)
    later = store.this_process()
    store.write_json(claim / "owner.json", encode(later))
    assert supervisor.wait(timeout=30) == 1
    assert at.end(spec)["class"] == "requeued" and not at.processes()
    assert store.claim_holder(claim) == later


def test_what_a_cut_off_attempt_left_in_a_port_is_cleared(at: Store) -> None:
    spec = counting_stage(counting_step(until=2))
    half = store.partial_dir(at.root, spec.artifact) / "checkpoint" / "iter_0000001"
    half.mkdir(parents=True)
    (half / "junk").write_text("half")
    assert at.run(spec) == 0
    receipt = store.read_receipt(at.root, spec.artifact)
    assert receipt is not None and list(receipt.files) == ["checkpoint/weights"]


def test_a_port_that_a_finished_worker_left_empty_is_no_artifact(at: Store) -> None:
    spec = counting_stage(counting_step(until=2, empty=1))
    assert at.run(spec) == 1
    assert "is empty although the worker finished" in at.end(spec)["message"]
    assert store.read_receipt(at.root, spec.artifact) is None


def test_killed_between_receipt_and_rename_it_is_sealed_without_work(at: Store) -> None:
    spec = counting_stage(counting_step(until=2))
    assert at.run(spec) == 0
    os.rename(at.root / spec.artifact, store.partial_dir(at.root, spec.artifact))
    assert at.run(replace(spec, steps=(counting_step(until=2, fail_at=1, fail="raise"),))) == 0
    assert not [e for e in at.events(spec, 2) if e["event"] == "launched"]
    assert weights(at, spec) == "2"


def test_a_damaged_artifact_is_set_aside_and_made_anew(at: Store) -> None:
    spec = counting_stage(counting_step(until=2))
    assert at.run(spec) == 0
    (at.root / spec.artifact / "checkpoint" / "weights").write_text("longer than before")
    assert store.read_receipt(at.root, spec.artifact) is None
    assert at.run(spec) == 0
    assert weights(at, spec) == "2"
    (aside,) = (at.root / "artifacts/train").glob("*.damaged.*")
    assert (aside / "checkpoint" / "weights").read_text() == "longer than before"


def test_inputs_that_are_seen_late_are_waited_for(at: Store) -> None:
    """As on NFS, where another node's files may stay unseen for a minute: simulated, by moving a whole artifact in."""
    made, reads = (counting_stage(counting_step(until=2), stage=n, fingerprint=n * 20) for n in "ab")
    at.run(made)
    hidden = at.root / "hidden"
    (at.root / made.artifact).rename(hidden)
    inputs = {"a": Input(made.outputs["checkpoint"].path, "megatron", made.fingerprint)}
    reads = replace(reads, inputs=inputs, limits=replace(reads.limits, visibility_s=60.0))
    supervisor = at.start(reads)
    at.wait_for(lambda: store.claim_holder(store.claim_dir(at.root, reads.artifact)))
    hidden.rename(at.root / made.artifact)
    assert supervisor.wait(timeout=30) == 0, at.end(reads)


def test_waiting_for_inputs_ends_when_asked_to_stop(at: Store) -> None:
    inputs = {"a": Input("artifacts/train/never/checkpoint", "megatron", "x" * 20)}
    limits = Limits(hang_s=30.0, save_s=10.0, visibility_s=3600.0)
    spec = counting_stage(counting_step(until=2), inputs=inputs, limits=limits)
    supervisor = at.start(spec)
    at.wait_for(lambda: store.claim_holder(store.claim_dir(at.root, spec.artifact)))
    supervisor.terminate()
    supervisor.wait(timeout=30)
    assert "artifacts/train/never: input a is not whole" in at.end(spec)["message"]


def test_inputs_that_are_gone_are_named_before_anything_starts(at: Store) -> None:
    inputs = {
        "checkpoint": Input("artifacts/train/gone/checkpoint", "megatron", "x" * 20),
        "other": Input(str(at.root / "outside"), "hf", "y" * 20),
    }
    spec = counting_stage(counting_step(until=2), inputs=inputs)
    assert at.run(spec) == 2
    message = at.end(spec)["message"]
    assert "artifacts/train/gone" in message and "outside" in message
    assert not [e for e in at.events(spec) if e["event"] == "launched"]


def test_two_makers_of_one_artifact_take_turns(at: Store) -> None:
    first = counting_stage(counting_step(until=20, sleep=0.05), stage="first")
    second = counting_stage(counting_step(until=20, fail_at=1, fail="raise"), stage="second")
    one = at.start(first)
    at.wait_for(lambda: at.step_reached(first, 1))
    two = at.start(second)
    at.wait_for(lambda: (at.attempt_dir(second) / "events.jsonl").exists() and len(at.events(second)) > 1)
    assert f"process {one.pid}" in at.events(second)[1]["message"]
    assert (one.wait(timeout=30), two.wait(timeout=30)) == (0, 0)
    assert "made by another run" in at.end(second)["message"]


# ------------------------------------------------------------------------------------------------------- components


def server(code: str, probe: Probe) -> Step:
    return Step(name="server", argv=("{python}", "-c", code), role="server", probe=probe)


TCP_SERVER = """
import socket, sys, time
time.sleep(0.3)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as s:
    while True:
        s.accept()[0].close()
"""


def test_a_server_is_ready_before_the_main_step_and_gone_after_it(at: Store) -> None:
    step = server(TCP_SERVER, Probe("tcp", "{host:server}:{port:server}", deadline=20.0))
    step = replace(step, argv=(*step.argv, "{port:server}"))
    spec = counting_stage(counting_step(until=3), step)
    assert at.run(spec) == 0
    order = [(e["event"], e.get("step")) for e in at.events(spec) if e["event"] in ("launched", "ready")]
    assert order == [("launched", "server"), ("ready", "server"), ("launched", "count")]
    assert not at.processes()


def test_a_server_that_never_answers_is_named(at: Store) -> None:
    step = server("import time; time.sleep(60)", Probe("file", "never", deadline=0.5))
    spec = counting_stage(counting_step(until=3), step)
    assert at.run(spec) == 1
    assert "step server did not become ready" in at.end(spec)["message"]
    assert not at.processes()


def test_a_server_that_dies_ends_the_stage(at: Store) -> None:
    code = "import pathlib, sys, time; pathlib.Path('up').touch(); time.sleep(1); sys.exit(3)"
    spec = counting_stage(counting_step(until=1000, sleep=0.05), server(code, Probe("file", "up", deadline=20.0)))
    assert at.run(spec) == 1
    assert "step server, rank 0: exit code 3" in at.end(spec)["message"]
    assert not at.processes()


def test_by_hand_it_says_who_starts_it(at: Store) -> None:
    spec = counting_stage(counting_step())
    path = store.stage_dir(at.root, spec.run, spec.stage) / "stage.json"
    store.write_atomic(path, stage_text(spec))
    left_out = ("PRISM_ATTEMPT", "SLURM_JOB_ID")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"PRISM_ROOT": str(at.root)}
    command = [sys.executable, "-m", "launcher.supervisor", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "is started by" in done.stderr and "Traceback" not in done.stderr


class Preempted(ThisMachine):
    """This machine as Slurm: it says that the job is preempted, to who asks because the steps were told to end."""

    def why(self, number: signal.Signals | None) -> Reason | None:
        return super().why(number) or Reason("preempted")


def test_a_server_that_dies_of_the_preemption_takes_no_time_from_those_who_save(at: Store) -> None:
    """In a preemption with grace time every process of the steps gets TERM: a server dies, workers save."""
    code = "import pathlib, time; pathlib.Path('up').touch(); time.sleep(60)"
    main = counting_step(until=100, sleep=1.0, save=1000)
    spec = counting_stage(main, server(code, Probe("file", "up", deadline=20.0)))
    path = store.stage_dir(at.root, spec.run, spec.stage) / "stage.json"
    store.write_atomic(path, stage_text(spec))
    supervisor = Supervisor(spec, at.root, Preempted(spec, at.root, path, store.new_attempt(path.parent)))
    threading.Thread(target=_end_steps, args=(at, spec, supervisor)).start()
    old = [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]
    try:
        assert supervisor.run() == 1
    finally:
        for number, handler in old:
            signal.signal(number, handler)
    end = at.end(spec)
    assert (end["class"], end["message"]) == ("preempted", "preempted by a job of higher priority")
    assert (store.partial_dir(at.root, spec.artifact) / "progress" / "count").exists()


def _end_steps(at: Store, spec: StageSpec, supervisor: Supervisor) -> None:
    at.wait_for(lambda: at.step_reached(spec, 1))
    for process in supervisor.started:
        process.signal(signal.SIGTERM)
