"""Every config trains one step and is evaluated, by the runner of tools/train.py and on toy data (all: -m configs)."""

import argparse
import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from bnet_mm.cli import load_config
from bnet_mm.engine.runner import build_model, build_runner
from helpers.configs import CONFIGS, NEW_STYLE, scope
from helpers.hosts import import_host_models
from helpers.paths import REPO
from helpers.tools import call_tool

FAST = (
    'bireal18_bnet3_imagenet', 'deeplabv3_r101_bnet3_voc12aug', 'faster_rcnn_r50_bnet5_2x', 'mask_rcnn_r50_cbn_1x',
    'mobilenetv2_w025_bnet3_imagenet', 'pspnet_r50_bnet3_40k_cityscapes', 'resnest50_bnet3_imagenette',
    'resnet50v2_sn_120e_imagenet', 'retinanet_r101_bnet5_1x', 'tsn_r50_bnet3_ucf101',
)  # fmt: skip
DOWNLOADS = {  # the name in the configs: the file that torch would keep, and a config whose backbone is the same
    'torchvision://resnet50': ('resnet50-0676ba61.pth', 'resnet50_bn_imagenet'),
    'torchvision://resnet101': ('resnet101-63fe2227.pth', 'resnet101_bn_imagenet'),
    'https://download.pytorch.org/models/resnet50-11ad3fa6.pth': ('resnet50-11ad3fa6.pth', 'resnet50_bn_imagenet'),
    'open-mmlab://resnext101_32x4d': ('resnext101_32x4d-a5af3160.pth', 'resnext101_bn_imagenet'),
}
SHARE = dict(mmdet=1 / 8, mmseg=1 / 8, mmaction=2 / 7, mmpretrain=2 / 7)  # of the sizes in the configs: 224 -> 64
SIZES = ('scale', 'size', 'crop_size', 'input_size')
METRICS = dict(mmdet='coco/bbox_mAP', mmseg='mIoU', mmaction='acc/top1', mmpretrain='accuracy/top1')
FROZEN = re.compile(r'backbone\.((conv1|bn1|layer1)\.|.*(running_mean|running_var|num_batches_tracked)$)')  # detectors


def read(name):
    import_host_models(scope(name))
    options = dict(cfg_options={}, work_dir=f'work/{name}', launcher='none', local_rank=0)
    return load_config(argparse.Namespace(config=str(REPO / f'configs/{name}.py'), **options))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the data sets where the configs look for them."""
    coco = pytest.importorskip('mmdet.datasets').CocoDataset.METAINFO['classes']
    root = tmp_path_factory.mktemp('configs')
    for layout in ('coco', 'cityscapes', 'voc', 'ucf101', 'imagenet'):
        count = dict(voc=3).get(layout, 2)  # one batch; of VOC's, some are in each list
        options = ('--size', 96, '--train', count, '--val', 2)
        assert call_tool('make_toy_data', layout, root / 'data' / layout, *options) is None
    (root / 'data/voc/VOCdevkit').rename(root / 'data/VOCdevkit')
    (root / 'data/imagenette2').symlink_to('imagenet')
    for path in root.glob('data/coco/annotations/*.json'):  # the three shapes are the first three of COCO's classes
        annotations = json.loads(path.read_text())
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(coco, 1)]
        path.write_text(json.dumps(annotations))
    yield root
    shutil.rmtree(root)  # with the pretrained files it is large


def provide_pretrained(root, backbone):
    """Write the pretrained file that a backbone reads, made as configs/README.md says; its tensors, in their order."""
    init = backbone.get('init_cfg') or {}
    source = backbone.get('pretrained') or init.get('checkpoint')
    if source is None:
        return None
    made_by = re.sub(r'R(\d+)_BNET-(\d)', r'resnet\1_bnet\2_imagenet', Path(source).stem)
    path = root / source
    if source in DOWNLOADS:
        file, made_by = DOWNLOADS[source]
        path = root / 'hub/checkpoints' / file
    if not path.exists():
        model = build_model(read(made_by))
        model.init_weights()
        open_branches(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=(model if 'prefix' in init else model.backbone).state_dict()), path)
    state = torch.load(path, weights_only=True)['state_dict']
    return [value for key, value in state.items() if not key.startswith('head.')]


def open_branches(model):
    """Residual branches start with a norm of zeros, which lets no gradient through."""
    for name, p in model.named_parameters():
        if name.endswith('weight') and not p.any():
            nn.init.constant_(p, 0.3 / p[0].numel())


def reduce(cfg):
    """One step on two images of a fraction of the size; everything else stays as the config says."""
    share = 1 / 2 if 'demo' in cfg.work_dir else SHARE[cfg.default_scope]
    for part in ('train_dataloader', 'val_dataloader'):
        cfg[part].update(batch_size=min(2, cfg[part].batch_size), num_workers=0, persistent_workers=False)
        shrink(cfg[part].dataset, share)
    shrink(cfg.model.get('data_preprocessor', {}), share)
    if 'times' in cfg.train_dataloader.dataset:
        cfg.train_dataloader.dataset.times = 1
    cfg.train_cfg.update({'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs': 1, 'val_interval': 1})
    cfg.update(log_level='ERROR', randomness=dict(seed=0))
    cfg.default_hooks.checkpoint = None
    if cfg.default_scope == 'mmdet':
        test_cfg = cfg.model.test_cfg
        test_cfg.get('rcnn', test_cfg).score_thr = 0  # after one step no score is high
        if 'rpn' in test_cfg:
            cfg.model.train_cfg.rpn.sampler.num = 10000  # all, or not every level is in the loss
            cfg.model.train_cfg.rcnn.sampler.num = 32
            cfg.model.train_cfg.rpn_proposal.max_per_img = test_cfg.rpn.max_per_img = 50


def shrink(node, share):
    """Multiply all sizes in a part of a config."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in SIZES:
                node[key] = scaled(value, share)
            else:
                shrink(value, share)
    elif isinstance(node, list):
        for child in node:
            shrink(child, share)


