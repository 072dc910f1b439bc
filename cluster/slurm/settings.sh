# shellcheck shell=bash
# Reads the settings of cluster.env and reports every mistake in them. submit.sh and every job source this file.
DSKD_ENV=${DSKD_ENV:-cluster/slurm/cluster.env}
if [[ ! -r $DSKD_ENV ]]; then
    echo "error: DSKD_ENV: there is no settings file $DSKD_ENV; copy cluster/slurm/cluster.env and name the copy" >&2
    exit 2
fi
# Variables of the submitting shell are not settings of the job.
for name in $(compgen -v DSKD_); do [[ $name == DSKD_ENV ]] || unset "$name"; done
# First in a shell of its own: text that is not bash would end this shell with a message that does not say what to do.
# Unset variables are allowed, because scripts of modules and conda use them.
# shellcheck disable=SC2016 # expanded there
if ! output=$(bash -eo pipefail -c 'source "$1"' bash "$DSKD_ENV" 2>&1 >/dev/null); then
    echo "error: DSKD_ENV: bash cannot read the settings file, or a command in it fails:" >&2
    echo "  ${output:-$DSKD_ENV: a command in it fails without a message}" >&2
    [[ ! $output =~ DSKD_[A-Z_]*:\ command\ not\ found ]] || echo "  write NAME=value with no blanks around the =" >&2
    exit 2
fi
set +u
# shellcheck source=cluster/slurm/cluster.env
source "$DSKD_ENV"
set -u

problems=()

require_number() { # NAME SMALLEST [empty]
    local value=${!1-}
    [[ -z $value && ${3:-} == empty ]] && return
    [[ $value =~ ^(0|[1-9][0-9]*)$ ]] && ((value >= $2)) ||
        problems+=("$1: expected a whole number from $2${3:+ or nothing}, found '$value'")
}

require_list() { # NAME EXAMPLE
    [[ $(declare -p "$1" 2>/dev/null) == "declare -a"* ]] ||
        problems+=("$1: expected a list in brackets, such as $2, found '${!1-}'")
}

known=" DSKD_ENV DSKD_ACCOUNT DSKD_PARTITION DSKD_TIME DSKD_NODES DSKD_GPUS_PER_NODE DSKD_SBATCH_OPTIONS
 DSKD_RANKS_PER_NODE DSKD_VENV DSKD_CONTAINER DSKD_SRUN_OPTIONS DSKD_PREFLIGHT DSKD_CONFIG DSKD_OVERRIDES DSKD_RUNS
 DSKD_RETRIES DSKD_LOGS "
for name in $(compgen -v DSKD_); do
    [[ $known == *[[:space:]]"$name"[[:space:]]* ]] ||
        problems+=("$name: there is no such setting; cluster/slurm/cluster.env has all of them")
done
for name in $known; do
    [[ $name == DSKD_ENV ]] || declare -p "$name" >/dev/null 2>&1 || problems+=("$name: is missing; to leave it empty, write \`$name=\`")
done
require_number DSKD_NODES 1
require_number DSKD_GPUS_PER_NODE 0
require_number DSKD_RANKS_PER_NODE 1 empty
require_number DSKD_RETRIES 0
require_list DSKD_SBATCH_OPTIONS "(--qos=long)"
require_list DSKD_CONTAINER "(apptainer exec --nv /shared/dskd.sif)"
require_list DSKD_SRUN_OPTIONS "(--container-image=/shared/dskd.sqsh)"
require_list DSKD_OVERRIDES "(train.steps=1000 run=kd)"
require_list DSKD_RUNS "(kd dskd)"
[[ ${DSKD_PREFLIGHT-} =~ ^1?$ ]] || problems+=("DSKD_PREFLIGHT: expected 1 or nothing, found '$DSKD_PREFLIGHT'")
[[ -n ${DSKD_LOGS-} ]] || problems+=("DSKD_LOGS: is empty; name a folder on a disk that all nodes share")
[[ -r ${DSKD_CONFIG-} ]] || problems+=("DSKD_CONFIG: there is no file '${DSKD_CONFIG-}'")
[[ -z ${DSKD_VENV-} || -x $DSKD_VENV/bin/python ]] ||
    problems+=("DSKD_VENV: '$DSKD_VENV' is not a virtual environment (it has no bin/python); \`make env\` creates .venv")
if ((${#problems[@]})); then
    echo "error: ${#problems[@]} problem(s) in $DSKD_ENV:" >&2
    printf '  %s\n' "${problems[@]}" >&2
    exit 2
fi
