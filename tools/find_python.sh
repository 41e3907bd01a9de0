# Sourced by the launch scripts: sets PYTHON to one with torch, and refuses files that are not there.
# $PYTHON, else the active one, else that of the checkout's .venv (and says so).
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
has_torch() { command -v "$1" >/dev/null && "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }
if [ -n "${PYTHON:-}" ]; then
    has_torch "$PYTHON" || { echo "error: PYTHON=$PYTHON has no torch" >&2; exit 2; }
elif has_torch python; then
    PYTHON=python
elif has_torch "$HERE/../.venv/bin/python"; then
    PYTHON=$(cd "$HERE/.." && pwd)/.venv/bin/python
    echo "using $PYTHON, as the active Python has no torch" >&2
else
    echo "error: no Python with torch: activate an environment, name one with PYTHON=..., or make one with" \
        "bash tools/install.sh" >&2
    exit 2
fi
# Paths in other libraries and addresses are looked up by the tools.
FILE=$CONFIG
[[ $CONFIG != bnet_mm::* ]] || FILE=$HERE/../configs/$(basename "${CONFIG#bnet_mm::}" .py).py
[[ $FILE == *::* || -f $FILE ]] || { echo "error: config $CONFIG does not exist" >&2; exit 2; }
[[ -z ${CHECKPOINT:-} || $CHECKPOINT == *://* || -f $CHECKPOINT ]] ||
    { echo "error: checkpoint $CHECKPOINT does not exist" >&2; exit 2; }
