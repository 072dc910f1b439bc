#!/usr/bin/env bash
# What srun starts on a node: node.sh EXITS ranks PROGRAM …, or node.sh EXITS alone COMMAND …
# Writes the exit code to EXITS/NODE. Ends with it, but for 75 with 0: srun ends the other nodes when one has failed, and
# where all were asked to stop, they may be saving still.
set -uo pipefail

exits=$1 kind=$2
shift 2
[[ -z ${DSKD_VENV:-} ]] || PATH=$(realpath "$DSKD_VENV")/bin:$PATH
if [[ $kind == ranks ]]; then
    # A rank for each GPU that this step sees. All nodes have as many; a file each, for none waits for another's.
    hostfile=$DSKD_NOTES/hostfile-$SLURM_NODEID
    sed "s/$/ slots=${DSKD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}/" "$DSKD_NOTES/nodes" >"$hostfile"
    set -- deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
fi

told=
trap 'told=1' USR1 TERM

# DeepSpeed's launchers would die of a USR1 that the ranks still work on. It is ignored here, and so by them; the ranks
# set their own handlers, and so does a pipeline. Of TERM that holds only until a node's launcher is up, which has a handler
# for it: it ends its ranks then, and kills them 30 s later. From here it gets USR1 alone; see README.md, How it works.
(
    trap '' USR1 TERM
    exec setsid "$@"
) &
group=$!
while kill -0 "$group" 2>/dev/null; do # a signal ends the wait, not the launcher
    if [[ -z $told ]]; then
        wait "$group"
    else
        # Some clusters signal every process of a step and others only this one, so all get it from here; and again, for
        # a rank that is just being started does not hear it.
        kill -USR1 -- "-$group" 2>/dev/null
        (trap '' USR1 TERM && exec sleep 1) # srun signals it too, and bash would tell of its end
    fi
done
wait "$group"
code=$?
# Ranks whose launcher was killed: when they were asked to stop they are saving; otherwise nobody waits for them.
[[ -n $told ]] || kill -KILL -- "-$group" 2>/dev/null
while kill -0 -- "-$group" 2>/dev/null; do (trap '' USR1 TERM && exec sleep 0.2); done

[[ -z $told || $code -eq 0 || $code -eq 2 ]] || code=75
echo "$code" >"$exits/$SLURM_NODEID" || exit "$code"
((code != 75)) || exit 0
exit "$code"
