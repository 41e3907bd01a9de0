#!/usr/bin/env bash
# Make .venv with all that the lock of this Python pins (requirements/), and bnet_mm in it: bash tools/install.sh
#   PYTHON=/path/to/python3.12   that interpreter, 3.10 to 3.13
#   MMCV_WHEEL=/path/to.whl      that mmcv, where a prebuilt one would be looked for, or one built
# Safe to interrupt and to repeat: what is done is skipped.
set -euo pipefail
[ -z "${MMCV_WHEEL:-}" ] || MMCV_WHEEL=$(realpath -m "$MMCV_WHEEL")
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 1; }
refuse() { echo "error: $*" >&2; exit 2; }  # what was typed, or what this machine lacks
say() { echo "[install] $*"; }

VENV=.venv
LOG=$VENV/install.log
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in "$VENV/bin/python" python3.11 python3.12 python3.13 python3.10 python3; do
        ! version "$PYTHON" >/dev/null || break
    done
fi
VERSION=$(version "$PYTHON") || refuse "$PYTHON does not run: install Python 3.11, or name one with PYTHON=/path/to/python3.11"
LOCK=requirements/py${VERSION/./}.txt
[ -f "$LOCK" ] || refuse "$PYTHON is Python $VERSION, and the locks are for 3.10 to 3.13: name another with PYTHON=..."
HAS=$(version "$VENV/bin/python" || echo "$VERSION")
[ "$HAS" = "$VERSION" ] || refuse "$VENV has Python $HAS, and $PYTHON is Python $VERSION: remove $VENV first"
[ -f "${MMCV_WHEEL:-$LOCK}" ] || refuse "MMCV_WHEEL=$MMCV_WHEEL is no file"

