#!/usr/bin/env bash
# Install if needed, then train and evaluate a small Faster R-CNN with BNET-5:
#   bash tools/run_demo.sh                               on generated shapes
#   DATA_ROOT=/path/to/coco bash tools/run_demo.sh       on any data set in COCO's layout
# A second call skips what is done; an interrupted training is resumed.
set -euo pipefail
[ -z "${DATA_ROOT:-}" ] || DATA_ROOT=$(realpath "$DATA_ROOT")
cd "$(dirname "$0")/.."
bash tools/dev/install.sh

PYTHON=.venv/bin/python
CONFIG=configs/faster_rcnn_r18_bnet5_demo.py
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
        -e 's/.*Epoch(test) *\(\[.*\/[0-9]*\]\).* eta: \([0-9:]*\).*/  image batch \1  remaining \2/p' -e '/^error/p' ||
        { tail -n 15 "$OUT/log.txt" >&2; echo "error: $2 failed; see $OUT/log.txt" >&2; exit 1; }
}

if [ "$DATA_ROOT" = data/shapes ] && [ ! -d data/shapes ]; then
    "$PYTHON" tools/make_toy_data.py coco data/shapes
fi
for part in annotations/instances_train2017.json annotations/instances_val2017.json train2017 val2017; do
    [ -e "$DATA_ROOT/$part" ] || { echo "error: DATA_ROOT=$DATA_ROOT has no $part (COCO's layout)" >&2; exit 1; }
done

if [ ! -f "$OUT/trained" ]; then
    echo "training $CONFIG on $DATA_ROOT (log: $OUT/log.txt)"
    RESUME=()
    [ -f "$OUT/train/last_checkpoint" ] && RESUME=(--resume)
    show_progress "$PYTHON" tools/train.py "$CONFIG" --work-dir "$OUT/train" "${RESUME[@]}"
    touch "$OUT/trained"
fi
CHECKPOINT=$(cat "$OUT/train/last_checkpoint")
if [ ! -f "$OUT/tested" ]; then
    echo "evaluating $CHECKPOINT"
    show_progress "$PYTHON" tools/test.py "$CONFIG" "$CHECKPOINT" --work-dir "$OUT/test" --show-dir predictions
    touch "$OUT/tested"
fi
"$PYTHON" tools/report_run.py "$OUT/train" "$OUT/test" --out "$OUT"
echo "checkpoint:                          $CHECKPOINT"
echo "to run the other tools: . .venv/bin/activate"
