#!/usr/bin/env bash
# srun starts this on each node: node.sh EXITS ranks PROGRAM …, or node.sh EXITS alone COMMAND …
# It writes the exit code to EXITS/NODE and returns it, except that it returns 0 for 75: srun ends the other nodes when one
# fails, but after a request to stop they may still be saving.
set -uo pipefail

exits=$1 kind=$2
shift 2
[[ -z ${DSKD_VENV:-} ]] || PATH=$(realpath "$DSKD_VENV")/bin:$PATH
if [[ $kind == ranks ]]; then
    # One rank for each GPU that this step sees; all nodes have the same number. Each node writes a file of its own, so that
    # none has to wait for another's.
    hostfile=$DSKD_NOTES/hostfile-$SLURM_NODEID
    sed "s/$/ slots=${DSKD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}/" "$DSKD_NOTES/nodes" >"$hostfile"
    set -- deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
fi

stop_requested=
trap 'stop_requested=1' USR1 TERM

# USR1 would end DeepSpeed's launchers while the ranks still save. They inherit from here that it is ignored; the ranks, and
# a pipeline, set their own handlers. TERM is ignored only until a node's launcher runs: its handler ends the ranks, and
# kills them 30 s later. So this script sends only USR1 to the launcher; see README.md, How it works.
(
    trap '' USR1 TERM
    exec setsid "$@"
) &
group=$!
while kill -0 "$group" 2>/dev/null; do # a signal ends the wait, not the launcher
    if [[ -z $stop_requested ]]; then
        wait "$group"
    else
        # Some clusters signal every process of a step, others only this one, so send it to all from here. Repeat it,
        # because a rank that is just starting does not handle it yet.
        kill -USR1 -- "-$group" 2>/dev/null
        (trap '' USR1 TERM && exec sleep 1) # srun signals it too, and bash would print that it ended
    fi
done
wait "$group"
code=$?
# If the launcher was killed, its ranks may live on: after a request to stop they are saving; otherwise kill them.
[[ -n $stop_requested ]] || kill -KILL -- "-$group" 2>/dev/null
while kill -0 -- "-$group" 2>/dev/null; do (trap '' USR1 TERM && exec sleep 0.2); done

[[ -z $stop_requested || $code -eq 0 || $code -eq 2 ]] || code=75
echo "$code" >"$exits/$SLURM_NODEID" || exit "$code"
((code != 75)) || exit 0
exit "$code"
