#!/usr/bin/env bash
# Install if needed, then train and evaluate a small Faster R-CNN with BNET-5:
#   bash tools/run_demo.sh                               on generated shapes
#   DATA_ROOT=/path/to/coco bash tools/run_demo.sh       on any data set in COCO's layout
#   COMPARE=1 bash tools/run_demo.sh                     the same detector with BN too, and a page of both
# A second call skips what is done; an interrupted training is resumed.
set -euo pipefail
[ -z "${DATA_ROOT:-}" ] || DATA_ROOT=$(realpath "$DATA_ROOT")
cd "$(dirname "$0")/.."
bash tools/install.sh

PYTHON=.venv/bin/python
# Threads that wait by spinning make training ten times slower as soon as anything else uses a core.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONWARNINGS='ignore:pkg_resources is deprecated as an API'
OUT=work_dirs/demo/shapes
[ -z "${DATA_ROOT:-}" ] || OUT=work_dirs/demo/$(basename "$DATA_ROOT")-$(cksum <<<"$DATA_ROOT" | cut -d' ' -f1)
export DATA_ROOT=${DATA_ROOT:-data/shapes}
mkdir -p "$OUT"

# Run a command with its whole output in a log, and its progress on the screen.
show_progress() {
    "$@" 2>&1 | tee -a "$OUT/log.txt" | sed -un \
        -e 's/.*Epoch(train) *\(\[.*\/[0-9]*\]\).* eta: \([0-9:]*\).* loss: \([0-9.]*\).*/  epoch \1  remaining \2  loss \3/p' \
        -e 's/.*Epoch(val).*bbox_mAP_50: \([0-9.]*\).*/  validation: bbox_mAP_50 \1/p' \
        -e 's/.*Epoch(test).*bbox_mAP_50: \([0-9.]*\).*/  test: bbox_mAP_50 \1/p' \
        -e 's/.*Epoch(test) *\(\[.*\/[0-9]*\]\).* eta: \([0-9:]*\).*/  image batch \1  remaining \2/p' -e '/^error/p' ||
        { tail -n 15 "$OUT/log.txt" >&2; echo "error: $2 failed; see $OUT/log.txt" >&2; exit 1; }
}

if [ "$DATA_ROOT" = data/shapes ] && [ ! -d data/shapes ]; then
    "$PYTHON" tools/make_toy_data.py coco data/shapes
fi
for part in annotations/instances_train2017.json annotations/instances_val2017.json train2017 val2017; do
    [ -e "$DATA_ROOT/$part" ] || { echo "error: DATA_ROOT=$DATA_ROOT has no $part (COCO's layout)" >&2; exit 2; }
done

# Train and evaluate configs/faster_rcnn_r18_$1_demo.py in $OUT/$1, as far as that has not been done.
train_and_test() {
    local config=configs/faster_rcnn_r18_$1_demo.py run=$OUT/$1 resume=()
    if [ ! -f "$run/trained" ]; then
        echo "training $config on $DATA_ROOT (log: $OUT/log.txt)"
        [ -f "$run/train/last_checkpoint" ] && resume=(--resume)
        show_progress "$PYTHON" tools/train.py "$config" --work-dir "$run/train" "${resume[@]}"
        touch "$run/trained"
    fi
    local checkpoint
    checkpoint=$(cat "$run/train/last_checkpoint")
    if [ ! -f "$run/tested" ]; then
        echo "evaluating $checkpoint"
        show_progress "$PYTHON" tools/test.py "$config" "$checkpoint" --work-dir "$run/test" --out "$run/predictions.pkl"
        touch "$run/tested"
    fi
    echo "checkpoint: $checkpoint"
}

RUNS=("$OUT/bnet5")
if [ "${COMPARE:-0}" = 1 ]; then
    RUNS=("$OUT/bn" "$OUT/bnet5")  # differences are to the first
fi
for run in "${RUNS[@]}"; do
    train_and_test "$(basename "$run")"
done
echo "drawing what came out of it"
show_progress "$PYTHON" tools/report.py "${RUNS[@]}" --out "$OUT/page"
echo "to run the other tools: . .venv/bin/activate"
echo "the page, for a browser: $OUT/page/index.html"
