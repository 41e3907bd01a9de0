import cv2
import numpy as np
import pytest
import torch
from mmengine.utils import is_installed

from bnet_mm.cli import common_arguments, load_config
from bnet_mm.engine.runner import build_model
from bnet_mm.layers import BNET
from bnet_mm.surgery.config import dicts_in
from helpers.tools import run, train


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    done = run('tools/make_toy_data.py', 'coco', folder, '--train', 16, '--val', 6, '--size', 96)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """A work dir after one epoch."""
    pytest.importorskip('mmdet')
    work_dir = tmp_path_factory.mktemp('work') / 'train'
    done = train(shapes, work_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return work_dir


@pytest.fixture(scope='session')
def with_taps(shapes, tmp_path_factory):
    """A function of a config and options: a checkpoint of its model whose taps are random, without any training."""

    def checkpoint(config, *options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('DATA_ROOT', str(shapes))
            cfg = load_config(
                common_arguments('').parse_args([str(config), *(['--cfg-options', *options] if options else [])])
            )
        torch.manual_seed(0)
        model = build_model(cfg)
        for module in model.modules():
            if isinstance(module, BNET):
                torch.nn.init.normal_(module.bnconv.weight, std=0.2)
        path = tmp_path_factory.mktemp('taps') / 'random.pth'
        meta = next((node['metainfo'] for _, node in dicts_in(cfg.to_dict()) if 'metainfo' in node), {})
        torch.save(dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict()), path)
        return path

    return checkpoint


@pytest.fixture
def segmentation(tmp_path):
    """Data and config of a PSPNet with BNET in its backbone; of the norms elsewhere, the type is an argument."""
    if not is_installed('mmsegmentation'):
        pytest.skip('mmengine finds mmseg:: configs only under the distribution name mmsegmentation')
    pytest.importorskip('mmcv.ops', reason='mmseg cannot be imported beside mmcv-lite, which has no operators')
    generator = np.random.default_rng(0)
    for folder, high, shape in (('images', 256, (32, 32, 3)), ('masks', 2, (32, 32))):
        (tmp_path / folder).mkdir()
        for i in range(4):
            cv2.imwrite(str(tmp_path / folder / f'{i}.png'), generator.integers(0, high, shape).astype(np.uint8))

    def config(norm):
        (tmp_path / 'psp.py').write_text(f"""
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)
norm = dict(type='{norm}')
head = dict(num_classes=2, norm_cfg=norm)
model = dict(
    pretrained=None, data_preprocessor=dict(size=(32, 32)), decode_head=head, auxiliary_head=head,
    backbone=dict(type='WithBNET', base='ResNetV1c', bnet=dict(k=3), norm_cfg=norm),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='Resize', scale=(32, 32)),
            dict(type='PackSegInputs')]
loader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        _delete_=True, type='BaseSegDataset', data_root='{tmp_path}', img_suffix='.png', seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='masks'), pipeline=pipeline,
        metainfo=dict(classes=('a', 'b'), palette=[[0, 0, 0], [255, 0, 0]]),
    ),
)
train_dataloader = val_dataloader = test_dataloader = loader
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
""")
        return tmp_path / 'psp.py'

    return config
