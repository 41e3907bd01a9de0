#!/usr/bin/env bash
# Evaluate on the GPUs of one machine, or without GPUs in that many CPU processes:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2; exit 2; }
CONFIG=$1 CHECKPOINT=$2 GPUS=$3
shift 3
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive integer, got $GPUS" >&2; exit 2; }
. "$(dirname "$0")/find_python.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" \
    "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
