#!/usr/bin/env bash
# Install if needed, then run the test suite: bash tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/dev/install.sh
# Threads that wait by spinning make training ten times slower as soon as anything else uses a core.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONWARNINGS='ignore:pkg_resources is deprecated as an API'
exec .venv/bin/python -m pytest "$@"
