#!/usr/bin/env bash
# Submits training, or the whole pipeline as jobs that wait for each other, with the settings of cluster.env.
#
#   cluster/slurm/submit.sh train [section.key=value …]
#   cluster/slurm/submit.sh pipeline [section.key=value …]
#
# Prints one line per job: its id and name. DSKD_ENV=FILE names another settings file than cluster/slurm/cluster.env.
set -euo pipefail

usage="usage: $0 train|pipeline [section.key=value …]"
what=${1:-}
case $what in
    train | pipeline) ;;
    -h | --help)
        cat <<END
$usage

Submits training, or the whole pipeline as jobs that wait for each other, with the settings of cluster/slurm/cluster.env,
or of the file that DSKD_ENV names. Prints one line per job: its id and name. See cluster/slurm/README.md.

examples:
  cluster/slurm/submit.sh pipeline
  cluster/slurm/submit.sh train run=kd train.steps=2000
  DSKD_ENV=mine.env cluster/slurm/submit.sh pipeline
END
        exit 0
        ;;
    *)
        echo "error: '$what' is neither train nor pipeline; $usage" >&2
        exit 2
        ;;
esac

DSKD_ENV=$(realpath -m "${DSKD_ENV:-$(dirname "$0")/cluster.env}")
export DSKD_ENV # jobs read it too; an option of sbatch would cut it at a comma
cd "$(dirname "$0")/../.."
# shellcheck source=cluster/slurm/settings.sh
source cluster/slurm/settings.sh

overrides=("${@:2}")
config=(--config "$DSKD_CONFIG" "${DSKD_OVERRIDES[@]}" "${overrides[@]}")
runs=("")

# Report mistakes in the config now, not when the job has come through the queue: check the config itself, which the stages
# read, with all of its runs, and with each run that is named. (A container's config may have paths of another machine.)
if [[ -n $DSKD_VENV ]]; then
    names=$("$DSKD_VENV/bin/python" -m dskd config "${config[@]}" --run-names) || exit 2
    [[ $what != pipeline ]] || mapfile -t runs <<<"$names"
fi
if [[ $what == pipeline ]] && ((${#DSKD_RUNS[@]})); then
    runs=("${DSKD_RUNS[@]}")
    for run in ${DSKD_VENV:+"${runs[@]}"}; do
        "$DSKD_VENV/bin/python" -m dskd config "${config[@]}" "run=$run" >/dev/null || exit 2
    done
elif [[ $what == pipeline && -z $DSKD_VENV ]]; then
    echo "without DSKD_VENV, submit.sh does not read the config: only its \`run\` is trained; name others in DSKD_RUNS" >&2
fi
mkdir -p "$DSKD_LOGS"

common=(--parsable --chdir="$PWD" --output="$DSKD_LOGS/%x-%j.log" --export=ALL)
[[ -z $DSKD_ACCOUNT ]] || common+=(--account="$DSKD_ACCOUNT")
[[ -z $DSKD_PARTITION ]] || common+=(--partition="$DSKD_PARTITION")
[[ -z $DSKD_TIME ]] || common+=(--time="$DSKD_TIME")
((DSKD_GPUS_PER_NODE == 0)) || common+=(--gpus-per-node="$DSKD_GPUS_PER_NODE")

# submit NAME NODES AFTER SCRIPT [ARGUMENT …]: one job, which starts when the jobs AFTER (a:b:c, or nothing) are done
submit() {
    local name=$1 nodes=$2 after=$3 job
    local options=(--job-name="dskd-$name" --nodes="$nodes")
    # Otherwise a job whose predecessor failed would wait forever.
    [[ -z $after ]] || options+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
    job=$(sbatch "${common[@]}" "${options[@]}" "${DSKD_SBATCH_OPTIONS[@]}" "${@:4}")
    submitted=${job%%;*}
    echo "$submitted $name"
}

case $what in
    train)
        submit train "$DSKD_NODES" "" cluster/slurm/train.sbatch "${overrides[@]}"
        ;;
    pipeline)
        submit prepare 1 "" cluster/slurm/pipeline.sbatch prepare "${overrides[@]}"
        submit senses "$DSKD_NODES" "$submitted" cluster/slurm/pipeline.sbatch senses "${overrides[@]}"
        submit annotate "$DSKD_NODES" "$submitted" cluster/slurm/pipeline.sbatch annotate "${overrides[@]}"
        annotate=$submitted
        trained=()
        for run in "${runs[@]}"; do
            submit "train${run:+-$run}" "$DSKD_NODES" "$annotate" cluster/slurm/train.sbatch \
                "${overrides[@]}" ${run:+"run=$run"} # last, because overrides may choose another run
            trained+=("$submitted")
        done
        after=$(IFS=:; echo "${trained[*]}")
        submit evaluate "$DSKD_NODES" "$after" cluster/slurm/pipeline.sbatch evaluate "${overrides[@]}"
        ;;
esac
