"""The command line as a user meets it: messages, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sparse_checkpoints import sparse_checkpoint

from launcher import cli, slurm
from launcher.cluster import load_profile
from launcher.commands import runs, shared
from launcher.errors import UserError
from launcher.run_record import RunRecord, read_run, write_run
from launcher.submit import JOBS

CHECKOUT = Path(__file__).resolve().parent.parent


def prism(*args: str, cwd: Path = CHECKOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `prism-launch` in its own process."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "launcher.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def recipe_file(folder: Path, change: str = "", old: str = "") -> Path:
    """The demo's recipe with one piece of text replaced."""
    text = (CHECKOUT / "recipes" / "demo.yaml").read_text()
    assert old in text
    path = folder / "mine.yaml"
    path.write_text(text.replace(old, change, 1) if old else text)
    return path


def test_check_passes_the_shipped_demo() -> None:
    done = prism("check", "recipes/demo.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no problem found" in done.stdout


@pytest.mark.parametrize("model", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_plan_lists_the_stages_with_conversions_inserted(model: str, tmp_path: Path) -> None:
    done = prism("plan", "demo", "--set", f"model={model}", "--root", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)
    stages = [s["stage"] for s in plan["stages"]]
    wanted = ["prepare", "base", "midtrain", "rl-from-base", "rl-from-midtrain", "evaluate", "analyze"]
    assert set(wanted) <= set(stages)
    assert sorted(s["stage"] for s in plan["stages"] if s["inserted"]) == ["base-to-hf", "midtrain-to-hf"]
    assert not any(s["done"] for s in plan["stages"])


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        (
            "train_iters: 976",
            "train_iter: 976",
            ["{line}: stages.midtrain.train_iter: unknown key, did you mean train_iters?"],
        ),
        ("lr: 5.0e-3", "lr: fast", ['stages.base.lr: expected a number, got "fast"']),
        ("checkpoint: base", "checkpoint: bsae", ["no stage bsae, did you mean base?"]),
        ("seq_length: 128", "seq_length: 100000", ["beyond the 256 positions"]),
        (
            "backend: trl",
            "backend: open-instruct",
            ["backend open-instruct is not built yet; there is trl, nemo-aligner"],
        ),
        (
            "backend: trl",
            "backend: nemo-aligner\n    max_prompt_length: 64",
            ["backend nemo-aligner runs reinforce, not grpo", "needs GPUs"],
        ),
        ("backend: trl", "backend: nemo-rl", ["max_prompt_length: is required"]),
        ("backend: trl", "backend: tlr", ["expected one of 'trl'", "did you mean trl?"]),
        ("kind: evaluate", "kind: evalute", ["evalute"]),
        ("model: llama-tiny", "model: lama-tiny", ["lama-tiny", "llama-tiny"]),
        ("seed: 0", "seed: [", ["mine.yaml:"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_message_and_exit_2(
    tmp_path: Path, old: str, new: str, messages: list[str]
) -> None:
    path = recipe_file(tmp_path, new, old)
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if new.splitlines()[0] in text)
    done = prism("check", str(path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "mine.yaml:" in done.stderr and "Traceback" not in done.stderr
    for message in messages:
        assert message.format(line=f"mine.yaml:{line}") in done.stderr


def test_all_problems_of_a_recipe_at_once(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    path.write_text(path.read_text().replace("lr: 5.0e-3", "lr: fast").replace("max_steps: 50", "max_step: 50"))
    done = prism("check", str(path))
    assert done.returncode == 2
    assert done.stderr.count("lr: expected a number") == 2 and "did you mean max_steps?" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("check", "no-such.yaml"), 2, "no-such.yaml"),
        (("check", "recipes/demo.yaml", "--set", "midtrain.lrr=1"), 2, "lrr"),
        (("check", "recipes/demo.yaml", "--cluster", "nowhere"), 2, "nowhere"),
        (("render", "recipes/demo.yaml", "-o", "out"), 2, "has no Slurm"),
        (("run", "recipes/demo.yaml", "--cluster", "example-pyxis"), 1, "squeue"),
        (("report", "--root", "empty"), 2, "no run here yet"),
        (("status", "nothing", "--root", "empty"), 2, "no such run"),
        (("convert", "nothing", "out", "--to", "hf"), 2, "nothing"),
        (("diff", "nothing", "neither"), 2, "nothing"),
        (("frobnicate",), 2, "invalid choice"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, args: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "recipes").symlink_to(CHECKOUT / "recipes")
    done = prism(*args, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_unwritable_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = prism("run", "demo", "--root", str(tmp_path / "file" / "root"))
    assert done.returncode == 2 and "cannot be written" in done.stderr and "--root" in done.stderr


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    code = "import os, sys; os.rmdir(os.getcwd()); from launcher import cli; sys.exit(cli.main(['status']))"
    env = {key: value for key, value in os.environ.items() if key != "PRISM_ROOT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**env, "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1,
        "prism-launch: the current folder is gone: No such file or directory\n",
    )


def test_output_into_a_closed_pipe_is_no_failure() -> None:
    command = f"{sys.executable} -m launcher.cli schema | head -1"
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["recipes", "cluster list", "doctor", "backends"])
def test_listings_speak_json(command: str, tmp_path: Path) -> None:
    arguments = ("--root", str(tmp_path)) if command == "doctor" else ()
    done = prism(*command.split(), "--json", *arguments)
    assert json.loads(done.stdout), done.stderr


def test_interrupting_a_run_of_a_matrix_begins_no_further_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import local

    recipe, begun = tmp_path / "m.yaml", []
    recipe.write_text("base: demo\nmatrix: {seed: [0, 1, 2]}\n")

    def interrupted(root: Path, record: RunRecord, slots: int, **options: bool) -> int:
        begun.append(record.run)
        return 130 if len(begun) == 2 else 1

    monkeypatch.setattr(local, "run_local", interrupted)
    assert cli.main(["run", str(recipe), "--root", str(tmp_path / "root")]) == 130
    assert begun == ["demo-seed=0", "demo-seed=1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": '{"model_type": "granite"}', "model.safetensors": ""},
            "is a checkpoint of model type granite",
        ),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "no .safetensors file"),
        ({"config.json": "no json", "model.safetensors": ""}, "start/config.json: not JSON"),
        ({"README": "hello"}, "neither config.json (hf)"),
        ({}, "neither config.json (hf)"),
    ],
)
def test_a_start_that_is_no_checkpoint_of_the_model_is_refused_with_its_place(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    (tmp_path / "start").mkdir()
    for name, content in files.items():
        (tmp_path / "start" / name).write_text(content)
    path = recipe_file(tmp_path, "checkpoint: ./start\n    data: {prepare/general", "data: {prepare/general")
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if "./start" in text)
    done = prism("check", str(path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"mine.yaml:{line}: stages.base.checkpoint: " in done.stderr and message in done.stderr


def test_a_profile_of_the_users_own_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("scheduler: local\nslots: 1\n")
    root = str(tmp_path / "root")
    done = prism("plan", "demo", "--cluster", "./mine.yaml", "--root", root, "--json", cwd=tmp_path)
    (plan,) = json.loads(done.stdout)
    assert plan["cluster"] == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETED", None])
def test_a_run_whose_jobs_go_on_in_another_slurm_is_not_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    """None: that controller is silent."""

    def call(*argv: str, timeout: float = 10.0) -> slurm.Answer:
        assert os.environ["SLURM_CONF"] == "/site/slurm.conf"
        if state is None:
            return slurm.Answer(1, "", "Unable to contact slurm controller")
        return slurm.Answer(0, f"5|{state}|n1|N/A|N/A|None\n", "")

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setenv("SLURM_CONF", "/shell/slurm.conf")
    profile = tmp_path / "site.yaml"
    profile.write_text("scheduler: slurm\nslurm_conf: /site/slurm.conf\n")
    args = cli.build_parser().parse_args(["run", "demo"])
    record = shared.records_of(args, load_profile("local"))[0]
    write_run(tmp_path, replace(record, cluster=str(profile)))
    told = {"stage": "base", "fingerprint": record.stage("base").spec.fingerprint, "job": "5", "time": 1.0}
    (tmp_path / "runs" / "demo" / JOBS).write_text(json.dumps(told) + "\n")
    runs._refuse_elsewhere(tmp_path, [record], load_profile(str(profile)))  # the same Slurm: joined
    if state in ("RUNNING", "PENDING"):
        with pytest.raises(UserError, match="run demo: its jobs 5 go on on cluster .*site.yaml"):
            cli.run_command(cli.build_parser().parse_args(["run", "demo", "--root", str(tmp_path)]))
        assert read_run(tmp_path, "demo").cluster == str(profile)
    else:
        runs._refuse_elsewhere(tmp_path, [record], load_profile("local"))
    assert os.environ["SLURM_CONF"] == "/shell/slurm.conf"


def test_a_damaged_record_is_no_obstacle(tmp_path: Path) -> None:
    record = shared.records_of(cli.build_parser().parse_args(["run", "demo"]), load_profile("local"))[0]
    write_run(tmp_path, record)
    (tmp_path / "runs" / "demo" / "run.json").write_text("{")
    runs._refuse_elsewhere(tmp_path, [record], load_profile("local"))


def test_status_of_a_submitted_run_does_without_slurm(tmp_path: Path) -> None:
    """As on a machine that sees the store alone."""
    root = tmp_path / "root"
    assert prism("render", "demo", "--cluster", "example-pyxis", "-o", str(tmp_path / "out")).returncode == 0
    (root / "runs" / "demo").mkdir(parents=True)
    record = (tmp_path / "out" / "run.json").read_text()
    (root / "runs" / "demo" / "run.json").write_text(record)
    fingerprint = json.loads(record)["stages"][0]["spec"]["fingerprint"]
    job = {"stage": "prepare", "fingerprint": fingerprint, "job": "7", "time": 0.0}
    (root / "runs" / "demo" / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    done = prism("status", "--root", str(root), "--json", PATH=str(tmp_path), SLURM_CONF=str(tmp_path / "none"))
    assert done.returncode == 0 and "from the run's files alone" in done.stderr
    assert json.loads(done.stdout)["state"] == "waiting"


# --------------------------------------------------------------------------------------------- the full-scale recipes

#: Each full-scale recipe: its model's type, and what it reads that is not here.
PRISM = {
    "llama-3.1-8b": 20,
    "nemotron-h-8b": 20,
    "granite-3.3-8b-long-context": 17,
}


def data(folder: Path, recipe: str) -> list[str]:
    """The `--set` of a folder with everything that a full-scale recipe reads, empty data sets among it."""
    (plan,) = json.loads(prism("plan", f"prism/{recipe}", "--cluster", "example-pyxis", "--json").stdout)
    absent = {path for stage in plan["stages"] for path in stage["absent"]}
    model = next(path for path in absent if "/models/" in path)
    for path in absent - {model}:
        (folder / "data" / Path(path).name).mkdir(parents=True)
    named = CHECKOUT / "recipes" / "models" / f"{recipe.removesuffix('-long-context')}.yaml"
    sparse_checkpoint(folder / "model", yaml.safe_load(named.read_text())["config"])
    (folder / "model" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"</s>": 0}}}))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    paths = {"prepare.folder": "data", "prepare.tokenizer.path": "model", "midtrain.checkpoint": "model"}
    sets = [f"{key}={folder / name}" for key, name in paths.items()]
    if any(stage["kind"] == "merge" for stage in plan["stages"]):
        sets.append(f"merge.checkpoints=[{folder / 'model'}, midtrain]")
    return [word for change in sets for word in ("--set", change)]


