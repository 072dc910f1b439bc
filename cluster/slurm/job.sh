# shellcheck shell=bash
# What the batch scripts share. They source it, with the overrides as arguments. It defines `config` (the arguments that
# every program takes), `on_all_nodes`, `on_one_node` and `check_nodes`, and decides what happens when a step ends:
#
#   exit code 0               the next step runs; after the last the job is COMPLETED
#   2, a user's mistake       the job is FAILED with 2: it would fail in the same way again
#   75 or 0 on every node     stopped on request: the job is requeued, and resumes from what the ranks saved
#   anything else             a fault: requeued too, but at most DSKD_RETRIES times without progress in between
#
# If SLURM itself is ending the job, after scancel or the death of a node, this script does nothing about it.
set -euo pipefail

# shellcheck source=cluster/slurm/settings.sh
source cluster/slurm/settings.sh
# shellcheck disable=SC2034 # read by the batch scripts
config=(--config "$DSKD_CONFIG" "${DSKD_OVERRIDES[@]}" "$@")
notes=$PWD/$DSKD_LOGS/job-$SLURM_JOB_ID # files of this job, on the disk that all nodes share
[[ $DSKD_LOGS != /* ]] || notes=$DSKD_LOGS/job-$SLURM_JOB_ID
attempt=${SLURM_RESTART_COUNT:-0}
mkdir -p "$notes"

# Every node's launcher gets the same nodes in the same order; the first is the master. The port depends on the job's id,
# so that jobs that share a node use different ones.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
printf '%s\n' "${nodes[@]}" >"$notes/nodes"
export DSKD_VENV DSKD_RANKS_PER_NODE DSKD_NOTES=$notes
# MLflow shows these with the run (dskd/distributed/world.py).
export DSKD_JOB_SCHEDULER=slurm DSKD_JOB_ID=$SLURM_JOB_ID DSKD_JOB_NAME=$SLURM_JOB_NAME
export DSKD_JOB_RESTART=${SLURM_RESTART_COUNT:-} # empty: not in an array, or not requeued
export DSKD_JOB_ARRAY=${SLURM_ARRAY_JOB_ID:-} DSKD_JOB_TASK=${SLURM_ARRAY_TASK_ID:-}
# The programs of launcher/ import this clone's package, even if an image has another version.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# This script sees all GPUs of its node (--exclusive), but its steps see only those that were requested, which node.sh
# counts.
unset SLURM_GPUS_ON_NODE
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

say() { echo "== job $SLURM_JOB_ID, attempt $attempt: $*" >&2; }

stop_requested=
running=
steps=0
# SLURM sends USR1 some time before the end of the job (--signal), and TERM to preempt it. srun passes signals to its tasks.
stop() {
    stop_requested=1
    say "stop requested; the ranks save and end"
    [[ -z $running ]] || kill -USR1 "$running" 2>/dev/null || true
    # If the time is over, SLURM kills the ranks and this script after `KillWait`, so requeue the job now.
    if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID" || true) == *Reason=TimeLimit* ]]; then
        say "its time is over; it resumes when it is scheduled again"
        scontrol requeue "$SLURM_JOB_ID" || say "cannot be requeued; submit it again to resume it"
    fi
}
trap stop USR1 TERM

# on_all_nodes PROGRAM [ARGUMENT …]: runs a program of launcher/ on all ranks, with one DeepSpeed launcher per node
on_all_nodes() { run_step "${#nodes[@]}" ranks "$@"; }

# on_one_node COMMAND …: runs a command in one process
on_one_node() { run_step 1 alone "$@"; }

# check_nodes: reports problems of the nodes, before the ranks start on them
check_nodes() {
    [[ -z $DSKD_PREFLIGHT ]] || on_all_nodes --module dskd preflight "${config[@]}"
}

# ask COMMAND …: prints the output of a command on one node, however it ends
ask() {
    (start_on 1 "$notes/asked" alone "$@" 2>/dev/null) || true
}

# start_on NODES EXITS ranks|alone COMMAND …: replaces the subshell that calls it by srun, so that srun gets its signals
start_on() {
    mkdir -p "$2"
    # The node's one task gets all of its CPUs. If one node fails, srun ends the others, which would only wait for it.
    exec srun --export=ALL --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        "${DSKD_SRUN_OPTIONS[@]}" "${DSKD_CONTAINER[@]}" bash "$PWD/cluster/slurm/node.sh" "${@:2}"
}

run_step() {
    local exits code=0 codes=() one worst=0
    [[ -z $stop_requested ]] || requeue "stopped between two steps"
    steps=$((steps + 1))
    exits=$notes/exits-$attempt-$steps # one file per node, because srun returns only the highest code
    start_on "$1" "$exits" "${@:2}" &
    running=$!
    while kill -0 "$running" 2>/dev/null; do # a signal ends the wait, not the step
        if [[ -z $stop_requested ]]; then
            wait "$running" || true
        else
            # Repeated, because an srun that has not started its tasks yet cannot pass the signal on.
            kill -USR1 "$running" 2>/dev/null || true
            (trap '' USR1 TERM && exec sleep 2)
        fi
    done
    wait "$running" || code=$?
    running=
    mapfile -t codes < <(cat "$exits"/* 2>/dev/null) # empty if no node could be reached
    # A node that srun ends because another one failed reports 75 too, so a fault of any node counts.
    for one in "${codes[@]}"; do
        case $one in
            0) ;;
            2) fail ;;
            75) ((worst != 0)) || worst=75 ;;
            *) worst=$one ;;
        esac
    done
    ((${#codes[@]} != 0 || code != 2)) || fail # a user's mistake, even if the nodes could not write their codes
    # A node without a code was killed, for lack of memory perhaps, and saved nothing; srun ended the others because of it.
    ((worst != 75 || ${#codes[@]} < $1)) || requeue "stopped, and saved"
    [[ -z $stop_requested ]] || requeue "stopped"
    ((code == 0 && worst == 0)) || fault "step $steps ended with $code (codes of the nodes: ${codes[*]})"
}

fail() {
    say "there is a mistake in the input, see above; the job fails, and is not retried"
    exit 2
}

# Prints the progress of the job; train.sbatch defines it.
progress() { :; }

requeue() {
    leave_to_slurm "$1"
    say "$1; it resumes when it is scheduled again"
    scontrol requeue "$SLURM_JOB_ID" || say "cannot be requeued; submit it again to resume it"
    exit 75
}

# Ends this script if SLURM is ending the job. A cancelled job could still be requeued at that moment, and would come
# back. If the job lost a node or its grace time is over, SLURM requeues it; if its time is over, `stop` has done so.
leave_to_slurm() {
    local shown
    shown=$(scontrol --oneliner show job "$SLURM_JOB_ID") || return 0 # no answer: try to requeue it anyway
    if [[ $shown != *JobState=RUNNING* ]]; then
        say "$1; SLURM ends this job or requeues it itself"
        exit 75
    fi
}

# Prints the nodes of the job that SLURM has lost, or that do not respond.
lost_nodes() {
    scontrol --oneliner show node "$SLURM_JOB_NODELIST" |
        sed -nE 's/^NodeName=([^ ]+).* State=(DOWN|[^ ]*NOT_RESPONDING).*/\1/p' | paste -sd ' '
}

fault() {
    local faults done_so_far lost
    # srun returns from a dead node when SLURM has given the node up, and SLURM is then ending the job already.
    leave_to_slurm "$1"
    lost=$(lost_nodes || true)
    [[ -z $lost ]] || requeue "$1; not counted as a fault, because SLURM has lost $lost"
    done_so_far=$(progress)
    if [[ -n $done_so_far && $done_so_far != "$(cat "$notes/progress" 2>/dev/null)" ]]; then
        : >"$notes/faults" # there was progress since the earlier faults
        echo "$done_so_far" >"$notes/progress"
    fi
    echo "$(date --iso-8601=seconds) attempt $attempt: $1" >>"$notes/faults"
    faults=$(wc -l <"$notes/faults")
    if ((faults > DSKD_RETRIES)); then
        say "$1; fault $faults without progress, no more retries (DSKD_RETRIES=$DSKD_RETRIES); all: $notes/faults"
        exit 1
    fi
    requeue "$1; fault $faults of at most $DSKD_RETRIES"
}
