"""A lint over every script of every shipped recipe on every Slurm profile."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sbatch import header

from launcher.cluster import load_profile, profile_files
from launcher.inputs import resolve_inputs
from launcher.plan import build_plan
from launcher.recipe.load import list_recipes, load_recipes
from launcher.render import files
from launcher.run_record import RunRecord

DATA = Path(__file__).resolve().parent / "data" / "options"
ROOT = Path("/scratch/prism")
SLURM = [path.stem for path in profile_files() if load_profile(str(path)).scheduler == "slurm"]
RECIPES = [recipe["name"] for recipe in list_recipes()]
#: What a careless program would write for something it does not know.
NOTHING = re.compile(r"(?<![\w./-])(None|null|nan|undefined|<class|Path\(|PosixPath)(?![\w-])")
#: Where `null` is a value of the program's own: an override of a key of its configuration.
OVERRIDE = re.compile(r"# {5}[a-z][\w.]*=null(?: \\)?")
SECRETS = {"HF_TOKEN": "hf_plantedPlantedPlanted", "WANDB_API_KEY": "0123plantedplanted4567"}


def known(*programs: str) -> set[str]:
    """Long options of programs."""
    lines = (line for program in programs for line in (DATA / f"{program}.txt").read_text().splitlines())
    return {line for line in lines if not line.startswith("#")}


def rendered(recipe: str, cluster: str) -> dict[str, str]:
    """Every script of a recipe's first run."""
    profile = load_profile(cluster)
    (first, *_) = load_recipes(recipe, (), None)
    stages = build_plan(first, resolve_inputs(first), profile.limits, profile.runtime)
    record = RunRecord(first.name, first.path, (), cluster, first.resolved, stages, 0.0, {})
    return {name: text for name, text in files(record, profile, ROOT).items() if name.endswith((".sbatch", ".sh"))}


def shown_steps(script: str) -> Iterator[list[str]]:
    """The words of every srun command that a script shows, references kept as they are."""
    for block in re.findall(r"(?:^#(?: .*)?\n)+", script, re.MULTILINE):
        command = "\n".join(line[2:] for line in block.splitlines() if line.startswith("# "))
        for found in re.findall(r"^srun \\\n(?:    .*\n?)+", command, re.MULTILINE):
            yield shlex.split(found.replace("\\\n", " "))


def problems(name: str, script: str) -> Iterator[str]:
    """What is wrong with a script, as (script: what)."""
    for number, line in enumerate(script.splitlines(), 1):
        if NOTHING.search(line) and not OVERRIDE.fullmatch(line):
            yield f"{name}:{number}: a value that is none: {line.strip()}"
        if re.search(r"=\s*\\?$", line) and "printf" not in line and not re.search(r"env|^# {5}[A-Z_]+= ?\\?$", line):
            yield f"{name}:{number}: an empty value: {line.strip()}"
    for option in header(script) if name.endswith(".sbatch") else ():
        if option not in known("sbatch"):
            yield f"{name}: sbatch has no option --{option}"
    steps = list(shown_steps(script))
    if name.endswith(".sbatch") and not steps:
        yield f"{name}: shows no step"
    for words in steps:
        program = next(i for i, word in enumerate(words) if i and not word.startswith("--"))
        for word in words[1:program]:
            option = word[2:].partition("=")[0]
            if option not in known("srun", "pyxis"):
                yield f"{name}: srun has no option --{option}"


@pytest.fixture(scope="module", params=[(r, c) for r in RECIPES for c in SLURM], ids="-".join)
def scripts(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        yield rendered(*request.param)


def test_scripts_say_nothing_odd(scripts: dict[str, str]) -> None:
    assert [p for name, text in scripts.items() for p in problems(name, text)] == []


def test_no_script_holds_a_secret_of_the_rendering_shell(scripts: dict[str, str]) -> None:
    assert [n for n, text in scripts.items() for value in SECRETS.values() if value in text] == []


def test_scripts_are_clean_shell(scripts: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; apt-get install shellcheck")
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(["shellcheck", *sorted(tmp_path.iterdir())], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("#SBATCH --nodez=2", "no option --nodez"),
        ("#SBATCH --partition=None", "a value that is none"),
        ("#SBATCH --account=", "an empty value"),
        ("# srun \\\n#     --overlapp \\\n#     env true", "no option --overlapp"),
        ("# srun \\\n#     --nodes=null \\\n#     env true", "a value that is none"),
    ],
)
def test_the_lint_sees(line: str, wrong: str) -> None:
    script = f"#!/bin/bash\n{line}\n# srun \\\n#     --overlap \\\n#     env A=1 \\\n#     true\n\ntrue\n"
    found = list(problems("x.sbatch", script))
    assert len(found) == 1 and wrong in found[0]