@pytest.mark.parametrize("recipe", PRISM)
def test_check_of_a_full_scale_recipe_names_what_is_not_here_and_nothing_else(recipe: str) -> None:
    done = prism("check", f"prism/{recipe}", "--cluster", "example-pyxis")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[-1] == f"prism-launch: {PRISM[recipe]} problems"
    assert all(": No such file or directory" in line or ": no such checkpoint" in line for line in lines[:-1])
    assert all(".yaml:" in line and ": stages." in line for line in lines[:-1])


@pytest.mark.parametrize("cluster", ["example-pyxis", "example-apptainer"])
@pytest.mark.parametrize("recipe", PRISM)
def test_with_its_data_it_has_no_problem(recipe: str, cluster: str, tmp_path: Path) -> None:
    sets = data(tmp_path, recipe)
    done = prism("check", f"prism/{recipe}", "--cluster", cluster, *sets)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (plan,) = json.loads(prism("plan", f"prism/{recipe}", "--cluster", cluster, "--json", *sets).stdout)
    assert not any(stage["absent"] for stage in plan["stages"])


def test_plan_and_render_do_without_the_data_and_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = prism("plan", "prism/llama-3.1-8b", "--cluster", "example-pyxis")
    assert done.returncode == 0 and "not built" in done.stdout and "input absent" in done.stdout
    assert "26.2 B" in done.stdout and "the reward server" in done.stdout
    (plan,) = json.loads(prism("plan", "prism/llama-3.1-8b", "--cluster", "example-pyxis", "--json").stdout)
    marked = {stage["stage"]: stage["not_built"] for stage in plan["stages"]}
    assert "reward server" in marked["rl"] and marked["midtrain"] is None
    assert len(next(s for s in plan["stages"] if s["stage"] == "prepare")["absent"]) == 19
    done = prism("render", "prism/llama-3.1-8b", "--cluster", "example-pyxis", "-o", str(out))
    assert done.returncode == 0, done.stderr
    assert "not there when this was planned" in (out / "prepare.sbatch").read_text().splitlines()[3]
    done = subprocess.run([str(out / "submit.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "stage prepare: not there when this was planned" in done.stderr


def test_run_wants_the_data_first() -> None:
    done = prism("run", "prism/llama-3.1-8b", "--cluster", "example-pyxis", "--detach")
    assert done.returncode == 2 and "no such checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_backends_are_listed_with_reasons() -> None:
    done = prism("backends")
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["nemo-aligner", "reinforce"])
    assert "llama, mistral" in row and "rendered" in row
    rows = json.loads(prism("backends", "--json").stdout)
    hybrid = [r for r in rows if (r["backend"], r["family"]) == ("nemo-aligner", "nemotron_h")]
    assert hybrid and all(r["state"] == "no" for r in hybrid) and any("Mamba" in r["reason"] for r in hybrid)
    assert all("nemotron-h-8b" in r["models"] for r in hybrid)


def test_run_says_at_once_what_is_absent_and_what_is_not_built(tmp_path: Path) -> None:
    done = prism("run", "prism/llama-3.1-8b", "--cluster", "example-pyxis", "--root", str(tmp_path / "root"))
    assert done.returncode == 2 and not (tmp_path / "root").exists()
    assert "no such checkpoint" in done.stderr and "stages.rl: not built yet: the reward server" in done.stderr


def test_an_empty_cluster_is_refused() -> None:
    done = prism("plan", "demo", "--cluster", "")
    assert done.returncode == 2 and "--cluster: is empty" in done.stderr


def test_a_dry_run_prints_what_render_writes_of_a_recipe_whose_data_lie_elsewhere(tmp_path: Path) -> None:
    words = ("prism/llama-3.1-8b", "--cluster", "example-pyxis", "--root", str(tmp_path / "root"))
    shown, rendered = prism("run", *words, "--dry-run"), prism("render", *words, "-o", str(tmp_path / "out"))
    assert (shown.returncode, rendered.returncode) == (0, 0), shown.stderr + rendered.stderr
    files = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.name != "run.json"}
    parts = re.split(r"^# ---- (.*)\n", shown.stdout, flags=re.M)
    assert {n: t.rstrip("\n") for n, t in zip(parts[1::2], parts[2::2], strict=True)} == {
        n: t.rstrip("\n") for n, t in files.items()
    }
