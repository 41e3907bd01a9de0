"""The configs with imported types say what the classic ones of the same name say, and build the same model."""

import importlib
import inspect
from contextlib import nullcontext

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.utils import get_object_from_string

from bnet_mm import BNET
from bnet_mm.cli import OTHER_KEYS, UserError
from bnet_mm.engine.options import check_pretrained
from bnet_mm.engine.runner import build_model
from bnet_mm.host.configs import find_config
from bnet_mm.visualization.page import norm_of
from helpers.configs import CONFIGS, NEW_STYLE, load, scope
from helpers.paths import REPO

READ = {*inspect.signature(Runner.__init__).parameters, *OTHER_KEYS}  # what somebody reads; the rest are variables


def load_new(name):
    load(name)  # the host's models, or skip
    return Config.fromfile(REPO / f'configs/new_style/{name}.py')


def meant(name, library):
    """Everything that this library has under a name, but functions, whose registry is broken in mmaction."""
    registries = vars(importlib.import_module(f'{library}.registry')).values()
    return [one.get(name) for one in registries if isinstance(one, Registry) and one.name != 'function']


def differences(new, classic, library, where=''):
    """Where two parts of configs differ, by their keys."""
    if isinstance(new, dict) and isinstance(classic, dict):
        for key in (new.keys() | classic.keys()) - {'_scope_'}:
            if key not in new or key not in classic:
                yield f'{where}.{key} is in one only'
            else:
                yield from differences(new[key], classic[key], library, f'{where}.{key}')
    elif isinstance(new, (list, tuple)) and isinstance(classic, (list, tuple)) and len(new) == len(classic):
        for i, pair in enumerate(zip(new, classic)):
            yield from differences(*pair, library, f'{where}.{i}')
    elif where.endswith(('.type', '.base')) and '.' in new:
        if get_object_from_string(new) not in meant(classic, library):
            yield f'{where} is {new}, not {classic}'
    elif new != classic:
        yield f'{where} is {new!r}, not {classic!r}'


def parts(cfg):
    return {key: value for key, value in cfg.to_dict().items() if key in READ}


def test_one_of_each_library():
    assert set(NEW_STYLE) < set(CONFIGS)
    assert {scope(name) for name in NEW_STYLE if 'bnet' in name} == {'mmdet', 'mmseg', 'mmaction', 'mmpretrain'}
    assert find_config('bnet_mm::new_style/tsn_r50_bnet3_ucf101.py').endswith('/new_style/tsn_r50_bnet3_ucf101.py')


@pytest.mark.parametrize('name', NEW_STYLE)
def test_they_say_the_same(name, monkeypatch):
    monkeypatch.delenv('BNET_CHECKPOINTS', raising=False)
    new, classic = load_new(name), load(name)
    assert list(differences(parts(new), parts(classic), scope(name))) == []
    assert callable(new.model.backbone.type) and callable(new.train_dataloader.dataset.type)


def test_a_difference_is_found():
    new, classic = load_new('resnet50_bnet3_imagenet'), load('resnet50_bnet3_imagenet')
    new.model.backbone.bnet.k = 5
    new.train_dataloader.sampler.type = 'torch.optim.SGD'
    found = [text.split(' is ')[0] for text in differences(parts(new), parts(classic), 'mmpretrain')]
    assert sorted(found) == ['.model.backbone.bnet.k', '.train_dataloader.sampler.type']


def modules(model):
    return [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]


@pytest.mark.parametrize('name', [name for name in NEW_STYLE if 'bnet' in name])
def test_they_build_the_same(name, tmp_path):
    """Also from what mmengine writes into the work dir."""
    new = load_new(name)
    new.dump(tmp_path / 'dumped.py')
    models = []
    for cfg in (new, Config.fromfile(tmp_path / 'dumped.py'), Config.fromfile(REPO / f'configs/{name}.py')):
        torch.manual_seed(0)
        models.append(build_model(cfg))
    *others, classic = models
    layers = [layer for layer in classic.modules() if isinstance(layer, BNET)]
    assert len(layers) == 16
    for model in others:
        assert modules(model) == modules(classic)
        torch.testing.assert_close(model.state_dict(), classic.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('name, norm, missing', [
    ('faster_rcnn_r50_bnet5_1x', 'BNET-5 at C', 'R50_BNET-5.pth'), ('faster_rcnn_r50_bn_1x', 'BatchNorm2d', ''),
    ('tsn_r50_bnet3_ucf101', 'BNET-3 at C', 'R50_BNET-3.pth'), ('pspnet_r50_bn_40k_cityscapes', 'SyncBatchNorm', ''),
])  # fmt: skip
def test_what_our_tools_see_in_them(name, norm, missing, tmp_path, monkeypatch):
    """By the class itself, and by its path in what mmengine writes into the work dir."""
    monkeypatch.setenv('BNET_CHECKPOINTS', str(tmp_path))
    cfg = load_new(name)
    cfg.dump(tmp_path / 'dumped.py')
    for one in (cfg, Config.fromfile(tmp_path / 'dumped.py')):
        assert norm_of(one) == norm
        with pytest.raises(UserError, match=f'{tmp_path}/{missing}: does not exist') if missing else nullcontext():
            check_pretrained(one.model)
