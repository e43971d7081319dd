"""The supervisor's containers of this machine by Docker and Podman: output, exit codes, signals, nothing left."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from container_calls import CHECKOUT, call

from launcher import store
from launcher.containers import Here, list_argv, name_prefix, remove_argv, wrap
from launcher.errors import UserError, WorldError
from launcher.runtimes import check_containers
from launcher.spec import Runtime, StageSpec, Step
from tests.supervisor.counting import Store, counting_stage, counting_step

SLOW = {"until": 1000, "sleep": 0.05}


class Engine:
    """A container engine with an image, at work in a store."""

    def __init__(self, name: str, image: str, at: Store):
        self.name, self.image, self.at = name, image, at
        self.runtime = Runtime(container=name)  # type: ignore[arg-type]

    def stage(self, ntasks: int = 1, image: str | None = None, **options: object) -> StageSpec:
        """A counting stage whose ranks run in containers."""
        return contained(self, image or self.image, ntasks, **options)

    def containers(self, spec: StageSpec) -> list[str]:
        """Names of all that work on the stage's artifact."""
        return call(*list_argv(self.name, f"{self.at.root}/{spec.artifact}")).stdout.split()


@pytest.fixture
def at(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def by(engine: str, bare_image: str, at: Store) -> Engine:
    return Engine(engine, bare_image, at)


def contained(by: Engine, image: str, ntasks: int, **options: object) -> StageSpec:
    step = counting_step(ntasks=ntasks, **options)
    step = replace(
        step,
        argv=tuple(word.replace("{python}", "python3") for word in step.argv),
        env={"PYTHONPATH": str(CHECKOUT)},
        image=image,
        mounts=(str(by.at.root), f"{CHECKOUT}:{CHECKOUT}:ro"),
    )
    return counting_stage(step, runtime=by.runtime)


def log(at: Store, spec: StageSpec, number: int = 1) -> str:
    return (at.attempt_dir(spec, number) / "count.0.log").read_text()


def test_ranks_in_containers_make_a_whole_artifact(at: Store, by: Engine) -> None:
    spec = by.stage(ntasks=2, until=3)
    assert at.run(spec) == 0
    receipt = store.read_receipt(at.root, spec.artifact)
    assert receipt is not None and receipt.record == {"steps": 3}
    assert receipt.cpu_seconds > 0 and receipt.peak_memory_bytes > 2**20, "what the ranks used, not their clients"
    assert log(at, spec).splitlines() == ["from step 0"]
    assert {p.stat().st_uid for p in (at.root / spec.artifact).rglob("*")} == {os.getuid()}
    argvs = [e["argv"] for e in at.events(spec) if e["event"] == "launched"]
    assert [argv[:2] for argv in argvs] == [[by.name, "run"]] * 2
    assert by.containers(spec) == []


@pytest.mark.parametrize(
    ("options", "exit_class", "action", "code", "message"),
    [
        ({"fail": "raise"}, "crashed", "stop", 1, "RuntimeError: a fault of the code"),
        ({"fail": "user"}, "user-error", "stop", 2, "data.jsonl:3: not text; mend it"),
        ({"fail": "exit"}, "crashed", "stop", 1, "exit code 7"),
        ({"fail": "kill"}, "crashed", "again", 1, "killed by SIGKILL"),
    ],
)
def test_a_bad_end_is_told_as_without_a_container(
    at: Store, by: Engine, options: dict[str, str], exit_class: str, action: str, code: int, message: str
) -> None:
    spec = by.stage(until=5, fail_at=2, **options)
    assert at.run(spec) == code
    end = at.end(spec)
    assert (end["class"], end["action"]) == (exit_class, action) and message in end["message"]
    assert by.containers(spec) == []


def test_asked_to_stop_the_worker_saves_and_the_next_attempt_goes_on(at: Store, by: Engine) -> None:
    spec = by.stage(save=1000, **SLOW)
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 3))
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=60) == 1
    assert at.end(spec)["class"] == "cancelled" and at.end(spec)["message"] == "stopped as asked"
    saved = int((store.partial_dir(at.root, spec.artifact) / "progress" / "count").read_text())
    assert saved >= 3 and by.containers(spec) == []
    assert at.run(by.stage(until=saved + 2)) == 0
    assert f"from step {saved}" in log(at, spec, 2)


def test_a_hang_shows_its_stacks_and_leaves_no_container(at: Store, by: Engine) -> None:
    spec = by.stage(until=9, hang_at=3)
    spec = replace(spec, limits=replace(spec.limits, hang_s=4.0, save_s=1.0))
    assert at.run(spec) == 1
    assert at.end(spec)["class"] == "hang" and "in fail" in log(at, spec)
    assert by.containers(spec) == []


