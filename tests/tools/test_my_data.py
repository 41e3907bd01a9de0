"""tools/my_data.py as a user runs it, on folders of every format."""

import json
import re
import shutil

import pytest
from mmengine.config import Config

from bnet_mm.cli import UserError
from helpers.label_formats import write_masks, write_voc, write_yolo
from helpers.paths import SHARED_DATA
from helpers.tools import call_tool, config_with, scalars, train

pytest.importorskip('mmdet')
NARROW = """
model = dict(
    backbone=dict(base_channels=8, stem_channels=8), neck=dict(in_channels=[8, 16, 32, 64]),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
"""


@pytest.fixture
def config(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_ROOT', str(shapes))
    return config_with(tmp_path, NARROW)


def test_detectors(shapes, config, tmp_path, capsys):
    """From labels to a training; test_real_images has the other formats."""
    write_yolo(shapes, tmp_path / 'mine')
    out = tmp_path / 'new.py'
    assert call_tool('my_data', tmp_path / 'mine', '--config', config, '-o', out) is None
    said = capsys.readouterr().out
    assert 'mine: yolo, 22 images, ' in said and '3 classes: circle, square, triangle' in said
    assert 'train: 16 images, ' in said and 'val: 6 images, ' in said
    assert 'dry batch: loss ' in said and said.endswith(f'train it: python tools/train.py {out}\n')
    cfg = Config.fromfile(out)
    assert cfg.train_cfg.max_epochs == 2500 and cfg.train_dataloader.batch_size == 8
    images = json.loads((tmp_path / 'new_data/val.json').read_text())['images']
    assert len(images) == 6 and all((tmp_path / 'mine' / one['file_name']).is_file() for one in images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'mine', 'new.py', 'new_data']
    done = train(shapes, tmp_path / 'run', config=out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'coco/bbox_mAP' in scalars(tmp_path / 'run')[-1] and (tmp_path / 'run/epoch_1.pth').is_file()


@pytest.fixture
def segmentor(segmentation, tmp_path):
    """A config that resizes images to 32 x 32 and leaves masks as they are where they are compared."""
    segmentation('BN')
    path = tmp_path / 'segmentor.py'
    path.write_text("""
_base_ = 'psp.py'
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)), dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')]
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=pipeline))
""")
    return path


def test_segmentor(shapes, segmentor, tmp_path, capsys):
    write_masks(shapes, tmp_path / 'mine')
    out = tmp_path / 'new.py'
    assert call_tool('my_data', tmp_path / 'mine', '--config', segmentor, '-o', out) is None
    said = capsys.readouterr().out
    assert 'mine: masks, 22 images, semantic masks' in said and '4 classes: background, circle' in said
    assert 'train: 18 images\nval: 4 images\n' in said and 'split off for it (seed 0)' in said
    cfg = Config.fromfile(out)
    assert cfg.model.decode_head.num_classes == 4 and len(list((tmp_path / 'new_data/masks').rglob('*.png'))) == 22


@pytest.mark.parametrize('arguments, message', [
    (['nix', '--config', 'CONFIG', '-o', 'OUT'], 'nix is not a folder'),
    (['FOLDER', '--config', 'CONFIG', '-o', 'new.yaml'], 'a config file ends in .py'),
    (['FOLDER', '--config', 'nix.py', '-o', 'OUT'], 'config nix.py does not exist'),
    (['FOLDER', '--config', 'CONFIG', '-o', 'nix/new.py'], 'new.py does not exist'),
    (['FOLDER', '--config', 'CONFIG', '-o', 'CONFIG'], 'config.py exists already'),
    (['FOLDER', '--config', 'bnet_mm::tsn_r50_bnet3_ucf101.py', '-o', 'OUT'], 'is for mmaction; data are prepared'),
    (['FOLDER', '--config', 'bnet_mm::tsn_r50_bnet9_ucf101.py', '-o', 'OUT'], 'did you mean tsn_r50_bnet'),
    (['FOLDER', '--config', 'CONFIG', '-o', 'OUT', '--format', 'masks'], 'are masks, and the config trains on boxes'),
    (['FOLDER', '--config', 'bnet_mm::mask_rcnn_r50_bnet5_1x.py', '-o', 'OUT'], 'nothing was written: 1 problem$'),
    (['EMPTY', '--config', 'CONFIG', '-o', 'OUT'], 'has no images'),
])  # fmt: skip
def test_what_is_refused(shapes, config, tmp_path, arguments, message):
    write_yolo(shapes, tmp_path / 'mine', splits=['val'])
    (tmp_path / 'empty').mkdir()
    places = dict(CONFIG=config, FOLDER=tmp_path / 'mine', OUT=tmp_path / 'new.py', EMPTY=tmp_path / 'empty')
    with pytest.raises(UserError, match=message):
        call_tool('my_data', *(places.get(one, one) for one in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'empty', 'mine']


def test_problems_are_listed_and_nothing_is_written(shapes, config, tmp_path, capsys):
    write_yolo(shapes, tmp_path / 'mine')
    for i in range(1, 13):
        (tmp_path / f'mine/images/train/{i:06d}.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='nothing was written: 12 problems'):
        call_tool('my_data', tmp_path / 'mine', '--config', config, '-o', tmp_path / 'new.py')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith('error: images/train/000001.jpg cannot be decoded')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'mine']


@pytest.mark.data
@pytest.mark.parametrize('form', ['coco', 'voc', 'yolo', 'masks'])
def test_real_images(form, config, segmentor, tmp_path, capsys):
    """A hundred images of each split of COCO, of train in other formats; the masks beside them are in VOC's classes."""
    root, mine = SHARED_DATA / 'mini_coco', tmp_path / 'mine'
    if form == 'coco':
        shutil.copytree(root, mine, ignore=lambda *_: ['voc_masks'])
    elif form == 'masks':
        shutil.copytree(root / 'train2017', mine / 'images')
        shutil.copytree(root / 'voc_masks/train2017', mine / 'masks')
    else:
        dict(voc=write_voc, yolo=write_yolo)[form](root, mine, splits=['train'])
    base = segmentor if form == 'masks' else config
    assert call_tool('my_data', mine, '--config', base, '-o', tmp_path / 'new.py') is None
    said = capsys.readouterr().out
    assert f'mine: {form}, ' in said and 'dry batch: ' in said
    counts = (100, 100) if form == 'coco' else (80, 20)
    assert [int(count) for count in re.findall(r'^(?:train|val): (\d+) images', said, re.M)] == [*counts]
