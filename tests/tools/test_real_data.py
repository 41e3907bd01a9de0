"""A short form of the README's trial on real images: the paper's config, narrowed by options, on a few COCO images."""

import json
import os
import subprocess
import sys

import pytest

from helpers.paths import REPO, SHARED_DATA

pytest.importorskip('mmdet')
pytestmark = pytest.mark.data
CONFIG = 'configs/faster_rcnn_r50_bnet5_1x.py'


def run(*command):
    env = {**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE'}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    """--cfg-options for training and evaluating on four real images at a small scale, from scratch."""
    ann_file = tmp_path_factory.mktemp('coco') / 'four.json'
    root = SHARED_DATA / 'mini_coco'
    done = run('tools/coco_subset.py', root / 'annotations/instances_train2017.json', ann_file, '--images', 4)
    assert done.returncode == 0, done.stderr
    data = [
        f'{loader}_dataloader.{option}'
        for loader in ('train', 'val', 'test')
        for option in (
            f'dataset.data_root={root}/', f'dataset.ann_file={ann_file}', 'dataset.data_prefix.img=train2017/',
            'num_workers=0', 'persistent_workers=False',
        )
    ]  # fmt: skip
    return [
        *data, f'val_evaluator.ann_file={ann_file}', f'test_evaluator.ann_file={ann_file}',
        'train_dataloader.dataset.pipeline.2.scale=(160,96)', 'val_dataloader.dataset.pipeline.1.scale=(160,96)',
        'test_dataloader.dataset.pipeline.1.scale=(160,96)', 'model.backbone.init_cfg=None',
        'model.backbone.frozen_stages=-1', 'model.backbone.norm_eval=False', 'model.test_cfg.rcnn.score_thr=0',
        'optim_wrapper.optimizer._delete_=True', 'optim_wrapper.optimizer.type=AdamW',
        'optim_wrapper.optimizer.lr=3e-4', 'param_scheduler.0.end=4', 'train_cfg.max_epochs=10',
        'train_cfg.val_interval=10', 'default_hooks.checkpoint.interval=10', 'default_hooks.logger.interval=1',
    ]  # fmt: skip


def test_training_and_evaluation_on_real_images(options, tmp_path):
    done = run('tools/train.py', CONFIG, '--work-dir', tmp_path / 'train', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    (scalars,) = (tmp_path / 'train').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.6 * sum(losses[:4])

    checkpoint = tmp_path / 'train' / 'epoch_10.pth'
    test = ['tools/test.py', CONFIG, checkpoint, '--work-dir', tmp_path / 'test', '--show-dir', 'pictures']
    done = run(*test, '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / 'test').glob('*/[0-9]*.json')
    assert json.loads(result.read_text())['coco/bbox_mAP_50'] == pytest.approx(lines[-1]['coco/bbox_mAP_50'], abs=1e-3)
    assert len(list((tmp_path / 'test').rglob('pictures/*.jpg'))) == 4
