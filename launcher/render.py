"""A whole plan as a folder that submits itself:

    NAME.sbatch        the script of a stage, or of the job array of a stage that fans out
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
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher import store
from launcher.cluster import Profile, place_record
from launcher.errors import UserError
from launcher.links import job_count
from launcher.run_record import RunRecord
from launcher.sbatch import Script, scripts_of
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
    scripts = list(scripts_of(record.stages, profile))
    for script in scripts:
        texts[f"{script.name}.sbatch"] = script.text(profile, root)
        texts |= {f"{stage.spec.stage}.stage.json": stage_text(stage.spec) for stage in script.stages}
    texts["run.json"] = json.dumps(encode(record), indent=2, sort_keys=True) + "\n"
    texts["submit.sh"] = "\n".join(_submit_lines(record, scripts, profile, root)) + "\n"
    return texts


# ------------------------------------------------------------------------------------------------------------ folder


def _refuse_foreign(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a new folder")
    script = folder / "submit.sh"
    mine = script.is_file() and _MARK in script.read_text(errors="replace", encoding="utf-8")
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


_FUNCTIONS = r"""
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit 1
user=$(id -un 2>/dev/null) || user=$(id -u)
declare -A ids
submitted=()
links=()
link=""

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

put() {  # FILE TARGET
    mkdir -p -- "$(dirname -- "$2")" && cp -- "$here/$1" "$2.new" && chmod "$mode" -- "$2.new" && mv -f -- "$2.new" "$2"
}

send() {  # SCRIPT and the stages that it reads; sets id. It waits for the job `link` too, however that ends
    local script=$1 after="" name
    shift
    for name in "$@"; do after+=":${ids[$name]}"; done
    after=${after:+afterok$after}${link:+${after:+,}afterany:$link}
    file=$here/$script.sbatch
    said=$(sbatch --parsable ${after:+--dependency="$after"} --kill-on-invalid-dep=yes "$file") && code=0 || code=$?
    id=${said%%;*}
    [[ $code = 0 && $id =~ ^[1-9][0-9]{0,9}$ ]] && return
    id=$(queued "$file")  # something stands beside the number, or in its place
    [[ -n $id || $code != 0 ]] || id=$(numbers <<< "$said" | tail -n 1)
    [[ -n $id || $code = 0 ]] || stop "$script" "sbatch refused it, as it says above"
    [[ -n $id ]] || stop "$script" "sbatch answered '$said', which is no job id, and squeue knows no new job of it"
}

queued() {  # SCRIPT: the newest job of it that Slurm has and that was not known
    local job path
    squeue --me --noheader --states=all --format='%i|%o' 2>/dev/null | while IFS='|' read -r job path; do
        job=${job%%[_+]*}
        if [[ $path = "$1" && $job =~ ^[0-9]+$ ]] && ! grep -qs "\"job\": \"${job}[_\"]" "$run/jobs.jsonl"; then
            echo "$job"
        fi
    done | sort -n | tail -n 1
}

numbers() {  # of jobs, in what sbatch says: a line of its own, `;CLUSTER` in a federation, or a sentence
    sed -nE 's/^[[:space:]]*([1-9][0-9]{0,9})(;[^;[:space:]]*)?[[:space:]]*$/\1/p
        s/.*Submitted batch job ([0-9]+).*/\1/p'
}

ready() {  # STAGE
    put "$1.stage.json" "$run/stages/$1/stage.json" || stop "$1" "cannot write under $run"
}

