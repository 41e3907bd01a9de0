"""custom_keys that find BNET's taps by accident are logged, in all four libraries; the settings are as mmengine's."""

import importlib
import logging

import pytest
from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from torch import nn

import bnet_mm  # noqa: F401
from bnet_mm import BNET
from bnet_mm.host.paramwise import LoggingOptimWrapperConstructor, matches_by_accident

NET = dict(conv1=nn.Conv2d(3, 4, 1), bn1=BNET(4), bn2=nn.BatchNorm2d(4))


def net():
    return nn.ModuleDict(dict(backbone=nn.ModuleDict(NET)))


@pytest.mark.parametrize('keys, reached', [
    (['conv'], ['conv']), (['bn1'], []), (['bn'], []), (['backbone'], []), (['bnconv'], []), (['bn1.bnconv'], []),
    (['conv', 'bnconv'], []), (['conv', 'backbone'], []), (['nv.w'], ['nv.w']), (['norm'], []), ([], []),
    (['conv', 'bn1'], ['conv']),
])  # fmt: skip
def test_which_keys(keys, reached):
    """['conv', 'bn1']: mmengine takes the longer one, which here would give a norm the settings of 'bn1'."""
    found = matches_by_accident(net(), keys)
    assert list(found) == reached
    for names in found.values():
        assert set(names) <= {'backbone.bn1.bnconv.weight', 'backbone.bn1.bnconv.bias'}


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.INFO)  # whatever another test has left
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain', 'mmaction'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_every_library_logs(log, scope, wrapped):
    if scope != 'mmengine':
        pytest.importorskip(scope)
        importlib.import_module('bnet_mm.host.compat')
        importlib.import_module(f'{scope}.engine')
    model = net()
    holder = nn.Module()
    holder.module = model
    cfg = dict(optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0))
    cfg['paramwise_cfg'] = dict(custom_keys={'conv': dict(lr_mult=0.1)})
    with DefaultScope.overwrite_default_scope(scope):
        groups = build_optim_wrapper(holder if wrapped else model, cfg).optimizer.param_groups
    (text,) = log()
    assert "custom_keys 'conv' ({'lr_mult': 0.1}) also reaches backbone.bn1.bnconv.weight" in text
    plain = DefaultOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0)), cfg['paramwise_cfg']
    )
    wanted = plain(model).optimizer.param_groups
    assert [(g['lr'], g['weight_decay']) for g in groups] == [(g['lr'], g['weight_decay']) for g in wanted]
    assert OPTIM_WRAPPER_CONSTRUCTORS.get('DefaultOptimWrapperConstructor') is LoggingOptimWrapperConstructor


def test_silent_otherwise(log):
    for paramwise in (None, dict(custom_keys={'bnconv': dict(decay_mult=0.0)}), dict(norm_decay_mult=0.0)):
        cfg = dict(optimizer=dict(type='SGD', lr=1.0, weight_decay=1.0), paramwise_cfg=paramwise)
        build_optim_wrapper(net(), cfg)
    assert not log()
