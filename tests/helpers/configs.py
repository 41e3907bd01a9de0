"""The configs, their models and their schedules."""

import functools

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from torch import nn

import bnet_mm
from bnet_mm import BNET, CBN
from helpers.hosts import import_host_models
from helpers.paths import REPO

CONFIGS = sorted(path.stem for path in REPO.glob('configs/*.py'))
NEW_STYLE = sorted(path.stem for path in REPO.glob('configs/new_style/*.py'))
IMAGENET = [name for name in CONFIGS if name.endswith(('_imagenet', '_imagenette'))]
DENSE = [name for name in CONFIGS if name not in IMAGENET and 'demo' not in name]  # tools/ has tests of the demo
R18, R50, R101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, bnet_mm.layers.SN2d, CBN, bnet_mm.BNConv)


def scope(name):
    """The library of a config."""
    name = name.rpartition('/')[2]
    if name in IMAGENET:
        return 'mmpretrain'
    return dict(pspnet='mmseg', deeplabv3='mmseg', tsn='mmaction').get(name.split('_')[0], 'mmdet')


@functools.lru_cache(None)
def load(name):
    import_host_models(scope(name))
    return Config.fromfile(REPO / f'configs/{name}.py')


def blocks(norm, stages=R50, first=1):
    """Names of one norm in all blocks."""
    return [f'backbone.layer{i}.{j}.{norm}' for i, count in enumerate(stages, first) for j in range(count)]


def norm_kind(norm):
    """The name of a norm's type; hosts and BNET have types of their own for some, of the same name."""
    return type(norm).__name__.removeprefix('AffineFree')


def norms_beside_bnet(model):
    """Names and kinds of the norms that are neither BNET nor inside of one."""
    inside = tuple(f'{name}.' for name, layer in model.named_modules() if isinstance(layer, (BNET, bnet_mm.BNConv)))
    return {
        name: norm_kind(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, NORMS) and not name.startswith(inside or '/')
    }


def learning_rates(cfg, epoch_length=200):
    """The rate of every iteration, by the config's own schedulers."""
    optimizer = OPTIMIZERS.build(dict(cfg.optim_wrapper.optimizer, params=[nn.Parameter(torch.zeros(1))]))
    schedulers = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    by_iteration, by_epoch = [], []
    for options in map(dict, schedulers):
        options.pop('_scope_', None)
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            by_iteration.append(kind.build_iter_from_epoch(optimizer, **options, epoch_length=epoch_length))
        else:
            (by_epoch if options.get('by_epoch', True) else by_iteration).append(kind(optimizer, **options))
    rates = []
    total = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs * epoch_length
    for iteration in range(1, total + 1):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()  # what torch wants to see before a scheduler steps
        for scheduler in by_iteration + (by_epoch if iteration % epoch_length == 0 else []):
            scheduler.step()
    return rates
