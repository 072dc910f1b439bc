#!/usr/bin/env bash
# The first process of every pod of cluster/kubernetes/: starts the ranks of its node, and turns TERM into save-and-stop.
#
#   entrypoint.sh PROGRAM [ARGUMENT …]     a program of launcher/, or a verb of dskd; and its arguments
#
# train.py, build_senses.py, annotate.py, evaluate.py and preflight run on DSKD_NODES pods with DSKD_RANKS_PER_NODE ranks
# each; pipeline.py, which starts ranks by itself, on one pod; export, compare and status in one process on pod 0, while
# the other pods have nothing to do. Training always goes on from the run's last checkpoint, and looks at the nodes first
# (dskd preflight), where DSKD_PREFLIGHT is 1.
#
# The exit code is the program's: 0 done, 2 the user's mistake (do not retry), 75 stopped on request and to be gone on
# with, anything else a fault or a lost peer (retry). That a run is not trained to its end, status only prints: 0.
# shellcheck disable=SC2329  # what the trap calls does get called
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

# USR1 to the session of what was started, with all that it has started itself; fails when there is no such session.
ask_to_stop() {
    kill -USR1 -- "-$started" 2>/dev/null
}

stop() {
    [[ -z $stopping ]] || return
    stopping=1
    [[ -n $started ]] || exit 75   # nothing runs yet, so there is nothing to save
    printf 'entrypoint: asked to stop; ranks save a checkpoint after the step under way\n' >&2
    ask_to_stop
    # Again and again: ranks that are still importing do not listen yet.
    while sleep 5 && ask_to_stop; do :; done &
}

# Waits until every node's name has an address, and names those that have none when it takes too long.
wait_for_peers() {
    local deadline=$((SECONDS + DSKD_PEERS_TIMEOUT_S)) missing
    while true; do
        missing=()
        for ((node = 0; node < DSKD_NODES; node++)); do
            getent ahosts "$(name_of "$node")" >/dev/null || missing+=("$(name_of "$node")")
        done
        ((${#missing[@]})) || return 0
        if ((SECONDS >= deadline)); then
            printf 'error: no address for %s after %s s: their pods do not run; kubectl describe says why\n' \
                "${missing[*]}" "$DSKD_PEERS_TIMEOUT_S" >&2
            exit 1
        fi
        sleep 1
    done
}

name_of() {
    printf '%s-%s.%s' "$DSKD_JOB" "$1" "$DSKD_SERVICE"
}

# 0 when the run of these arguments is trained to its end, 3 when not; another code when that cannot be said.
run_status() {
    local argument arguments=()
    for argument; do
        [[ $argument == --resume ]] || arguments+=("$argument")
    done
    dskd status "${arguments[@]}"
}

# start COMMAND …: in a session of its own, whose leader is $started
start() {
    setsid "$@" &
    started=$!
}

# start_ranks PROGRAM [ARGUMENT …]: those of this node, with DeepSpeed's launcher
start_ranks() {
    start deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$JOB_COMPLETION_INDEX" \
        --master_addr "$(name_of 0)" --master_port "$DSKD_MASTER_PORT" "$@"
}

# Waits for the end of what was started and of all that it has started; returns its exit code.
finish() {
    local code
    while true; do
        wait "$started"
        code=$?
        # A signal ends the wait early, with a code above 128.
        ((code > 128)) || break
        kill -0 "$started" 2>/dev/null || break
    done
    wait "$started"   # again: a signal may have come in when it was just ending
    code=$?
    kill -KILL -- "-$started" 2>/dev/null   # ranks whose launcher was killed would go on by themselves
    started=''
    return "$code"
}

end() {
    [[ -z $stopping ]] || printf 'entrypoint: stopped with exit code %s\n' "$1" >&2
    exit "$1"
}

program=${1:-}
[[ -n $program ]] || refuse "no program: the first argument is one of launcher/, train.py for example, or a verb of dskd"
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
    refuse "DSKD_NODES: is $DSKD_NODES, but this is node $JOB_COMPLETION_INDEX (from 0); give it the job's completions"

# MLflow shows these with the run (dskd/distributed/world.py).
export DSKD_JOB_SCHEDULER=kubernetes DSKD_JOB_ID=$DSKD_JOB DSKD_JOB_POD=$HOSTNAME

mkdir -p "$HOME" || refuse "HOME: cannot make $HOME; set it to a folder on a writable volume"
trap stop TERM INT   # the first process of a container ignores what it has no handler for
trap '' USR1         # inherited: launchers would die of it, while ranks have a handler of their own

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
    [[ $program != status || $code != 3 ]] || code=0   # an answer, which would be the same again
    end "$code"
fi

if [[ $program == train.py ]]; then
    # A pod that failed when all was done would wait in vain for those that are done and gone.
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
    [[ $code != 0 || -z $stopping ]] || code=75   # it was too late for the ranks to hear of it
    [[ $program == train.py && $code == 0 ]] || end "$code"
fi

[[ $program != train.py ]] || set -- "$@" --resume
start_ranks "$root/launcher/$program" "$@"
finish
code=$?
# `deepspeed` returns 0 when its inner launcher was killed: a run is judged by its checkpoints.
if ((code == 0)) && [[ $program == train.py ]]; then
    run_status "$@"
    code=$?
    if ((code == 3)); then
        printf 'error: the launcher says that all went well, but the run is not at its end: it was killed\n' >&2
        code=1
    fi
fi
end "$code"
