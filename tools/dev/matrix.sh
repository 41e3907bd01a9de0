#!/usr/bin/env bash
# Runs the tests on another stack, or as another machine would, and writes down what came out:
#   bash tools/dev/matrix.sh NAME          one of ROWS
#
# Each row has an environment of its own, in the folder MATRIX (.matrix of this checkout): what .venv has
# (tools/install.sh), with other packages in front of it, and a clone of HEAD, so that only what is committed is tested.
# A second call makes neither anew; remove the row's folder for that. The result is a line of tools/dev/matrix.csv, and
# tools/README.md has the table. PYTEST_ADDOPTS are more options for pytest; the exit code is 1 if a test failed.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)

# matrix_table.py reads these lines, too.
ROWS=(
    'torch-2.14: the default stack, as tools/install.sh makes it'
    'torch-2.13: torch 2.13 (CPU build where there is one) with Triton 3.7.1, no compiled kernels'
    'torch-2.6: torch 2.6, no compiled kernels; mmcv-lite, so neither mmdet nor mmseg'
    'torch-2.1: torch 2.1 and numpy 1, no compiled kernels; mmcv-lite, so neither mmdet nor mmseg'
    'forks: onedl-mmengine, -mmcv, -mmdetection, -mmsegmentation, -mmpretrain in the place of upstream, no mmaction2'
    'numpy-1: numpy 1 in the place of 2'
    'mmcv-lite: mmcv without its operators, which mmdet and mmseg 1.2.2 cannot do without'
    'no-compiler: no compiler on the path, and no compiled kernels'
    'offline: no network but the machine itself, after the installation'
    'home: a user whose HOME cannot be written to'
    'spaces: spaces in the paths of checkout, environment and temporary files'
    'not-root: a user other than root, with a checkout of his own'
    'two-users: two users at once, first in one checkout that neither may write to, then each in his own'
)
TRAINING=tests/tools/test_train.py::test_train_writes_checkpoint_curve_and_evaluates
# What another torch or another mmcv can change, and what another machine can.
STACK=(
    tests/layers/test_{bnet,holders,taps_loading}.py tests/surgery/test_config.py tests/checkpoint
    tests/host/test_{loaders,pretrained,traps}.py tests/engine/test_hooks.py
    tests/tools/test_test.py::test_one_entry_serves_mmseg_configs_too "$TRAINING"
    tests/experiments/test_runs.py::test_plan_is_trained_and_a_failure_does_not_stop_it
)
MACHINE=(
    tests/ops/test_dispatch.py tests/checkpoint/test_safe_load.py tests/host/test_loaders.py tests/tools/test_taps.py
    tests/layers/test_bnet.py::test_compile "$TRAINING"
)

fail() { echo "error: $*" >&2; exit 2; }
say() { echo "[$NAME, $SECONDS s] $*"; }
NAMES=("${ROWS[@]%%:*}")
NAME=${1:-}
{ [ $# = 1 ] && printf '%s\n' "${NAMES[@]}" | grep -qxF -- "$NAME"; } ||
    fail "one name is needed, of ${NAMES[*]}; got ${*:-none}"
BELOW=$(echo "$ROOT"/.venv/lib/python*/site-packages)
[ -d "$BELOW/torch" ] || fail "no environment in .venv: bash tools/install.sh makes it"
ROW=$(realpath -m "${MATRIX:-$ROOT/.matrix}")/$NAME
[ "$NAME" != spaces ] || ROW+='/a folder'
ENVIRONMENT=$ROW/environment PYTHON=$ROW/environment/bin/python

# Make the environment: the packages of .venv whose names do not begin as the pattern $1 says, and those that follow.
environment() {
    [ ! -e "$ROW/complete" ] || return 0
    say "environment"
    rm -rf "$ENVIRONMENT" "$ROW/below"
    mkdir -p "$ROW/below"
    "${INTERPRETER:-$ROOT/.venv/bin/python}" -m venv --without-pip "$ENVIRONMENT"
    local path
    for path in "$BELOW"/*; do
        [[ ${path##*/} =~ ^(__editable__|bnet_mm|$1) ]] || ln -s "$path" "$ROW/below/"
    done
    # Beside, not in, the environment: what stands there is nothing that pip may change.
    echo "$ROW/below" >"$(echo "$ENVIRONMENT"/lib/python*/site-packages)/below.pth"
    shift
    [ $# = 0 ] || "$PYTHON" -m pip install "$@" >"$ROW/pip.log" 2>&1 || fail "pip install $* failed; see $ROW/pip.log"
    touch "$ROW/complete"
}

# A clone of HEAD at $1.
clone() {
    [ -d "$1" ] || git clone -q "$ROOT" "$1"
    local git=(git -c "safe.directory=*" -C "$1")
    "${git[@]}" fetch -q "$ROOT" HEAD
    "${git[@]}" checkout -q --force --detach FETCH_HEAD
    REVISION=$("${git[@]}" rev-parse --short HEAD)
}

# A clone of HEAD at $1 with the compiled kernels of this checkout, which are for the torch of .venv.
clone_with_kernels() {
    clone "$1"
    cp "$ROOT"/bnet_mm/_cpu*.so "$1/bnet_mm/" || fail "no compiled kernels here: bash tools/install.sh compiles them"
}

# Run the tests in the checkout $2, by the command that follows; results are called $1.
run() {
    local result=$ROW/results/$1 checkout=$2
    shift 2
    say "tests: $result.log"
    (cd "$checkout" && PYTHONPATH=$checkout "$@" "$PYTHON" -m pytest -p no:cacheprovider -rfEs --junit-xml="$result.xml" \
        "${TESTS[@]}") >"$result.log" 2>&1 || true  # failures are counted in the end
    say "$(tail -n 1 "$result.log")"
}

