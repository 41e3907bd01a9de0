"""What users mistype, tool by tool: each is one sentence and exit code 2, and nothing is written."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
import torch

from bnet_mm.cli import run_tool
from helpers.paths import REPO
from helpers.tools import load_tool

CONFIGS = dict(CONFIG='configs/faster_rcnn_r50_bnet5_1x.py', BN='configs/faster_rcnn_r50_bn_1x.py')
BOX = dict(image_id=1, category_id=1, bbox=[1, 1, 9, 9], score=0.9)
TRUTH = dict(
    images=[dict(id=1, file_name='1.jpg', height=20, width=20)], categories=[dict(id=1, name='a')],
    annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)],
)  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Files of every wrong kind, and some right ones."""
    root = tmp_path_factory.mktemp('wrong')
    (root / 'folder').mkdir()
    for name in ('empty.py', 'empty.pth', 'empty.jpg', 'empty.json'):
        (root / name).touch()
    texts = dict(list='[]', truth=json.dumps(TRUTH), boxes=json.dumps([BOX]), points=json.dumps([dict(BOX, bbox=0)]))
    for name, text in texts.items():
        (root / f'{name}.json').write_text(text)
    del (point := dict(BOX))['bbox']
    (root / 'points.json').write_text(json.dumps([point]))
    (root / 'broken.yml').write_text('a: [\n')
    cv2.imwrite(str(root / 'picture.png'), np.zeros((8, 8, 3), np.uint8))
    torch.save(dict(state_dict={'bn3.bnconv.weight': torch.rand(4, 1, 3, 3)}), root / 'taps.pth')
    return root


WRONG = [
    ('train nope.py', 'config nope.py does not exist'),
    ('train folder', 'config folder is a folder, not a file'),
    ('train broken.yml', 'config broken.yml cannot be read: ParserError: while parsing a flow node did not find'),
    ('train BN --resume nope.pth', 'checkpoint nope.pth does not exist'),
    ('train BN --resume folder', 'checkpoint folder is a folder, not a file'),
    ('train BN --work-dir empty.py', 'empty.py is no folder for outputs: there is a file of that name'),
    ('test CONFIG folder', 'checkpoint folder is a folder, not a file'),
    ('predict CONFIG folder picture.png', 'checkpoint folder is a folder, not a file'),
    ('my_data folder --config folder -o new.py', 'config folder is a folder, not a file'),
    ('convert_config folder -o new.py', 'config folder is a folder, not a file'),
    ('convert_checkpoint folder new.pth', 'nothing was written: checkpoint folder is a folder, not a file'),
    ('convert_checkpoint taps.pth nix/new.pth', 'nothing was written: the folder of nix/new.pth does not exist'),
    ('export_onnx CONFIG empty.pth new.onnx --cfg-options model', 'argument --cfg-options: takes KEY=VALUE, got model'),
    ('prepare_data coco folder --check --open -1', '--open takes a number from 0 on, got -1'),
    ('prepare_data coco nope --check', 'nope is not a folder; how to make it: '),
    ('make_toy_data coco folder', 'folder exists already; remove it or name another folder'),
    ('make_toy_data coco empty.py/new', 'empty.py is no folder for outputs: there is a file of that name'),
    ('make_toy_data coco new --seed -1', '--seed at least 0'),
    ('coco_subset nope.json new.json', 'annotation file nope.json does not exist'),
    ('coco_subset folder new.json', 'annotation file folder is a folder, not a file'),
    ('coco_subset list.json new.json', 'list.json cannot be read as a COCO annotation file: '),
    ('coco_subset truth.json nix/new.json', 'nothing was written: the folder of nix/new.json does not exist'),
    ('coco_subset truth.json new.json --images 9', 'only 1 images have 1 to 6 annotations, 9 asked for'),
    ('coco_subset truth.json new.json --images 0', '--images and --max-objects must be at least 1'),
    ('heatmap CONFIG empty.pth folder', 'folder has no images or videos'),
    ('heatmap CONFIG empty.pth empty.py', 'empty.py is neither an image'),
    ('heatmap CONFIG empty.pth empty.jpg', 'empty.jpg cannot be decoded'),
    ('heatmap CONFIG empty.pth 0', 'IMAGES are files, got 0'),
    ('taps folder', 'nothing was drawn: checkpoint folder is a folder, not a file'),
    ('taps taps.pth --out empty.py', 'empty.py is no folder for outputs: there is a file of that name'),
    ('errors nope.json boxes.json', 'annotations nope.json cannot be read: nope.json: No such file or directory'),
    ('errors truth.json points.json', 'predictions points.json have no bbox'),
    ('errors truth.json boxes.json --masks', 'predictions boxes.json have no segmentation'),
    ('errors truth.json boxes.json --images nope', '--images nope is not a folder'),
    ('errors truth.json boxes.json --pictures -1', '--pictures takes a number from 0 on, got -1'),
    ('download_weights faster_rcnn_r50_bnet5_1x --dest empty.py/new', 'empty.py/new is no folder for outputs'),
    ('dev/benchmark layer --runs 0 --out folder', '--runs takes a number above 0, got 0'),
    ('dev/benchmark layer --check --out folder', '--check goes with readme, not with layer'),
    ('dev/benchmark readme --out folder', 'folder/layer.csv: No such file or directory'),
    ('dev/gpu_figures nope', 'nope is not a folder'),
    ('dev/mutants nope.py', 'nope.py is not a module of '),
    ('dev/mutants empty.py', 'empty.py is not a module of '),
    ('dev/mutants --tests nope.py', '--tests nope.py: there is none'),
    ('dev/mutants --sample 0', '--sample takes a number above 0, got 0'),
]


@pytest.mark.parametrize('typed, message', WRONG, ids=[typed for typed, _ in WRONG])
def test_one_sentence(typed, message, folder, monkeypatch, capsys):
    tool, *words = typed.split()
    if tool in ('heatmap', 'predict', 'train', 'test', 'export_onnx'):
        pytest.importorskip('mmdet')
    if tool == 'errors':
        pytest.importorskip('tidecv')
    monkeypatch.syspath_prepend(str(REPO / 'tools' / 'dev'))
    monkeypatch.chdir(folder)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('BNET_MM_TRACEBACK', raising=False)
    before = sorted(os.walk('.'))
    words = [str(REPO / CONFIGS[word]) if word in CONFIGS else word for word in words]
    monkeypatch.setattr(sys, 'argv', [tool, *words])
    with pytest.raises(SystemExit) as end:
        run_tool(load_tool(tool).main)
    errors = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and message in errors[-1], errors
    assert sum('error: ' in line for line in errors) == 1
    assert sorted(os.walk('.')) == before
