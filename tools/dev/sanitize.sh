#!/usr/bin/env bash
# The CPU kernels under sanitizers, in a copy of the tree; nothing here is changed.
#
#   bash tools/dev/sanitize.sh [PYTEST ARGUMENTS]           AddressSanitizer and UndefinedBehaviorSanitizer
#   bash tools/dev/sanitize.sh thread [PYTEST ARGUMENTS]    ThreadSanitizer, the kernels' threads and Python's
#
# Compiles bnet_mm/ops/csrc with g++ into a temporary folder together with sanitize_faults.cpp, which has a fault of each
# kind: first each fault must be reported, or the run would prove nothing; then the kernels' tests run, those of
# tests/ops/test_cpp.py with every instruction set of this processor. Any report ends the process that caused it, and so
# fails its test. (AddressSanitizer does not see the masked loads of AVX-512; tests/ops/test_memory.py does, by a signal
# that it is told to leave alone.) PYTHON names the interpreter (python3); KEEP=FOLDER keeps the copy there, and uses
# what is compiled there as long as csrc/ has not changed: compiling takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "error: $*" >&2; exit 1; }
PYTHON=$(command -v "${PYTHON:-python3}") || fail "no Python: name one with PYTHON=..."
"$PYTHON" -c 'import torch, pytest, mmengine' 2>/dev/null || fail "$PYTHON lacks torch, pytest or mmengine"
command -v g++ >/dev/null || fail 'no g++'

KIND=address
[ "${1:-}" = thread ] && { KIND=thread; shift; }
TESTS=(tests/ops/test_cpp.py tests/ops/test_errors.py tests/ops/test_memory.py tests/ops/test_gradients.py
       tests/ops/test_strides.py)
if [ $KIND = thread ]; then
  FLAGS=(-fsanitize=thread -DBNET_MM_OWN_THREADS)
  FAULTS=(data_race)
  RUNTIME=$(g++ -print-file-name=libtsan.so)
  TESTS=(tests/hardening/test_soak.py tests/ops/test_cpp.py -k 'threads_share or bit_equal')
  # A fixed address layout, as this runtime needs it. halt_on_error: a report ends the process.
  RUN=(setarch "$(uname -m)" -R env TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1)
else
  FLAGS=(-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined)
  FAULTS=(overrun use_after_free signed_overflow)
  RUNTIME=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)
  RUN=(env ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1)
fi
[ $# = 0 ] || TESTS=("$@")

FOLDER=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$FOLDER"' EXIT
mkdir -p "$FOLDER"
cp -r bnet_mm tests tools configs pyproject.toml "$FOLDER"
cd "$FOLDER"
rm -f bnet_mm/_cpu*
SOURCES=(bnet_mm/ops/csrc/* tools/dev/sanitize_faults.cpp)
BUILT=_cpu_${KIND}_$(cat "${SOURCES[@]}" | sha256sum | cut -c1-12).so
mapfile -t INCLUDES < <("$PYTHON" -c '
from torch.utils.cpp_extension import include_paths
print("\n".join("-isystem" + path for path in include_paths()))')
read -r LIBRARIES ABI < <("$PYTHON" -c '
import pathlib, torch
print(pathlib.Path(torch.__file__).parent / "lib", int(torch._C._GLIBCXX_USE_CXX11_ABI))')

if [ ! -f "$BUILT" ]; then
  echo "compiling with ${FLAGS[*]}"
  g++ -std=c++20 -O1 -g -fno-omit-frame-pointer -fPIC -shared -fopenmp -Wl,-Bsymbolic "${FLAGS[@]}" \
    -D_GLIBCXX_USE_CXX11_ABI="$ABI" "${INCLUDES[@]}" bnet_mm/ops/csrc/*.cpp tools/dev/sanitize_faults.cpp \
    -o part.so -L"$LIBRARIES" -lc10 -ltorch_cpu -ltorch
  mv part.so "$BUILT"
fi
cp "$BUILT" bnet_mm/_cpu.so
# `python -m` puts this folder first on the path, before any installed bnet_mm.
unset PYTHONSAFEPATH PYTHONPATH
sanitized() { "${RUN[@]}" LD_PRELOAD="$RUNTIME" OMP_NUM_THREADS=2 PYTHONPATH="$FOLDER:tests" "$PYTHON" "$@"; }
sanitized -c 'import bnet_mm; from bnet_mm.ops import cpp; print(bnet_mm.__file__, cpp.load())'

for FAULT in "${FAULTS[@]}"; do
  CALL="import torch, bnet_mm; from bnet_mm.ops import cpp; cpp.load(); torch.ops.bnet_mm.fault_$FAULT(torch.ones(1000))"
  sanitized -c "$CALL" >fault.log 2>&1 && fail "the deliberate fault $FAULT was not reported"
  grep -m1 -E 'ERROR: AddressSanitizer|runtime error|WARNING: ThreadSanitizer' fault.log || { cat fault.log; fail "$FAULT"; }
done
sanitized -m pytest -p no:cacheprovider -x "${TESTS[@]}"