# Run a command as the user $1, whose home is $2.
as() {
    setpriv --reuid="$1" --regid="$(id -g "$1")" --clear-groups \
        env -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u TMPDIR HOME="$2" USER="$1" LOGNAME="$1" "${@:3}"
}

# The environment of users, by an interpreter that they can run: .venv's may stand in a home.
environment_of_users() {
    [ "$(id -u)" = 0 ] || fail "$NAME needs root, to become other users"
    mkdir -p "$ROW"
    for INTERPRETER in "$(realpath "$ROOT/.venv/bin/python")" "/usr/bin/$(basename "$(dirname "$BELOW")")"; do
        ! as nobody "$ROW" "$INTERPRETER" -c '' 2>/dev/null || break
    done
    as nobody "$ROW" "$INTERPRETER" -c '' 2>/dev/null || fail "other users cannot run $INTERPRETER"
    as nobody "$ROW" test -r "$BELOW/torch/version.py" -a -r "$ROW" || fail "other users cannot read $ROW or $BELOW"
    environment none
}

# A home of the user $1 at $2.
home() { install -d -o "$1" -m 700 "$2"; }

# Run a command without a network.
offline() { unshare --net bash -c 'ip link set lo up && exec "$@"' offline "$@"; }

# A path on which no compiler stands.
path_without_compilers() {
    mkdir -p "$ROW/bin"
    local folder file
    for folder in ${PATH//:/ }; do
        for file in "$folder"/*; do
            [[ ${file##*/} =~ (^|-)(cc|c\+\+|gcc|g\+\+|cpp|clang|clang\+\+|nvcc|icx|icpx|tcc)(-[0-9.]+)?$ ]] ||
                ln -sf "$file" "$ROW/bin/"
        done
    done
}

# torch $1 with its torchvision $2, in the place of the packages of .venv that begin as $3 says, and the others after it.
torch() { environment "torch|functorch|triton|nvidia|cuda|$3" "torch==$1" "torchvision==$2" "${@:4}"; }

# mmcv with its operators for the torch of this environment: the wheel that pip has cached, or one built here.
mmcv() {
    ! "$PYTHON" -c 'import mmcv.ops' 2>/dev/null || return 0
    say "mmcv"
    local install=(env MMCV_WITH_OPS=1 "$PYTHON" -m pip install --no-deps --no-build-isolation --force-reinstall)
    "${install[@]}" mmcv==2.1.0 >>"$ROW/pip.log" 2>&1 && "$PYTHON" -c 'import mmcv.ops' 2>>"$ROW/pip.log" ||
        "${install[@]}" --no-cache-dir mmcv==2.1.0 >>"$ROW/pip.log" 2>&1 || fail "no mmcv; see $ROW/pip.log"
}

mkdir -p "$ROW"
rm -rf "$ROW/results"
install -d -m 1777 "$ROW/results"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONWARNINGS='ignore:pkg_resources is deprecated as an API'
TESTS=("${STACK[@]}") CLONE=clone_with_kernels AS=()
case $NAME in
    torch-2.14) environment none ;;
    torch-2.13) torch 2.13.0 0.28.0 mmcv triton==3.7.1; mmcv; CLONE=clone ;;
    torch-2.6) torch 2.6.0 0.21.0 'mmcv|mmdet' mmcv-lite==2.1.0; CLONE=clone ;;
    torch-2.1) torch 2.1.2 0.16.2 'mmcv|mmdet|numpy' mmcv-lite==2.1.0 'numpy<2'; CLONE=clone ;;
    forks)
        environment 'mm|numpy|opencv' --no-build-isolation onedl-mmengine==0.10.12 onedl-mmcv==2.3.6 \
            onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2 onedl-mmpretrain==1.3.6
        ;;
    numpy-1) environment numpy 'numpy<2' ;;
    mmcv-lite) environment 'mmcv|mmdet' --no-deps mmcv-lite==2.1.0 ;;
    *)
        TESTS=("${MACHINE[@]}")
        case $NAME in
            home | not-root | two-users) environment_of_users ;;
            *) environment none ;;
        esac
        ;;
esac
case $NAME in
    no-compiler) path_without_compilers; CLONE=clone; AS=(env "PATH=$ROW/bin") ;;
    offline) AS=(offline) ;;
    home) install -d -m 755 "$ROW/home"; AS=(as nobody "$ROW/home") ;;
    spaces) mkdir -p "$ROW/temporary files"; export TMPDIR="$ROW/temporary files" ;;
    not-root) home nobody "$ROW/home"; AS=(as nobody "$ROW/home") ;;
esac

$CLONE "$ROW/checkout"
START=$SECONDS
if [ "$NAME" = two-users ]; then
    for user in nobody daemon; do
        home "$user" "$ROW/home of $user"
        run "shared-$user" "$ROW/checkout" as "$user" "$ROW/home of $user" &
    done
    wait
    for user in nobody daemon; do
        $CLONE "$ROW/checkout of $user"
        chown -R "$user" "$ROW/checkout of $user"
        run "own-$user" "$ROW/checkout of $user" as "$user" "$ROW/home of $user" &
    done
    wait
else
    [ "${AS[0]:-}" != as ] || chown -R nobody "$ROW/checkout"
    run tests "$ROW/checkout" "${AS[@]}"
fi
PYTHONPATH=$ROW/checkout "$PYTHON" "$ROOT/tools/dev/matrix_table.py" --add "$NAME" "$ROW/results" \
    $((SECONDS - START)) "$REVISION" "${TESTS[*]}"