known() {  # STAGE, its fingerprint, its job and the first of its chain: `prism-launch status` and `run` know of it then
    [ -n "${ids[$1]}" ] || submitted+=("$1")
    ids[$1]=$3
    local path=${file//\\/\\\\}
    path=${path//\"/\\\"}
    [[ $path != *[[:cntrl:]]* ]] || path=""
    printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s, "user": "%s"%s, "script": "%s"}\n' \
        "$1" "$2" "$3" "$(date +%s)" "$user" "${4:+, \"chain\": \"$4\"}" "$path" >> "$run/jobs.jsonl"
}

submit() {  # STAGE, its fingerprint and the stages that it reads
    local stage=$1 fingerprint=$2
    shift 2
    ready "$stage"
    send "$stage" "$@"
    known "$stage" "$fingerprint" "$id"
    echo "$stage: job $id"
}

submit_chain() {  # JOBS, STAGE, its fingerprint and the stages that it reads: each job goes on where the last one ended
    local jobs=$1 stage=$2 fingerprint=$3 link="" chain=""
    shift 3
    ready "$stage"
    for ((; jobs > 0; jobs--)); do
        send "$stage" "$@"
        link=$id
        chain=${chain:-$id}
        links+=("$id")
        known "$stage" "$fingerprint" "$id" "$chain"  # what reads the stage waits for the last job
    done
    echo "$stage: jobs $chain to $id"
}

submit_array() {  # NAME, its elements as STAGE FINGERPRINT, --, the stages that they read
    local name=$1 elements=() i
    shift
    while [ "$1" != -- ]; do
        ready "$1"
        elements+=("$1" "$2")
        shift 2
    done
    shift
    mkdir -p -- "$run/stages/${name%.*}" || stop "$name" "cannot write under $run"  # Slurm makes no folder for logs
    send "$name" "$@"
    for ((i = 0; i < ${#elements[@]}; i += 2)); do
        known "${elements[i]}" "${elements[i + 1]}" "${id}_$((i / 2))"
        echo "${elements[i]}: job ${id}_$((i / 2))"
    done
}

if ! command -v sbatch >/dev/null; then
    echo "submit.sh: no sbatch here; run this on the cluster's login node" >&2
    exit 1
fi
# Variables that would change what the scripts say or squeue answers, and those of a job that this shell stands in.
for name in "${!SBATCH_@}" "${!SQUEUE_@}" "${!SLURM_@}"; do
    [[ $name =~ ^SLURM_(CONF|CLUSTERS|JWT)$ ]] || unset "$name"
done
if ! put run.json "$run/run.json"; then
    echo "submit.sh: cannot write under $run; nothing has been submitted" >&2
    exit 1
fi
"""


def _sharing_lines(profile: Profile, root: Path) -> Iterator[str]:
    """Who may read what submit.sh writes: its user alone, or the profile's group."""
    if not profile.share_group:
        yield from ("mode=600", "umask 077")
        return
    yield from ("mode=660", "umask 007")
    at, group = shlex.quote(str(root)), shlex.quote(profile.share_group)
    yield f"if [ ! -d {at} ]; then mkdir -p -- {at} && chgrp -- {group} {at} && chmod 2770 -- {at} || exit 1; fi"


def _submit_lines(record: RunRecord, scripts: Sequence[Script], profile: Profile, root: Path) -> Iterator[str]:
    run = shlex.quote(str(store.run_dir(root, record.run)))
    yield "#!/bin/bash"
    yield f"{_MARK}: run {record.run} for cluster {record.cluster}."
    yield "# Submits every stage after those it reads; when one fails for good, those behind it are cancelled."
    obstacles = [f"stage {stage.spec.stage}: {why}" for stage in record.stages for why in stage.obstacles]
    if obstacles:
        yield "# shellcheck disable=SC2016"
        yield "{"
        yield "    echo 'submit.sh: rendered to be read; this cannot be run as it is:'"
        yield from (f"    echo {shlex.quote(line)}" for line in obstacles)
        yield "} >&2"
        yield "exit 2"
        return
    yield f"run={run}"
    if profile.slurm_conf:
        yield f"export SLURM_CONF={shlex.quote(profile.slurm_conf)}"
    yield from _sharing_lines(profile, root)
    yield _FUNCTIONS
    for script in scripts:
        named = [word for stage in script.stages for word in (stage.spec.stage, stage.spec.fingerprint)]
        depends = dict.fromkeys(d for stage in script.stages for d in stage.depends)
        jobs = job_count(script.stages[0].spec.limits)
        if script.is_array:
            yield " ".join(["submit_array", script.name, *named, "--", *depends])
        elif jobs > 1:
            yield " ".join(["submit_chain", str(jobs), *named, *depends])
        else:
            yield " ".join(["submit", *named, *depends])
