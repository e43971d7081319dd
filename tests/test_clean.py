"""What `clean` frees, and above all what it must leave."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, slurm, store
from launcher.clean import KEPT_LOGS, Uses, find_waste, read_store, remove, size_of, uses
from launcher.errors import UserError
from launcher.run_record import RunRecord, claimed, write_run
from launcher.spec import StageSpec, stage_text
from launcher.store import Owner, Receipt
from launcher.submit import JOBS
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_run, counting_stage, counting_step

FORGOTTEN = "9" * 20


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    record = counting_run(("a", (), {}), ("b", ("a",), {}))
    write_run(tmp_path, record)
    return record


@pytest.fixture
def living() -> Iterator[Owner]:
    """A process of this machine that is none of ours."""
    child = subprocess.Popen(["sleep", "600"])
    yield store.this_process(child.pid)
    child.kill()
    child.wait()


def partial(root: Path, fingerprint: str, size: int = 100) -> Path:
    """An unfinished artifact."""
    folder = root / "artifacts" / "train" / f"{fingerprint}.partial"
    (folder / "progress" / "deep").mkdir(parents=True)
    (folder / "progress" / "deep" / "weights").write_bytes(bytes(size))
    return folder


def finished(root: Path, spec: StageSpec, size: int = 50) -> Path:
    """A whole artifact with its receipt."""
    port = store.working_path(root, spec.artifact, spec.outputs["checkpoint"].path)
    port.mkdir(parents=True)
    (port / "weights").write_bytes(bytes(size))
    files = store.list_files(store.partial_dir(root, spec.artifact))
    head: dict[str, Any] = {"kind": spec.kind, "kind_version": 1, "stage": spec.stage, "run": spec.run}
    receipt = Receipt(**head, fingerprint=spec.fingerprint, config={}, seed=0, inputs={}, outputs={}, files=files)
    store.seal(root, spec.artifact, receipt)
    return root / spec.artifact


def clean(root: Path, *words: str) -> dict[str, Any]:
    """`prism-launch clean --json`."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["clean", *words, "--root", str(root), "--json"]) == 0
    body: dict[str, Any] = json.loads(out.getvalue())
    return body


def freed(root: Path, *words: str) -> set[str]:
    return {os.path.relpath(row["path"], root) for row in clean(root, *words)["removed"]}


