#!/usr/bin/env bash
# Install if needed, then run the test suite: bash tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh
export PYTHONWARNINGS='ignore:pkg_resources is deprecated as an API'
exec .venv/bin/python -m pytest "$@"
