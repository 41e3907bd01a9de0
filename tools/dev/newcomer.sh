#!/usr/bin/env bash
# Types the commands of README.md as a newcomer does, and says how long each took:
#   bash tools/dev/newcomer.sh [REPOSITORY (this checkout)] [FOLDER (bnet_mm in a new temporary folder)]
#
# Clones REPOSITORY into FOLDER and types there the two commands with the line that activates the environment, word for
# word, looks for the page that the demo has to leave, and then types the quick commands of the other sections; what it
# leaves out, it names with the reason (tests/helpers/newcomer.py). It stops at the first command that fails. Called
# again with the same FOLDER it goes on: the installation and the training that are done take no time. DATA_ROOT is the
# demo's, PYTEST_ADDOPTS are more options for pytest. On 2 CPU cores all of it should take more than half an hour.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
[ $# -le 2 ] || fail "a repository and a folder at most, got $*"
REPOSITORY=${1:-$(cd "$(dirname "$0")/../.." && pwd)}
FOLDER=${2:-$(mktemp -d)/bnet_mm}
git ls-remote "$REPOSITORY" HEAD >/dev/null 2>&1 || fail "$REPOSITORY is no git repository"
[ ! -e "$FOLDER" ] || [ -e "$FOLDER/.git" ] || fail "$FOLDER is there, and is no clone"

typed() {
    local start=$SECONDS
    echo "\$ $1"
    eval "$1" || { echo "error: this failed after $((SECONDS - start)) s: $1" >&2; exit 1; }
    echo "[$((SECONDS - start)) s] $1"
}

[ -e "$FOLDER" ] || typed "git clone --quiet '$REPOSITORY' '$FOLDER'"
cd "$FOLDER"
echo "in $FOLDER"
# The first block of the section: the two commands, and the one that activates the environment.
mapfile -t COMMANDS < <(sed -n '/^## Two commands/,/^## /{/^```bash/,/^```/{/^```/!p}}' README.md)
[ ${#COMMANDS[@]} -gt 0 ] || fail "README.md has no commands in its section 'Two commands'"
for command in "${COMMANDS[@]}"; do typed "$command"; done
PAGE=$({ find work_dirs/demo -path '*/page/index.html' -printf '%T@ %p\n' 2>/dev/null || true; } | sort -n | tail -n 1)
PAGE=${PAGE#* }  # without its time
[ -n "$PAGE" ] && grep -q '<img' "$PAGE" ||
    { echo "error: the demo left no page with pictures: ${PAGE:-none}" >&2; exit 1; }

OTHERS=(tests/helpers/newcomer.py "${DATA_ROOT:-data/shapes}" "$PAGE")
mapfile -t COMMANDS < <(PYTHONPATH=tests:${PYTHONPATH:-} python "${OTHERS[@]}")
[ ${#COMMANDS[@]} -gt 0 ] || { echo "error: no commands of the other sections" >&2; exit 1; }
for line in "${COMMANDS[@]}"; do
    if [[ $line == 'not typed: '* ]]; then echo "$line"; else typed "$line"; fi
done
echo "all of it: $SECONDS s; the page: $FOLDER/$PAGE"
