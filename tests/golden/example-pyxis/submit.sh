#!/bin/bash
# Made by prism-launch render: run golden for cluster example-pyxis.
# Submits every stage after those it reads; when one fails for good, those behind it are cancelled.
run=/scratch/prism/runs/golden
mode=600
umask 077

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

submit prepare 9341e5352afc6c4e6acd
submit small-052cb9-to-megatron b24409002a9ca4fe2a09
submit midtrain c65f18f3f333a36d4040 prepare small-052cb9-to-megatron
submit midtrain-to-hf db098e9ad648ae45fbc9 midtrain
submit evaluate b5a40414ec4bdd4db4a1 midtrain-to-hf prepare
submit_array sweep sweep.held-out.0 fd5d849b5b42ff9207f3 sweep.held-out.1 357589bf26e08d25dcba sweep.easy.0 3f4430f5205f0a1c191b sweep.easy.1 d787e37ccb300bd59a08 -- midtrain-to-hf prepare
