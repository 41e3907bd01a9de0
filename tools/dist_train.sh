#!/usr/bin/env bash
# Train on the GPUs of one machine, or without GPUs in that many CPU processes:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# On several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]" >&2; exit 2; }
CONFIG=$1 GPUS=$2
shift 2
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive integer, got $GPUS" >&2; exit 2; }
. "$(dirname "$0")/find_python.sh"
RENDEZVOUS=(--standalone)
[ "${NNODES:-1}" = 1 ] || RENDEZVOUS=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
    --master_port "${MASTER_PORT:-29500}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc_per_node "$GPUS" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "$@"
