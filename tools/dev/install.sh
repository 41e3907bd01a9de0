#!/usr/bin/env bash
# Make .venv with everything that constraints.txt pins. Safe to interrupt and to repeat: what is done is skipped.
# PYTHON=/path/to/python3.11 names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "error: $*" >&2; exit 1; }
say() { echo "[install] $*"; }

VENV=.venv
LOG=$VENV/install.log
DONE=$VENV/installed-$(cat constraints.txt setup.py tools/dev/install.sh bnet_mm/ops/csrc/* | sha256sum | cut -c1-16)
[ -f "$DONE" ] && exit 0

PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$PYTHON" ] || fail "no Python found: install Python 3.11, or name one with PYTHON=/path/to/python3.11"
VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$PYTHON does not run"
[ "$VERSION" = 3.11 ] || fail "constraints.txt is for Python 3.11, $PYTHON is $VERSION: name another with PYTHON=..."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON lacks the venv module (Debian: python3.11-venv)"
FREE_GB=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
[ -x "$VENV/bin/mim" ] || [ "$FREE_GB" -ge 10 ] || fail "only $FREE_GB GB free here; the installation needs up to 10 GB"

# pip with the pins; its output goes to the log, whose end is shown if it fails.
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" >>"$LOG" 2>&1; }
install() { pip install -c constraints.txt "$@" || { tail -n 15 "$LOG" >&2; fail "pip install $* failed; see $LOG"; }; }

START=$SECONDS
say "making $VENV with $PYTHON (torch, mmcv, the four OpenMMLab libraries; log: $LOG)"
"$PYTHON" -m venv "$VENV" || fail "cannot make $VENV"
: >"$LOG"
install -U pip
install -U setuptools wheel  # pinned below 81: mmcv's build script and openmim need pkg_resources
say "1/4 torch"
install torch numpy opencv-python
say "2/4 mmengine and openmim ($((SECONDS - START)) s so far)"
install mmengine openmim

if ! "$VENV/bin/python" -c 'import mmcv.ops' 2>/dev/null; then
    MMCV=$(grep -i '^mmcv==' constraints.txt)
    say "3/4 $MMCV: looking for a prebuilt one for this torch"
    if ! timeout 120 "$VENV/bin/mim" install "$MMCV" --only-binary mmcv -c constraints.txt >>"$LOG" 2>&1; then
        command -v "${CXX:-c++}" >/dev/null || fail "no prebuilt $MMCV for this torch, and no C++ compiler to build it" \
            "(Debian: apt-get install g++)"
        say "3/4 none; building it (about 9 minutes on 2 cores, a minute or less if pip has cached the wheel)"
        (while [ -d /proc/$$ ]; do
            for _ in $(seq 30); do sleep 2; [ -d /proc/$$ ] || exit; done
            say "    still building, $((SECONDS - START)) s"
        done) &
        TICKER=$!
        trap 'kill $TICKER 2>/dev/null || true' EXIT
        MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} install --no-build-isolation "$MMCV"
        kill $TICKER 2>/dev/null || true
    fi
    "$VENV/bin/python" -c 'import mmcv.ops' 2>>"$LOG" || fail "mmcv is installed but mmcv.ops cannot be imported; see $LOG"
fi

say "4/4 mmdet, mmsegmentation, mmaction2, mmpretrain, test tools, bnet_mm with its kernels ($((SECONDS - START)) s so far)"
install mmdet mmsegmentation mmaction2 mmpretrain ftfy regex psutil pytest pytest-cov pytest-xdist mypy types-PyYAML \
    ruff hypothesis rich matplotlib nbclient ipykernel gdown onnx onnxruntime onnxscript playwright tidecv torchvision triton
install --no-build-isolation --no-deps -e .
"$VENV/bin/python" -c 'import bnet_mm, mmdet, mmseg' 2>>"$LOG" || fail "bnet_mm cannot be imported; see $LOG"
say "CPU kernels: $("$VENV/bin/python" -c 'from bnet_mm.ops import backend_report; print(backend_report()["cpp"])')"
touch "$DONE"
say "done in $((SECONDS - START)) s; to use it: . .venv/bin/activate"