def scaled(size, share):
    if isinstance(size, (list, tuple)):
        return type(size)(scaled(one, share) for one in size)
    return round(size * share) if size > 0 else size


class Watch(Hook):
    """Records a training, whose steps it makes large enough to see every gradient, and free of weight decay."""

    def before_train(self, runner):
        self.started = [value.clone() for value in runner.model.backbone.state_dict().values()]
        open_branches(runner.model)
        self.before = copy.deepcopy(runner.model.state_dict())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        lr = 0.1 if isinstance(runner.optim_wrapper.optimizer, torch.optim.SGD) else 1e-3
        for group in runner.optim_wrapper.param_groups:
            group.update(lr=lr, weight_decay=0)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.loss = float(outputs['loss'])

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics
        self.after = runner.model.state_dict()


NAMES = [*CONFIGS, *(f'new_style/{name}' for name in NEW_STYLE)]


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n in FAST else pytest.mark.configs) for n in NAMES])
def test_config_trains_and_is_evaluated(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    monkeypatch.setenv('TORCH_HOME', str(folder))
    monkeypatch.setenv('DATA_ROOT', 'data/coco')  # for the demo
    monkeypatch.delenv('BNET_CHECKPOINTS', raising=False)
    cfg = read(name)
    pretrained = provide_pretrained(folder, cfg.model.backbone)
    reduce(cfg)
    runner = build_runner(cfg, strict_loading=False)
    watch = Watch()
    runner.register_hook(watch)
    runner.train()

    if pretrained is not None:
        assert len(pretrained) == len(watch.started) and all(map(torch.equal, watch.started, pretrained))
    assert math.isfinite(watch.loss) and all(value.isfinite().all() for value in watch.after.values())
    unmoved = {key for key, value in watch.after.items() if torch.equal(value, watch.before[key])}
    unmoved -= {key for key in unmoved if key.endswith('_extra_state')}  # CBN's history, empty during burn-in
    frozen = cfg.default_scope == 'mmdet' and 'demo' not in name
    assert unmoved == {key for key in watch.after if frozen and FROZEN.match(key)}
    metrics = [METRICS[cfg.default_scope]] + ['coco/segm_mAP'] * name.startswith('mask')
    assert all(0 <= watch.metrics[metric] <= 100 for metric in metrics)
