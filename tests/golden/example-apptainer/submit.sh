#!/bin/bash
# Made by prism-launch render: run golden for cluster example-apptainer.
# Submits every stage after those it reads; when one fails for good, those behind it are cancelled.
run=/scratch/prism/runs/golden
mode=600
umask 077

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit 1
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
    id=$(sbatch --parsable ${after:+--dependency="$after"} --kill-on-invalid-dep=yes "$here/$script.sbatch") ||
        stop "$script" "sbatch refused it, as it says above"
    id=${id%%;*}
    [[ $id =~ ^[0-9]+$ ]] || stop "$script" "sbatch answered '$id', which is no job id"
}

ready() {  # STAGE
    put "$1.stage.json" "$run/stages/$1/stage.json" || stop "$1" "cannot write under $run"
}

known() {  # STAGE, its fingerprint, its job and the first of its chain: `prism-launch status` and `run` know of it then
    [ -n "${ids[$1]}" ] || submitted+=("$1")
    ids[$1]=$3
    printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s, "user": "%s"%s}\n' \
        "$1" "$2" "$3" "$(date +%s)" "$(id -un)" "${4:+, \"chain\": \"$4\"}" >> "$run/jobs.jsonl"
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
# Variables that would change what the scripts say.
unset "${!SBATCH_@}"
if ! put run.json "$run/run.json"; then
    echo "submit.sh: cannot write under $run; nothing has been submitted" >&2
    exit 1
fi

submit prepare 1ab6ba810e07d7338a86
submit small-052cb9-to-megatron b24409002a9ca4fe2a09
submit midtrain 791cd286ddd154c39c44 prepare small-052cb9-to-megatron
submit midtrain-to-hf 738c42aa067fb025c157 midtrain
submit evaluate 02225a9c5a98393c30ed midtrain-to-hf prepare
submit_array sweep sweep.held-out.0 8972e6dca6da4141a5dd sweep.held-out.1 983fe9f233fd2a549d5e sweep.easy.0 7a89426af0e12d8f3af3 sweep.easy.1 fc0a470fb1e6844863f6 -- midtrain-to-hf prepare
