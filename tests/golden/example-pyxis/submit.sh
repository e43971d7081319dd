#!/bin/bash
# Made by prism-launch render: run golden for cluster example-pyxis.
# Submits every stage after those it reads; when one fails for good, those behind it are cancelled.
run=/scratch/prism/runs/golden

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
    printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s}
'         "$stage" "$fingerprint" "$id" "$(date +%s)" >> "$run/jobs.jsonl"
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
        printf '{"stage": "%s", "fingerprint": "%s", "job": "%s", "time": %s, "chain": "%s"}
'             "$stage" "$fingerprint" "$id" "$(date +%s)" "$chain" >> "$run/jobs.jsonl"
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

submit prepare 5d0c939567b412a932c0
submit small-052cb9-to-megatron b24409002a9ca4fe2a09
submit midtrain eb40e8a3a8b7934430ba prepare small-052cb9-to-megatron
submit midtrain-to-hf d79683160cde1d84d946 midtrain
submit evaluate 417f50eb0f00fba85f2c midtrain-to-hf prepare