def test_a_killed_supervisor_leaves_no_container(at: Store, by: Engine) -> None:
    spec = by.stage(ntasks=2, **SLOW)
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    assert len(by.containers(spec)) == 2
    supervisor.kill()
    supervisor.wait()
    at.wait_for(lambda: not by.containers(spec))
    at.wait_for(lambda: not at.processes())


def test_a_killed_client_takes_its_container_with_it(at: Store, by: Engine) -> None:
    spec = by.stage(**SLOW)
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    (client,) = (e["pid"] for e in at.events(spec) if e["event"] == "launched")
    os.kill(client, signal.SIGKILL)
    assert supervisor.wait(timeout=60) == 1
    assert at.end(spec)["class"] == "crashed" and at.end(spec)["action"] == "again"
    assert by.containers(spec) == []


def test_what_a_dead_machine_left_is_removed_before_the_next_attempt(at: Store, by: Engine) -> None:
    """The guard dies with everything else here; only the label tells whose the container was."""
    spec = by.stage(until=3)
    here = Here(f"{name_prefix(str(at.root / 'before'))}count-0", f"{at.root}/{spec.artifact}", "0:0")
    argv = wrap(spec.steps[0], ("sleep", "600"), {"A": "x"}, "/", by.runtime, here)
    call(*argv[:2], "--detach", *argv[2:])
    other = Here(f"{name_prefix(str(at.root / 'other'))}count-0", f"{at.root}/{spec.artifact}-other", "0:0")
    argv = wrap(spec.steps[0], ("sleep", "600"), {"A": "x"}, "/", by.runtime, other)
    call(*argv[:2], "--detach", *argv[2:])
    assert by.containers(spec) == [here.name]
    assert at.run(spec) == 0
    assert by.containers(spec) == []
    assert other.name in call(by.name, "ps", "--format={{.Names}}").stdout, "another artifact's is left alone"
    call(*remove_argv(by.name, (other.name,)))


def test_hostile_values_arrive_as_text(at: Store, by: Engine) -> None:
    comma = "," if by.name == "docker" else ""
    folder = at.root / f"a{comma} b'$(touch x)`y`"
    folder.mkdir(parents=True)
    (folder / "file").write_text("read")
    hostile = {"A": "$(touch /tmp/x); 'q' \"d\"", "B": "two\nlines\\n", "C": "-e", "D": "ünïcode,=:", "E": ""}
    step = Step(name="s", argv=(), image=by.image, mounts=(f"{folder}:/mnt/c d:ro", str(at.root)))
    code = (
        "import json, os, pathlib; inside = pathlib.Path('/mnt/c d')\n"
        "try: (inside / 'new').write_text(''); state = 'writable'\n"
        "except OSError as error: state = error.strerror\n"
        "print(json.dumps([dict(os.environ), (inside / 'file').read_text(), state, os.getcwd()]))"
    )
    here = Here("prism-hostile", str(at.root), f"{os.getuid()}:{os.getgid()}", ("PASSED", "NOT_SET"))
    os.environ["PASSED"] = "se cret"
    try:
        argv = wrap(step, ("python3", "-c", code), hostile, str(folder.parent), by.runtime, here)
        environment, text, state, where = json.loads(call(*argv).stdout)
    finally:
        del os.environ["PASSED"]
    assert {k: environment.get(k) for k in hostile} == hostile
    assert environment["PASSED"] == "se cret" and "NOT_SET" not in environment and "se cret" not in " ".join(argv)
    assert (text, state, where) == ("read", "Read-only file system", str(at.root))


def test_a_container_that_cannot_start_says_why(at: Store, by: Engine) -> None:
    spec = by.stage(image="prism-launch-nowhere:1", until=3)
    assert at.run(spec) == 1
    end = at.end(spec)
    assert end["action"] == "stop" and f"{by.name} could not start the container" in end["message"]
    assert "prism-launch-nowhere:1" in end["message"]


def test_images_are_looked_for_before_a_run(by: Engine) -> None:
    step = Step(name="s", argv=("x",), image=by.image)
    check_containers(by.name, [step])
    with pytest.raises(UserError, match="prism-launch-nowhere:1 is not here") as caught:
        check_containers(by.name, [step, replace(step, image="prism-launch-nowhere:1")])
    assert len(caught.value.problems) == 1
    with pytest.raises(UserError, match="cannot quote"):
        check_containers(by.name, [replace(step, mounts=('/a"b',))])


def test_a_daemon_that_does_not_answer_is_named(docker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(name="s", argv=("x",), image="cpu:1")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/socket")
    with pytest.raises(WorldError, match="docker: .*nowhere/socket"):
        check_containers("docker", [step])
    monkeypatch.setenv("PATH", "/nowhere")
    for container, program in (("docker", "docker"), ("podman", "podman"), ("charliecloud", "ch-run")):
        step = replace(step, image="/images/cpu" if container == "charliecloud" else "cpu:1")
        with pytest.raises(WorldError, match=f"{program}: not installed here"):
            check_containers(container, [step])
