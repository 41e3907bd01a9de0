#!/usr/bin/env bash
# Evaluate on a Slurm cluster: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT GPUS [options of tools/test.py]
# GPUS_PER_NODE (8 at most by default), CPUS_PER_TASK (5) and SRUN_ARGS change what is asked for.
set -euo pipefail
[ $# -ge 5 ] || {
    echo "usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2
    exit 2
}
PARTITION=$1 JOB_NAME=$2 CONFIG=$3 CHECKPOINT=$4 GPUS=$5
shift 5
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive integer, got $GPUS" >&2; exit 2; }
command -v srun >/dev/null || { echo "error: srun not found; is this a Slurm login node?" >&2; exit 2; }
. "$(dirname "$0")/find_python.sh"
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS is a list
exec srun -p "$PARTITION" --job-name="$JOB_NAME" --gres=gpu:"$GPUS_PER_NODE" --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "$PYTHON" -u "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher slurm "$@"
