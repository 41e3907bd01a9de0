"""What every config for detection, segmentation and recognition builds and how it trains."""

import re

import pytest
from torch import nn

from bnet_mm import BNET
from helpers.configs import DENSE, R50, R101, blocks, learning_rates, load, norm_kind, norms_beside_bnet, scope

BACKBONES = dict(r50=(53, R50), r101=(104, R101), x101=(104, R101))  # norms: stem, blocks, shortcuts
FPN, BOX_HEAD, MASK_HEAD = 8, 4, 4  # norms: a lateral and an output convolution on four levels; four convolutions each
PSP, ASPP, AUXILIARY = 4 + 1, 1 + 4 + 1, 1  # four pools and the fusion; image pool, four rates and the fusion
OUTSIDE = {  # norms outside of the backbone
    **{
        f'{method}_r50_{norm}_1x': [kind] * count
        for norm, kind in dict(syncbn='SyncBatchNorm', gn='GroupNorm', cbn='CBN').items()
        for method, count in dict(faster_rcnn=FPN + BOX_HEAD, mask_rcnn=FPN + BOX_HEAD + MASK_HEAD).items()
    },
    **{f'pspnet_r50_{norm}_40k_cityscapes': ['SyncBatchNorm'] * (PSP + AUXILIARY) for norm in ('bn', 'bnet3')},
    **{f'deeplabv3_r101_{norm}_voc12aug': ['SyncBatchNorm'] * (ASPP + AUXILIARY) for norm in ('bn', 'bnet3')},
}


@pytest.mark.parametrize('name', DENSE)
def test_norms_and_frozen_parts(build, name):
    model = build(name).train()
    library, network = scope(name), re.search('_([rx][0-9]+)_', name)[1]
    count, stages = BACKBONES[network]
    last = 'conv3.bn' if library == 'mmaction' else 'bn3'
    k = re.search(r'bnet(\d)', name)
    plain = 'SyncBatchNorm' if library == 'mmseg' else 'BatchNorm2d'
    bnets = {layer: module for layer, module in model.named_modules() if isinstance(module, BNET)}
    assert set(bnets) == set(blocks(last, stages) if k else [])
    assert all((layer.bnconv.k, norm_kind(layer.norm)) == (int(k[1]), plain) for layer in bnets.values())
    others = norms_beside_bnet(model)
    frelu = 3 * (3 + 4 + 6) if 'frelu' in name else 0  # three in each block of the stages 1 to 3
    inside = [norm for layer, norm in others.items() if layer.startswith('backbone.')]
    assert set(inside) == {plain} and len(inside) + len(bnets) == count + frelu
    outside = [norm for layer, norm in others.items() if not layer.startswith('backbone.')]
    assert outside == OUTSIDE.get(name, [])

    detector = library == 'mmdet'  # frozen: stem, stage 1, and the statistics of the backbone
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    stage_1 = {name for name, _ in model.named_parameters() if re.match(r'backbone\.(conv1|bn1|layer1)\.', name)}
    assert stage_1 and fixed == (stage_1 if detector else set())
    statistics = {layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    in_backbone = statistics & set(model.backbone.modules())
    assert len(in_backbone) == count + frelu
    assert {layer for layer in statistics if not layer.training} == (in_backbone if detector else set())


ONE_X = {0: 2e-5, 499: 0.02, 7999: 0.02, 8000: 0.002, 10999: 0.002, 11000: 2e-4, 11999: 2e-4}  # after epochs 8 and 11
TWO_X = {0: 2e-5, 499: 0.02, 15999: 0.02, 16000: 0.002, 21999: 0.002, 22000: 2e-4, 23999: 2e-4}
THREE_X = {0: 2e-5, 499: 0.02, 8999: 0.02, 9000: 0.002, 10999: 0.002, 11000: 2e-4, 11999: 2e-4}  # of three times COCO
POLY = {0: 0.01, 20000: 1e-4 + 0.0099 * 0.5**0.9, 39999: 1e-4}  # power 0.9, to mmseg's least rate
TSN = {0: 1e-3, 29999: 1e-3, 30000: 1e-4, 59999: 1e-4, 60000: 1e-5, 74999: 1e-5}
CBN_1X = {**ONE_X, 0: 0.02 / 3}  # the official code's warm-up
SCALE, CROP, SMALL = (1333, 800), (512, 1024), (224, 224)
SETTINGS = {  # images per GPU, GPUs, weight decay, training size, length of the training, rates of some iterations
    'faster_rcnn_r50_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'faster_rcnn_r101_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'faster_rcnn_x101_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'faster_rcnn_r50_frelu_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'mask_rcnn_r50_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'mask_rcnn_r101_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'retinanet_r101_bn_1x': (2, 8, 1e-4, SCALE, 12, ONE_X),
    'faster_rcnn_r50_bn_2x': (2, 8, 1e-4, [(1333, 480), (1333, 960)], 24, TWO_X),
    'faster_rcnn_r101_bn_2x': (2, 8, 1e-4, [(1333, 480), (1333, 960)], 24, TWO_X),
    'faster_rcnn_r50_bn_3x': (2, 8, 1e-4, [(1333, 640), (1333, 800)], 12, THREE_X),
    'faster_rcnn_r101_bn_3x': (2, 8, 1e-4, [(1333, 640), (1333, 800)], 12, THREE_X),
    **{
        f'{method}_r50_{norm}_1x': (4, 4, 1e-4, SCALE, 12, CBN_1X)
        for method in ('faster_rcnn', 'mask_rcnn')
        for norm in ('nonorm', 'syncbn', 'gn', 'cbn')
    },
    'pspnet_r50_bn_40k_cityscapes': (2, 8, 5e-4, CROP, 40000, POLY),
    'deeplabv3_r101_bn_voc12aug': (4, 4, 5e-4, (512, 512), 40000, POLY),
    'tsn_r50_bn_ucf101': (32, 8, 5e-4, SMALL, 75, TSN),
}


def data_set(loader):
    """The data set inside of repetitions and concatenations, and how often it is repeated."""
    data, times = loader.dataset, 1
    while 'pipeline' not in data:
        data, times = data.get('dataset') or data.datasets[0], times * data.get('times', 1)
    return data, times


@pytest.mark.parametrize('name', list(SETTINGS))
def test_dense_settings_are_the_printed_ones(name):
    images, gpus, weight_decay, size, length, rates = SETTINGS[name]
    cfg = load(name)
    assert cfg.train_dataloader.batch_size == images and cfg.auto_scale_lr.base_batch_size == images * gpus
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.momentum, optimizer.weight_decay) == ('SGD', 0.9, weight_decay)
    data, times = data_set(cfg.train_dataloader)
    assert times == (3 if '_3x' in name else 1)
    sizes = [step.get('crop_size', step.get('scale')) for step in data.pipeline]
    assert [size for size in sizes if size is not None][-1] == size
    assert cfg.train_cfg.get('max_iters', cfg.train_cfg.get('max_epochs')) == length
    found = learning_rates(cfg, 1000)
    assert len(found) == (length if length > 1000 else 1000 * length)
    assert {iteration: found[iteration] for iteration in rates} == pytest.approx(rates, rel=1e-2)


def test_dense_variants_train_as_their_baseline():
    keys = ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator')
    for name in DENSE:
        baseline = re.sub(r'bnet\d', 'bn', name)
        assert baseline in SETTINGS
        assert all(load(name).get(key) == load(baseline).get(key) for key in (*keys, 'auto_scale_lr')), name
