#!/usr/bin/env bash
# Everything that a GPU has to show, in one command: bash tools/dev/gpu_acceptance.sh [FOLDER (gpu_acceptance)]
#
# Tests on the GPU (tests/gpu), compute-sanitizer where it is installed, host time, launches, speed and memory beside
# BN; FOLDER gets verdict.json (each goal, its figure, met or not), the rows as CSV and the logs. The exit code is 0 if
# no test failed and no goal was missed. Needs torch with its Triton, mmengine, pytest and torchvision, no network and
# no mmdet; PYTHON names the interpreter. Without a GPU it is a rehearsal: the compiled kernels are executed on the CPU
# (tests/ptx), nothing is timed, and every line says so.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "error: $*" >&2; exit 2; }
[ $# -le 1 ] || fail "one folder at most, got $*"
OUT=${1:-gpu_acceptance}
PYTHON=$(command -v "${PYTHON:-python3}") || fail "no Python: name one with PYTHON=..."
"$PYTHON" -c 'import importlib.util; assert all(map(importlib.util.find_spec, ("torch", "triton", "pytest", "mmengine",
"torchvision")))' 2>/dev/null || fail "$PYTHON lacks torch, triton, pytest, mmengine or torchvision"
mkdir -p "$OUT"
rm -f "$OUT"/{tests.xml,memcheck.log,racecheck.log,verdict.json}
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1

if [ "$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())')" = True ]; then
  NOTE='' TESTS=(-m 'gpu or not gpu')
else
  NOTE='rehearsal without a GPU: ' TESTS=(-m 'not gpu')
fi
say() { echo "[$SECONDS s] $NOTE$*"; }

WORKERS=$(($(nproc) < 8 ? $(nproc) : 8))
"$PYTHON" -c 'import xdist' 2>/dev/null && TESTS+=(-n "$WORKERS")
say "tests/gpu"
"$PYTHON" -m pytest "${TESTS[@]}" -p no:cacheprovider --junit-xml="$OUT/tests.xml" tests/gpu -q 2>&1 | tee "$OUT/tests.log" |
  tail -n 25 || true

if [ -z "$NOTE" ] && command -v compute-sanitizer >/dev/null; then
  for TOOL in memcheck racecheck; do
    say "compute-sanitizer $TOOL"
    compute-sanitizer --tool $TOOL --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider -n 0 \
      tests/gpu/test_values.py -k 'test_layer or test_tail' >"$OUT/$TOOL.log" 2>&1 || true
  done
else
  say 'compute-sanitizer: not run (it needs a GPU and its command)'
fi

say 'host time, launches, speed and memory'
"$PYTHON" tools/dev/gpu_figures.py "$OUT"