# The stages, each with the file that says it is done with these inputs, and about its seconds on slow cores, of which
# mmcv takes all (measured with 2).
mark() { echo "$VENV/$1-$(cat "${@:2}" <(grep '^torch==\|^mmcv==' "$LOCK") | sha256sum | cut -c1-16)"; }
STAGES=(packages mmcv bnet_mm)
declare -A MARK=(
    [packages]=$(mark packages "$LOCK") [mmcv]=$(mark mmcv ${MMCV_WHEEL:+"$MMCV_WHEEL"})
    [bnet_mm]=$(mark bnet_mm setup.py bnet_mm/ops/csrc/*)
)
declare -A TAKES=([packages]=400 [mmcv]=$((2600 / ${MAX_JOBS:-$(nproc)})) [bnet_mm]=340)

# How long all takes yet, $2 seconds after the start of the stage $1: at least half a minute of it.
remaining() {
    local sum=$((TAKES[$1] > $2 + 30 ? TAKES[$1] - $2 : 30)) stage
    for stage in "${STAGES[@]}"; do
        [ "$stage" = "$1" ] || [ -f "${MARK[$stage]}" ] || sum=$((sum + TAKES[$stage]))
    done
    echo "about $(((sum + 59) / 60)) min remain"
}

# Run the function $1 if that stage is not done, with its output in the log and a line each half minute.
stage() {
    [ ! -f "${MARK[$1]}" ] || return 0
    say "$1: $(remaining "$1" 0)"
    local start=$SECONDS
    (while sleep 30 >/dev/null && kill -0 $$; do say "$1: $(remaining "$1" $((SECONDS - start)))"; done) 2>/dev/null &
    local ticker=$!
    trap "kill $ticker 2>/dev/null || true" EXIT
    "$1"
    kill $ticker
    trap - EXIT
    touch "${MARK[$1]}"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" >>"$LOG" 2>&1; }
install() { pip install "$@" || { tail -n 15 "$LOG" >&2; fail "pip install $* failed; see $LOG"; }; }

packages() {
    # mmcv has a stage of its own. Pip has nothing to resolve: a lock has all that its packages need.
    awk -v folder="$VENV" '/^[^ ]/ { name = /^mmcv==/ ? "mmcv" : "packages" } { print >folder "/" name ".txt" }' "$LOCK"
    install --no-deps --require-hashes -r "$VENV/packages.txt"
}

# A compiler of the name $1 that is $2 told C++20 where it is told C++17.
cxx20() {
    printf '#!/bin/bash\nexec %q "${@/#-std=c++17/-std=c++20}"\n' "$2" >"$VENV/cxx20/$1"
    chmod +x "$VENV/cxx20/$1"
}

# Whether the mmcv that is there works with this torch.
mmcv_works() { "$VENV/bin/python" -c 'import mmcv.ops' 2>>"$LOG"; }

mmcv() {
    local mmcv torch
    mmcv=$(grep -o '^mmcv==[^ ]*' "$LOCK")
    torch=$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')
    if [ -n "${MMCV_WHEEL:-}" ]; then
        install --no-deps --force-reinstall "$MMCV_WHEEL"
        mmcv_works || refuse "MMCV_WHEEL=$MMCV_WHEEL does not work with torch $torch; see $LOG"
        return
    fi
    ! mmcv_works || return 0
    if timeout 120 "$VENV/bin/mim" install "$mmcv" --only-binary mmcv --no-deps >>"$LOG" 2>&1; then
        ! mmcv_works || return 0
        say "mmcv: the prebuilt one does not work with torch $torch"
    fi
    local cached=() wheel use_cache=()
    mapfile -t cached < <("$VENV/bin/python" -m pip cache list --format=abspath "${mmcv/==/-}-cp${VERSION/./}" 2>>"$LOG")
    for wheel in "${cached[@]}"; do
        say "mmcv: trying the one that pip has in its cache, $wheel"
        install --no-deps --force-reinstall "$wheel"
        ! mmcv_works || return 0
        say "mmcv: it does not work with torch $torch, so it is not used"
        use_cache=(--no-cache-dir)
    done
    command -v "${CXX:-c++}" >/dev/null || refuse "no prebuilt $mmcv for torch $torch, and no C++ compiler to build it" \
        "(Debian: apt-get install g++); or name a wheel with MMCV_WHEEL=/path/to.whl"
    say "mmcv: no prebuilt one for torch $torch, so it is built"
    # Its build script asks for C++17, and the headers of torch 2.14 refuse less than C++20.
    mkdir -p "$VENV/cxx20"
    cxx20 c++ "$(command -v "${CXX:-c++}")"
    cxx20 nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"  # which is called where there is a GPU
    PATH="$PWD/$VENV/cxx20:$PATH" CXX=c++ PYTORCH_NVCC=nvcc MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        install --no-deps --no-build-isolation --force-reinstall "${use_cache[@]}" --require-hashes -r "$VENV/mmcv.txt"
    mmcv_works || fail "mmcv is built, but mmcv.ops cannot be imported; see $LOG"
}

bnet_mm() {
    rm -f bnet_mm/_cpu*.so  # maybe of another torch, and it would stay where nothing can be compiled
    install --no-deps --no-build-isolation -e .
    "$VENV/bin/python" -c 'import bnet_mm, mmdet, mmseg' 2>>"$LOG" || fail "bnet_mm cannot be imported; see $LOG"
    say "bnet_mm: CPU kernels: $("$VENV/bin/python" -c 'from bnet_mm.ops import backend_report; print(backend_report()["cpp"])')"
}

for name in "${STAGES[@]}"; do
    [ -f "${MARK[$name]}" ] || TODO=1
done
[ -n "${TODO:-}" ] || exit 0
if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || refuse "$PYTHON lacks the venv module (Debian: python3-venv)"
    FREE_GB=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
    [ "$FREE_GB" -ge 12 ] || refuse "only $FREE_GB GB free here; the installation needs up to 12 GB"
    "$PYTHON" -m venv "$VENV" || refuse "cannot make $VENV; remove what is there first"
fi
for name in "${STAGES[@]}"; do
    stage "$name"
done
say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; to use it: . .venv/bin/activate"
