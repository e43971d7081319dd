"""A whole plan as a folder that submits itself:

    NAME.sbatch        the script of a stage
    NAME.stage.json    the contract with its job; submit.sh puts it at ROOT/runs/RUN/stages/NAME/stage.json
    run.json           the run's record, put at ROOT/runs/RUN/run.json, so that `status` and `report` know the run
    submit.sh          submits every stage after those it reads

Scripts name nothing in the folder, so it may be moved, to another machine too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher import store
from launcher.cluster import Profile, place_record
from launcher.errors import UserError
from launcher.links import job_count
from launcher.run_record import RunRecord
from launcher.sbatch import sbatch_text
from launcher.spec import encode, stage_text

_MARK = "# Made by prism-launch render"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")


def render_plan(record: RunRecord, profile: Profile, folder: Path, root: Path) -> None:
    """Write the scripts into `folder`, all or nothing; an earlier rendering there is replaced.

    Raises UserError where the folder holds anything that render did not make.
    """
    texts = files(record, profile, root)
    folder = Path(os.path.realpath(folder))
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, text in texts.items():
            store.write_atomic(fresh / name, text, mode=0o700 if name == "submit.sh" else 0o600)
        _replace(folder, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def dry_run(record: RunRecord, profile: Profile, root: Path) -> str:
    """The same files as one text, each under its name; run.json, which repeats them, is left out."""
    texts = files(record, profile, root)
    return "\n".join(f"# ---- {name}\n{text}" for name, text in texts.items() if name != "run.json")


def files(record: RunRecord, profile: Profile, root: Path) -> dict[str, str]:
    """Every file of a rendering by name. Pure. Raises UserError for what cannot be written in a script."""
    for name in (record.run, *(s.spec.stage for s in record.stages)):
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name files and jobs: letters, digits and . _ = , + - only")
    if re.search(r"[\x00-\x1f\x7f]", str(root)):
        raise UserError(f"{str(root)!r}: the store's root cannot stand in a script; choose another with --root")
    record = place_record(record, profile, root)
    texts = {}
    for stage in record.stages:
        texts[f"{stage.spec.stage}.sbatch"] = sbatch_text(stage, profile, root)
        texts[f"{stage.spec.stage}.stage.json"] = stage_text(stage.spec)
    texts["run.json"] = json.dumps(encode(record), indent=2, sort_keys=True) + "\n"
    texts["submit.sh"] = "\n".join(_submit_lines(record, root)) + "\n"
    return texts


# ------------------------------------------------------------------------------------------------------------ folder


def _refuse_foreign(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a new folder")
    script = folder / "submit.sh"
    mine = script.is_file() and _MARK in script.read_text(errors="replace")
    ours = ("run.json", "submit.sh") if mine else ()
    endings = (".sbatch", ".stage.json") if mine else ()
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours and not p.name.endswith(endings))
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise UserError(f"{folder}: holds what render did not make ({shown}); name a new folder, or move that away")


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `folder`; whatever stops it, one of the two stands there or beside it, whole."""
    if not folder.exists():
        os.rename(fresh, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old)
    try:
        os.rename(fresh, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- submit.sh


_FUNCTIONS = """
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit 1
declare -A ids
submitted=()
links=()

stop() {
    echo "submit.sh: stage $1: $2" >&2
    if [ ${#submitted[@]} -eq 0 ]; then
        echo "submit.sh: nothing has been submitted" >&2
    else
        echo "submit.sh: submitted before it, and still there:" >&2
        for name in "${submitted[@]}"; do echo "    $name: job ${ids[$name]}" >&2; done
        echo "submit.sh: to take them back: scancel ${ids[*]} ${links[*]}" >&2
    fi
    exit 1
}

put() {  # FILE TARGET: readable by you alone
    mkdir -p -- "$(dirname -- "$2")" && cp -- "$here/$1" "$2.new" && chmod 600 -- "$2.new" && mv -f -- "$2.new" "$2"
}

submit() {  # STAGE, its fingerprint and the stages that it reads
    local stage=$1 fingerprint=$2 after="" id name
    shift 2
    for name in "$@"; do after+=":${ids[$name]}"; done
    put "$stage.stage.json" "$run/stages/$stage/stage.json" || stop "$stage" "cannot write under $run"
    id=$(sbatch --parsable ${after:+--dependency=afterok"$after"} --kill-on-invalid-dep=yes "$here/$stage.sbatch") ||
        stop "$stage" "sbatch refused it, as it says above"
    id=${id%%;*}
    [[ $id =~ ^[0-9]+$ ]] || stop "$stage" "sbatch answered '$id', which is no job id"
    ids[$stage]=$id
    submitted+=("$stage")
    # So that `prism-launch status` and `run` know of the job.
    printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s}\n' \
        "$stage" "$fingerprint" "$id" "$(date +%s)" >> "$run/jobs.jsonl"
    echo "$stage: job $id"
}

submit_chain() {  # JOBS, STAGE, its fingerprint and the stages that it reads: each job goes on where the last one ended
    local jobs=$1 stage=$2 fingerprint=$3 after="" id name chain before i
    shift 3
    for name in "$@"; do after+=":${ids[$name]}"; done
    put "$stage.stage.json" "$run/stages/$stage/stage.json" || stop "$stage" "cannot write under $run"
    for ((i = 1; i <= jobs; i++)); do
        before=${after:+afterok$after}${after:+${id:+,}}${id:+afterany:$id}
        id=$(sbatch --parsable ${before:+--dependency="$before"} --kill-on-invalid-dep=yes "$here/$stage.sbatch") ||
            stop "$stage" "sbatch refused its job $i of $jobs, as it says above"
        id=${id%%;*}
        [[ $id =~ ^[0-9]+$ ]] || stop "$stage" "sbatch answered '$id', which is no job id"
        chain=${chain:-$id}
        # What reads the stage waits for the last job.
        ids[$stage]=$id
        links+=("$id")
        printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s, "chain": "%s"}\n' \
            "$stage" "$fingerprint" "$id" "$(date +%s)" "$chain" >> "$run/jobs.jsonl"
    done
    submitted+=("$stage")
    echo "$stage: jobs $chain to $id"
}

if ! command -v sbatch >/dev/null; then
    echo "submit.sh: no sbatch here; run this on the cluster's login node" >&2
    exit 1
fi
# Variables that would change what the scripts say.
unset ${!SBATCH_@}
umask 077
if ! put run.json "$run/run.json"; then
    echo "submit.sh: cannot write under $run; nothing has been submitted" >&2
    exit 1
fi
"""


def _submit_lines(record: RunRecord, root: Path) -> Iterator[str]:
    run = shlex.quote(str(store.run_dir(root, record.run)))
    yield "#!/bin/bash"
    yield f"{_MARK}: run {record.run} for cluster {record.cluster}."
    yield "# Submits every stage after those it reads; when one fails for good, those behind it are cancelled."
    yield f"run={run}"
    yield _FUNCTIONS
    for stage in record.stages:
        words = [stage.spec.stage, stage.spec.fingerprint, *stage.depends]
        jobs = job_count(stage.spec.limits)
        yield " ".join(["submit", *words] if jobs == 1 else ["submit_chain", str(jobs), *words])
