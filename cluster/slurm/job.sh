# shellcheck shell=bash
# What the batch scripts share; sourced by them, with the overrides as arguments. It gives them `config`, the arguments
# that every program takes, `on_all_nodes`, `on_one_node` and `check_nodes`, and decides what becomes of the job when a step ends:
#
#   a step said 0             the next one runs; after the last the job is COMPLETED
#   2, a user's mistake       the job is FAILED with 2: it would fail in the same way again
#   75 or 0 of every node     stopped on request: the job is requeued, and goes on from what the ranks saved
#   anything else             a fault: requeued too, but at most DSKD_RETRIES times without progress in between
#
# A job that SLURM itself is ending, after scancel or the death of a node, is left to it.
set -euo pipefail

# shellcheck source=cluster/slurm/settings.sh
source cluster/slurm/settings.sh
# shellcheck disable=SC2034 # read by the batch scripts
config=(--config "$DSKD_CONFIG" "${DSKD_OVERRIDES[@]}" "$@")
notes=$PWD/$DSKD_LOGS/job-$SLURM_JOB_ID # of this job, seen by all nodes
[[ $DSKD_LOGS != /* ]] || notes=$DSKD_LOGS/job-$SLURM_JOB_ID
attempt=${SLURM_RESTART_COUNT:-0}
mkdir -p "$notes"

# Every node's launcher knows the same nodes in the same order, the first of which is the master; jobs that share a node
# have ports of their own.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
printf '%s\n' "${nodes[@]}" >"$notes/nodes"
export DSKD_VENV DSKD_RANKS_PER_NODE DSKD_NOTES=$notes
# MLflow shows these with the run (dskd/distributed/world.py).
export DSKD_JOB_SCHEDULER=slurm DSKD_JOB_ID=$SLURM_JOB_ID DSKD_JOB_NAME=$SLURM_JOB_NAME
export DSKD_JOB_RESTART=${SLURM_RESTART_COUNT:-}
# The programs of launcher/ and the package that they import are of one version, this clone's, whatever an image has.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# This script sees all GPUs of its node (--exclusive), its steps only those that were asked for: node.sh counts them.
unset SLURM_GPUS_ON_NODE
export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

say() { echo "== job $SLURM_JOB_ID, attempt $attempt: $*" >&2; }

told=
running=
steps=0
# USR1 comes some time before the end of the job (--signal above), TERM when it is preempted. srun forwards to its tasks.
stop() {
    told=1
    say "is to stop; the ranks save and end"
    [[ -z $running ]] || kill -USR1 "$running" 2>/dev/null || true
    # Where the time is over, ranks and this script have only `KillWait` to live: asked for now, it is not too late.
    if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID" || true) == *Reason=TimeLimit* ]]; then
        say "its time is over; it goes on when it is scheduled again"
        scontrol requeue "$SLURM_JOB_ID" || say "cannot be requeued; submit it again, and it goes on"
    fi
}
trap stop USR1 TERM

# on_all_nodes PROGRAM [ARGUMENT …]: a program of launcher/ on all ranks, through one launcher of DeepSpeed's a node
on_all_nodes() { run_step "${#nodes[@]}" ranks "$@"; }

# on_one_node COMMAND …: in one process
on_one_node() { run_step 1 alone "$@"; }

# check_nodes: names what is wrong with a node, before the ranks start on them
check_nodes() {
    [[ -z $DSKD_PREFLIGHT ]] || on_all_nodes --module dskd preflight "${config[@]}"
}

# ask COMMAND …: what it prints on one node, however it ends
ask() {
    (start_on 1 "$notes/asked" alone "$@" 2>/dev/null) || true
}

# start_on NODES EXITS ranks|alone COMMAND …: srun, in the place of the subshell that it is called in, for its signals
start_on() {
    mkdir -p "$2"
    # All CPUs of the node for its one task. When one node fails the others are ended, for they would only wait for it.
    exec srun --export=ALL --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        "${DSKD_SRUN_OPTIONS[@]}" "${DSKD_CONTAINER[@]}" bash "$PWD/cluster/slurm/node.sh" "${@:2}"
}

run_step() {
    local exits code=0 said=() one worst=0
    [[ -z $told ]] || requeue "stopped between two steps"
    steps=$((steps + 1))
    exits=$notes/exits-$attempt-$steps # a file a node: of several codes srun tells only the highest
    start_on "$1" "$exits" "${@:2}" &
    running=$!
    while kill -0 "$running" 2>/dev/null; do # a signal ends the wait, not the step
        if [[ -z $told ]]; then
            wait "$running" || true
        else
            # Again: an srun that has not started its tasks yet has nobody to pass a signal on to.
            kill -USR1 "$running" 2>/dev/null || true
            (trap '' USR1 TERM && exec sleep 2)
        fi
    done
    wait "$running" || code=$?
    running=
    mapfile -t said < <(cat "$exits"/* 2>/dev/null) # nothing, where no node could be reached
    # A node that is ended because another one failed says 75 too: a fault of any node is a fault.
    for one in "${said[@]}"; do
        case $one in
            0) ;;
            2) fail ;;
            75) ((worst != 0)) || worst=75 ;;
            *) worst=$one ;;
        esac
    done
    ((${#said[@]} != 0 || code != 2)) || fail # whatever keeps nodes from writing: a mistake stays one
    # A node that died without a word, for its memory was full, has saved nothing; the others were ended because of it.
    ((worst != 75 || ${#said[@]} < $1)) || requeue "stopped, and saved"
    [[ -z $told ]] || requeue "stopped"
    ((code == 0 && worst == 0)) || fault "step $steps ended with $code (nodes said: ${said[*]})"
}

fail() {
    say "a mistake in the input, see above; the job fails and is not tried again"
    exit 2
}

# What a job has got done so far, where that can be said; train.sbatch does.
progress() { :; }

requeue() {
    leave_to_slurm "$1"
    say "$1; it goes on when it is scheduled again"
    scontrol requeue "$SLURM_JOB_ID" || say "cannot be requeued; submit it again, and it goes on"
    exit 75
}

# Ends this script where SLURM is ending the job. One that was cancelled could still be requeued meanwhile, and would be
# back; one that lost a node, or whose grace time is over, is requeued by SLURM, and one whose time is over by `stop`.
leave_to_slurm() {
    local shown
    shown=$(scontrol --oneliner show job "$SLURM_JOB_ID") || return 0 # no answer: try to requeue it all the same
    if [[ $shown != *JobState=RUNNING* ]]; then
        say "$1; SLURM ends this job or requeues it itself"
        exit 75
    fi
}

# The nodes of the job that SLURM has lost, or does not hear of.
lost_nodes() {
    scontrol --oneliner show node "$SLURM_JOB_NODELIST" |
        sed -nE 's/^NodeName=([^ ]+).* State=(DOWN|[^ ]*NOT_RESPONDING).*/\1/p' | paste -sd ' '
}

fault() {
    local faults done_so_far lost
    # srun comes back from a dead node when SLURM has given it up, and then is ending the job already.
    leave_to_slurm "$1"
    lost=$(lost_nodes || true)
    [[ -z $lost ]] || requeue "$1; not counted as a fault, for SLURM has lost $lost"
    done_so_far=$(progress)
    if [[ -n $done_so_far && $done_so_far != "$(cat "$notes/progress" 2>/dev/null)" ]]; then
        : >"$notes/faults" # whatever went wrong before, it went on since
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