def everything(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


def test_a_dry_run_shows_sizes_and_reasons_and_removes_nothing(tmp_path: Path, record: RunRecord) -> None:
    partial(tmp_path, FORGOTTEN, 12345)
    before = everything(tmp_path)
    body = clean(tmp_path, "--dry-run")
    (row,) = body["removed"]
    assert row["path"].endswith(f"{FORGOTTEN}.partial") and row["bytes"] == body["bytes"] == 12345
    assert row["why"] == "unfinished, and no run plans it any more" and body["dry_run"] is True
    assert everything(tmp_path) == before


def test_what_no_run_plans_goes_and_what_one_plans_stays(tmp_path: Path, record: RunRecord) -> None:
    gone, kept = partial(tmp_path, FORGOTTEN), partial(tmp_path, record.stage("b").spec.fingerprint)
    assert freed(tmp_path) == {f"artifacts/train/{FORGOTTEN}.partial"}
    assert not gone.exists() and (kept / "progress" / "deep" / "weights").exists()
    assert not list(tmp_path.glob("artifacts/train/.*")) and not list(tmp_path.glob("artifacts/train/*.claim"))
    assert clean(tmp_path)["removed"] == []


def test_text_says_how_much_was_freed(tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    partial(tmp_path, FORGOTTEN, 5 << 20)
    assert cli.main(["clean", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"freed 5.0 MiB under {tmp_path}"


def test_leftovers_beside_a_finished_artifact_go(tmp_path: Path, record: RunRecord) -> None:
    spec = record.stage("a").spec
    whole = finished(tmp_path, spec)
    partial(tmp_path, spec.fingerprint)
    (whole / "progress").mkdir()
    (whole / "progress" / "checkpoint").write_bytes(bytes(7))
    whole.with_name(f"{whole.name}.damaged.1").mkdir()
    name = f"artifacts/train/{spec.fingerprint}"
    assert freed(tmp_path) == {f"{name}.partial", f"{name}.damaged.1", f"{name}/progress"}
    assert store.read_receipt(tmp_path, spec.artifact) is not None


def test_a_damaged_artifact_that_was_not_made_anew_stays(tmp_path: Path, record: RunRecord) -> None:
    (tmp_path / "artifacts" / "train" / f"{FORGOTTEN}.damaged.1").mkdir(parents=True)
    assert clean(tmp_path)["removed"] == []


def test_what_a_living_process_makes_stays(tmp_path: Path, record: RunRecord, living: Owner) -> None:
    kept = partial(tmp_path, FORGOTTEN)
    claim = store.claim_dir(tmp_path, f"artifacts/train/{FORGOTTEN}")
    assert store.claim(claim, living) is None
    body = clean(tmp_path)
    assert body["removed"] == [] and [row["path"] for row in body["held"]] == [str(kept)]
    assert kept.exists() and store.claim_holder(claim) == living


def test_a_dead_makers_claim_holds_nothing(tmp_path: Path, record: RunRecord, living: Owner) -> None:
    partial(tmp_path, FORGOTTEN)
    store.claim(store.claim_dir(tmp_path, f"artifacts/train/{FORGOTTEN}"), replace(living, start="1"))
    assert len(freed(tmp_path)) == 1


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", None, "COMPLETED"])
def test_a_maker_on_another_node_lives_by_slurms_word(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    """None: Slurm does not answer, and nothing may be taken for dead."""

    def call(*argv: str, timeout: float = 10.0) -> slurm.Answer:
        if state is None:
            return slurm.Answer(1, "", "Unable to contact slurm controller")
        return slurm.Answer(0, f"77|{state}|None|n1|\n", "")

    monkeypatch.setattr(slurm, "call", call)
    kept = partial(tmp_path, FORGOTTEN)
    owner = Owner("n1", "boot", 5, "9", "77")
    store.claim(store.claim_dir(tmp_path, f"artifacts/train/{FORGOTTEN}"), owner)
    body = clean(tmp_path)
    assert len(body["removed"]) == (1 if state == "COMPLETED" else 0) and kept.exists() == (state != "COMPLETED")


def test_jobs_are_asked_of_the_slurm_that_each_run_was_submitted_to(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job 5 goes on in the profile's Slurm, and the shell's own knows one of this number that has ended."""
    asked = []

    def call(*argv: str, timeout: float = 10.0) -> slurm.Answer:
        conf = os.environ.get("SLURM_CONF")
        asked.append(conf)
        state = "RUNNING" if conf == "/site/slurm.conf" else "COMPLETED"
        return slurm.Answer(0, f"5|{state}|n1|N/A|N/A|None\n6|COMPLETED|n1|N/A|N/A|None\n", "")

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setenv("SLURM_CONF", "/shell/slurm.conf")
    profile = tmp_path / "site.yaml"
    profile.write_text("scheduler: slurm\nslurm_conf: /site/slurm.conf\n")
    for name, cluster, job in (("there", str(profile), "5"), ("here", str(tmp_path / "gone.yaml"), "6")):
        stages = tuple(replace(s, spec=replace(s.spec, run=name)) for s in record.stages)
        write_run(tmp_path, replace(record, run=name, cluster=cluster, stages=stages))
        told = {"stage": "a", "fingerprint": record.stages[0].spec.fingerprint, "job": job, "time": 1.0}
        (tmp_path / "runs" / name / JOBS).write_text(json.dumps(told) + "\n")
    assert clean(tmp_path, "here", "--forget")["removed"]
    with pytest.raises(UserError, match="there"):
        cli.run_command(cli.build_parser().parse_args(["clean", "there", "--forget", "--root", str(tmp_path)]))
    assert set(asked) == {"/shell/slurm.conf", "/site/slurm.conf"}


def test_where_a_record_cannot_be_read_no_artifact_is_touched(tmp_path: Path, record: RunRecord) -> None:
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text('{"of another": "version"}')
    kept, whole = partial(tmp_path, FORGOTTEN), finished(tmp_path, counting_stage(fingerprint="8" * 20))
    body = clean(tmp_path, "--artifacts")
    assert body["removed"] == [] and body["unreadable_runs"] == ["broken"] and kept.exists() and whole.exists()


def test_jobs_submitted_by_hand_have_their_artifacts_named_by_their_stage_json(
    tmp_path: Path, record: RunRecord
) -> None:
    spec = counting_stage(counting_step(), fingerprint=FORGOTTEN, run="by-hand")
    store.write_atomic(store.stage_dir(tmp_path, "by-hand", "count") / "stage.json", stage_text(spec))
    kept = partial(tmp_path, FORGOTTEN)
    assert clean(tmp_path)["removed"] == [] and kept.exists()


def test_whole_artifacts_go_only_where_asked_and_nameless(tmp_path: Path, record: RunRecord) -> None:
    made = finished(tmp_path, record.stage("a").spec)
    nameless = finished(tmp_path, counting_stage(fingerprint=FORGOTTEN), 1000)
    assert clean(tmp_path)["removed"] == []
    assert clean(tmp_path, "--artifacts")["bytes"] > 1000
    assert made.exists() and not nameless.exists()


def test_an_artifact_that_a_run_only_reads_is_named_too(tmp_path: Path) -> None:
    both = counting_run(("a", (), {}), ("b", ("a",), {}))
    write_run(tmp_path, replace(both, stages=both.stages[1:]))  # `a` was made by a run that is gone
    kept = finished(tmp_path, both.stage("a").spec)
    assert clean(tmp_path, "--artifacts")["removed"] == [] and kept.exists()


def test_what_a_run_began_to_need_meanwhile_stays(tmp_path: Path, record: RunRecord) -> None:
    kept = partial(tmp_path, FORGOTTEN)
    waste = find_waste(read_store(tmp_path), set())
    assert [w.path for w in waste] == [kept]
    spec = replace(record.stages[0].spec, fingerprint=FORGOTTEN)
    write_run(tmp_path, replace(record, run="new", stages=(replace(record.stages[0], spec=spec),)))
    gone, held = remove(waste, tmp_path, lambda: find_waste(read_store(tmp_path), set()), store.is_alive)
    assert gone == held == [] and kept.exists()


def test_a_clean_that_was_cut_off_is_finished_by_the_next(tmp_path: Path, record: RunRecord) -> None:
    half = tmp_path / "artifacts" / "train" / ".removed.abc" / f"{FORGOTTEN}.partial"
    half.mkdir(parents=True)
    (half / "weights").write_bytes(bytes(30))
    assert clean(tmp_path)["bytes"] == 30 and not half.parent.exists()


@pytest.mark.parametrize(
    "half",
    [
        "artifacts/train/.abc.claim.x1_y2z3a/owner.json",
        "runs/.run.json.abcdefgh",
        "runs/run/.driver.claim.abcdefgh/owner.json",
        "runs/run/stages/a/.stage.json.abcdefgh",
        "runs/run/stages/a/local.1/.heartbeat.count.0.json.4711",
    ],
)
def test_what_was_half_written_goes_after_an_hour(tmp_path: Path, record: RunRecord, half: str) -> None:
    path = tmp_path / half
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    told = tmp_path / "runs/run/stages/a/.told.job-12345678"
    told.parent.mkdir(parents=True, exist_ok=True)
    told.touch()
    assert clean(tmp_path)["removed"] == [] and path.exists()
    top = path.parent if path.name == "owner.json" else path
    for one in (top, told):
        os.utime(one, (0, 0))
    assert [r["path"] for r in clean(tmp_path)["removed"]] == [str(top)] and not path.exists() and told.exists()


# ---------------------------------------------------------------------------------------------------------------- runs


def attempts_with_logs(root: Path, spec: StageSpec, count: int) -> list[Path]:
    made = []
    for number in range(count):
        owner = replace(store.this_process(), start="1")
        folder = leave_attempt(root, spec, f"local.{number + 1}", 10 * number, 10 * number + 5, owner=owner)
        for name in ("count.0.log", "supervisor.log"):
            (folder / name).write_text("words\n")
        made.append(folder)
    return made


def test_logs_of_old_attempts_at_finished_stages_go_and_their_events_stay(tmp_path: Path, record: RunRecord) -> None:
    finished(tmp_path, record.stage("a").spec)
    old, *rest = attempts_with_logs(tmp_path, record.stage("a").spec, KEPT_LOGS + 1)
    unfinished = attempts_with_logs(tmp_path, record.stage("b").spec, KEPT_LOGS + 1)
    assert freed(tmp_path, "run") == {str((old / n).relative_to(tmp_path)) for n in ("count.0.log", "supervisor.log")}
    assert (old / "events.jsonl").exists()
    assert all((folder / "count.0.log").exists() for folder in (*rest, *unfinished))


def test_naming_a_run_leaves_the_rest_of_the_store_alone(tmp_path: Path, record: RunRecord) -> None:
    kept = partial(tmp_path, FORGOTTEN)
    assert clean(tmp_path, "run")["removed"] == [] and kept.exists()


def test_code_that_no_stage_uses_goes_and_that_of_stages_stays(tmp_path: Path, record: RunRecord) -> None:
    first, second = record.stages
    used = replace(record, stages=(replace(first, spec=replace(first.spec, snapshot="runs/run/snapshot/now")), second))
    write_run(tmp_path, used)
    ran = replace(second.spec, snapshot="runs/run/snapshot/ran")  # with the code of an earlier submission
    store.write_atomic(store.stage_dir(tmp_path, "run", "b") / "stage.json", stage_text(ran))
    for name in (
        "run/snapshot/now",
        "run/snapshot/ran",
        "run/snapshot/old",
        "removed/snapshot/old",
        "run/snapshot/new",
    ):
        (tmp_path / "runs" / name / "launcher").mkdir(parents=True)
        (tmp_path / "runs" / name / "launcher" / "cli.py").write_text("code")
        if not name.endswith("new"):  # of a run that is being submitted at this moment
            os.utime(tmp_path / "runs" / name, (1000, 1000))
    with claimed(tmp_path, "run"):
        assert freed(tmp_path, "--dry-run") == {"runs/removed/snapshot/old"}
    assert freed(tmp_path) == {"runs/removed/snapshot/old", "runs/run/snapshot/old"}
    assert {p.name for p in (tmp_path / "runs" / "run" / "snapshot").iterdir()} == {"now", "ran", "new"}


def test_forgetting_a_run_makes_its_artifacts_nameless(tmp_path: Path, record: RunRecord) -> None:
    whole = finished(tmp_path, record.stage("a").spec)
    assert clean(tmp_path, "run", "--forget", "--dry-run")["bytes"] > 0 and (tmp_path / "runs" / "run").exists()
    assert freed(tmp_path, "run", "--forget") == {"runs/run"}
    assert list((tmp_path / "runs").iterdir()) == [] and whole.exists()
    assert freed(tmp_path, "--artifacts") == {str(whole.relative_to(tmp_path))}


def test_a_run_in_use_is_not_forgotten(
    tmp_path: Path, record: RunRecord, living: Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = record.stage("a").spec
    finished(tmp_path, spec)
    attempts_with_logs(tmp_path, spec, KEPT_LOGS + 1)
    leave_attempt(tmp_path, record.stage("b").spec, "local.1", 10, None, owner=living)
    assert cli.main(["clean", "run", "--forget", "--root", str(tmp_path)]) == 2
    assert "still in use" in capsys.readouterr().err and (tmp_path / "runs" / "run").exists()
    assert clean(tmp_path, "run")["removed"] == []  # its logs neither


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--forget",), "name it"), (("run", "--artifacts"), "leave RUN out"), (("nope",), "no such run")],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert cli.main(["clean", *words, "--root", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("active", "busy"), [({"5"}, {"run"}), (set(), set()), (None, {"run"}), ({"6"}, set())], ids=str
)
def test_a_run_with_jobs_is_in_use_while_they_wait_or_nobody_can_say(
    tmp_path: Path, record: RunRecord, active: set[str] | None, busy: set[str]
) -> None:
    (tmp_path / "runs" / "run" / JOBS).write_text("")
    assert uses(tmp_path, {"run": {"5"}, "other": set()}, active).busy == busy


def test_a_run_that_is_driven_is_in_use(tmp_path: Path, record: RunRecord) -> None:
    with claimed(tmp_path, "run"):
        assert uses(tmp_path, {"run": set()}, set()).busy == {"run"}
    assert uses(tmp_path, {"run": set()}, set()) == Uses(set(), set())


def test_links_are_not_followed(tmp_path: Path, record: RunRecord) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(bytes(1000))
    folder = partial(tmp_path, FORGOTTEN)
    (folder / "link").symlink_to(outside)
    assert size_of(folder) < 1000
    freed(tmp_path)
    assert not folder.exists() and (outside / "precious").exists()
