#!/usr/bin/env bash
# The first process of every pod of cluster/kubernetes/: starts the ranks of its node, and turns TERM into save-and-stop.
#
#   entrypoint.sh PROGRAM [ARGUMENT …]     a program of launcher/, or a verb of dskd; and its arguments
#
# train.py, build_senses.py, annotate.py, evaluate.py and preflight run on DSKD_NODES pods with DSKD_RANKS_PER_NODE ranks
# each; pipeline.py, which starts ranks by itself, on one pod; export, compare and status in one process on pod 0, while
# the other pods end at once. Training always resumes from the run's last checkpoint, and first checks the nodes
# (dskd preflight) if DSKD_PREFLIGHT is 1.
#
# The exit code is the program's: 0 done, 2 a mistake of the user (do not retry), 75 stopped on request (start again to
# resume), anything else a fault or a lost peer (retry). status returns 0 even if the run is not finished.
# shellcheck disable=SC2329  # the trap calls these functions
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

require_number() {
    [[ ${!1:-} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "$1: expected a whole number, found '${!1:-}'; the manifest sets it"
}

started='' stopping=''

# Sends USR1 to the session of the started program and all of its children; fails if there is no such session.
ask_to_stop() {
    kill -USR1 -- "-$started" 2>/dev/null
}

stop() {
    [[ -z $stopping ]] || return
    stopping=1
    [[ -n $started ]] || exit 75   # nothing has been started, so there is nothing to save
    printf 'entrypoint: stop requested; the ranks save a checkpoint after the current step\n' >&2
    ask_to_stop
    # Repeated, because ranks that are still importing do not handle signals yet.
    while sleep 5 && ask_to_stop; do :; done &
}

# Waits until every node's name has an address; after the time-out, reports the names that have none.
wait_for_peers() {
    local deadline=$((SECONDS + DSKD_PEERS_TIMEOUT_S)) missing
    while true; do
        missing=()
        for ((node = 0; node < DSKD_NODES; node++)); do
            getent ahosts "$(name_of "$node")" >/dev/null || missing+=("$(name_of "$node")")
        done
        ((${#missing[@]})) || return 0
        if ((SECONDS >= deadline)); then
            printf 'error: no address for %s after %s s: their pods are not running; kubectl describe shows why\n' \
                "${missing[*]}" "$DSKD_PEERS_TIMEOUT_S" >&2
            exit 1
        fi
        sleep 1
    done
}

name_of() {
    printf '%s-%s.%s' "$DSKD_JOB" "$1" "$DSKD_SERVICE"
}

# Returns 0 if the run of these arguments is finished, 3 if not, and another code if that is unknown.
run_status() {
    local argument arguments=()
    for argument; do
        [[ $argument == --resume ]] || arguments+=("$argument")
    done
    dskd status "${arguments[@]}"
}

# start COMMAND …: starts a command in a session of its own, whose leader is $started
start() {
    setsid "$@" &
    started=$!
}

# start_ranks PROGRAM [ARGUMENT …]: starts the ranks of this node with DeepSpeed's launcher
start_ranks() {
    start deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$JOB_COMPLETION_INDEX" \
        --master_addr "$(name_of 0)" --master_port "$DSKD_MASTER_PORT" "$@"
}

# Waits for the end of the started program, kills what is left of its session, and returns its exit code.
finish() {
    local code
    while true; do
        wait "$started"
        code=$?
        # A signal ends `wait` early, with a code above 128.
        ((code > 128)) || break
        kill -0 "$started" 2>/dev/null || break
    done
    wait "$started"   # again, because a signal may have arrived just when it ended
    code=$?
    kill -KILL -- "-$started" 2>/dev/null   # ranks whose launcher was killed would continue by themselves
    started=''
    return "$code"
}

end() {
    [[ -z $stopping ]] || printf 'entrypoint: stopped with exit code %s\n' "$1" >&2
    exit "$1"
}

program=${1:-}
[[ -n $program ]] || refuse "no program: the first argument is one of launcher/, such as train.py, or a verb of dskd"
shift
case $program in
    train.py | build_senses.py | annotate.py | evaluate.py | pipeline.py | preflight | export | compare | status) ;;
    *)
        refuse "'$program': expected train.py, build_senses.py, annotate.py, evaluate.py, pipeline.py, preflight, export, \
compare or status"
        ;;
esac
for argument; do
    [[ $argument != --overwrite ]] ||
        refuse "--overwrite: every restart of the pod would start from scratch; remove the run's checkpoints instead"
done
for name in JOB_COMPLETION_INDEX DSKD_NODES DSKD_RANKS_PER_NODE DSKD_MASTER_PORT DSKD_PEERS_TIMEOUT_S; do
    require_number "$name"
done
for name in DSKD_JOB DSKD_SERVICE HOME; do
    [[ -n ${!name:-} ]] || refuse "$name: is not set; the manifest sets it"
done
((JOB_COMPLETION_INDEX < DSKD_NODES)) ||
    refuse "DSKD_NODES: is $DSKD_NODES, but this is node $JOB_COMPLETION_INDEX (from 0); set it to the job's completions"

# MLflow shows these with the run (dskd/distributed/world.py).
export DSKD_JOB_SCHEDULER=kubernetes DSKD_JOB_ID=$DSKD_JOB DSKD_JOB_POD=$HOSTNAME

mkdir -p "$HOME" || refuse "HOME: cannot create $HOME; set it to a folder on a writable volume"
trap stop TERM INT   # the first process of a container ignores signals without a handler
trap '' USR1         # inherited by the launchers, which would die of it; ranks set their own handlers

if [[ $program == pipeline.py ]]; then
    ((DSKD_NODES == 1)) || refuse "DSKD_NODES: is $DSKD_NODES, but pipeline.py runs on one node"
    start python "$root/launcher/$program" "$@"
    finish
    end $?
fi

if [[ $program == export || $program == compare || $program == status ]]; then
    ((JOB_COMPLETION_INDEX == 0)) || exit 0
    start dskd "$program" "$@"
    finish
    code=$?
    [[ $program != status || $code != 3 ]] || code=0   # not a fault: a retry would give the same answer
    end "$code"
fi

if [[ $program == train.py ]]; then
    # If the run is finished, a replaced pod would wait in vain for the pods that are gone.
    run_status "$@"
    code=$?
    ((code == 3)) || exit "$code"
fi
wait_for_peers
hostfile=$(mktemp) || exit 1
for ((node = 0; node < DSKD_NODES; node++)); do
    printf '%s slots=%s\n' "$(name_of "$node")" "$DSKD_RANKS_PER_NODE"
done >"$hostfile"

if [[ $program == preflight || ($program == train.py && ${DSKD_PREFLIGHT:-} == 1) ]]; then
    start_ranks --module dskd preflight "$@"
    finish
    code=$?
    [[ $code != 0 || -z $stopping ]] || code=75   # the request came too late for the ranks
    [[ $program == train.py && $code == 0 ]] || end "$code"
fi

[[ $program != train.py ]] || set -- "$@" --resume
start_ranks "$root/launcher/$program" "$@"
finish
code=$?
# `deepspeed` returns 0 even if its inner launcher was killed, so ask the checkpoints whether the run is finished.
if ((code == 0)) && [[ $program == train.py ]]; then
    run_status "$@"
    code=$?
    if ((code == 3)); then
        printf 'error: the launcher returned 0, but the run is not finished: the launcher was killed\n' >&2
        code=1
    fi
fi
end "$code"
