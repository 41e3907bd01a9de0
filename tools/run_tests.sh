#!/usr/bin/env bash
# Install if needed, then run the test suite: bash tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh
# Threads that wait by spinning make training ten times slower as soon as anything else uses a core.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONWARNINGS='ignore:pkg_resources is deprecated as an API'
# A process of one thread on each core, but no more than four: each takes 2 GB of memory. -n 0 is one process in all.
CORES=$(OMP_NUM_THREADS= nproc)  # which would obey that variable
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n $((CORES < 4 ? CORES : 4)) --dist worksteal "$@"
