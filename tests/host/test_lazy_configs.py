"""New-style configs, whose types are imported: BNET, WithBNET and the rest in all four libraries."""

import argparse
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from bnet_mm import BNET
from bnet_mm.cli import load_config
from bnet_mm.register import TABLE
from bnet_mm.surgery.config import WithBNET, config_text

# What stands in the base config, as the libraries write theirs.
BASES = {
    'mmdet': '''
from mmdet.models import FPN, DetDataPreprocessor, RetinaHead, RetinaNet, ResNet
model = dict(
    type=RetinaNet, data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=ResNet, depth=18, norm_eval=False, frozen_stages=-1),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
    bbox_head=dict(type=RetinaHead, num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1))
''',
    'mmseg': '''
from mmseg.models import EncoderDecoder, FCNHead, ResNetV1c, SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss
model = dict(
    type=EncoderDecoder, data_preprocessor=dict(type=SegDataPreProcessor),
    backbone=dict(type=ResNetV1c, depth=18),
    decode_head=dict(type=FCNHead, in_channels=512, channels=16, in_index=3, num_classes=3, norm_cfg=dict(type='BN'),
                     loss_decode=dict(type=CrossEntropyLoss)), test_cfg=dict(mode='whole'))
''',
    'mmpretrain': '''
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet
model = dict(
    type=ImageClassifier, backbone=dict(type=ResNet, depth=18), neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=3, in_channels=512))
''',
    'mmaction': '''
from mmaction.models import Recognizer2D, ResNet, TSNHead
model = dict(
    type=Recognizer2D, backbone=dict(type=ResNet, depth=18, norm_eval=False),
    cls_head=dict(type=TSNHead, num_classes=3, in_channels=512))
''',
}  # fmt: skip
CHILD = """
from mmengine.config import read_base
with read_base():
    from .base import *
from mmengine.optim import OptimWrapper
from torch.optim import SGD
from bnet_mm import BNET, WithBNET
from bnet_mm.engine.hooks import FreezeTransform
default_scope = {scope!r}
model.update(dict(backbone=dict({change})))
custom_hooks = [dict(type=FreezeTransform, epoch=1)]
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
"""
CHANGES = {
    'norm_cfg': ('norm_cfg=dict(type=BNET, k=5)', 20),
    'WithBNET': ("type=WithBNET, base=model['backbone']['type'], bnet=dict(k=5, where='C')", 8),
}


@pytest.fixture
def lazy_config(tmp_path):
    """lazy_config(scope, change): the path of a config that inherits from the library's base."""

    def write(scope, change):
        pytest.importorskip(scope)
        importlib.import_module('bnet_mm.host.compat')
        importlib.import_module(f'{scope}.models')
        (tmp_path / 'base.py').write_text(BASES[scope])
        (tmp_path / 'child.py').write_text(CHILD.format(scope=scope, change=change))
        return tmp_path / 'child.py'

    return write


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('scope', BASES)
def test_types_that_are_imported(lazy_config, tmp_path, scope, change):
    text, count = CHANGES[change]
    cfg = Config.fromfile(lazy_config(scope, text))
    cfg.dump(tmp_path / 'dumped.py')
    for one in (cfg, Config.fromfile(tmp_path / 'dumped.py')):  # as the work dir has it
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(one.model)
        layers = [module for module in model.backbone.modules() if isinstance(module, BNET)]
        assert len(layers) == count + 2 * (scope == 'mmseg' and change == 'norm_cfg')  # the deep stem
        assert all(layer.bnconv.k == 5 for layer in layers)
        model.backbone(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('scope', BASES)
def test_our_tools_read_them(lazy_config, tmp_path, scope):
    path = lazy_config(scope, CHANGES['WithBNET'][0])
    args = argparse.Namespace(
        config=str(path), work_dir=None, launcher='none', local_rank=0, cfg_options={'model.backbone.bnet.k': 7}
    )
    cfg = load_config(args)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
    assert {module.bnconv.k for module in model.modules() if isinstance(module, BNET)} == {7}
    (tmp_path / 'child2.py').write_text(path.read_text().replace("dict(k=5, where='C')", "dict(k=5, were='C')"))
    with DefaultScope.overwrite_default_scope(scope):
        with pytest.raises(Exception, match='bnet takes k, where, dilation and fuse, got were'):
            MODELS.build(Config.fromfile(tmp_path / 'child2.py').model)


def test_the_converter_says_what_to_write_instead(lazy_config, tmp_path):
    path = lazy_config('mmdet', 'depth=18')
    with pytest.raises(ValueError, match='^child.py is a new-style config') as caught:
        config_text(Config.fromfile(path), 'child.py', './child.py', dict(k=3, where='C', dilation=1), 'new')
    _, read_base, _, imports, _, change, _ = str(caught.value).split('`')
    lines = ['from mmengine.config import read_base', f'{read_base}:', '    from .base import *', imports, change]
    (tmp_path / 'written.py').write_text('\n'.join(lines))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(tmp_path / 'written.py').model)
    assert sum(isinstance(module, BNET) for module in model.modules()) == 8
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'convert_config.py'
    command = [sys.executable, str(tool), str(path), '-o', str(tmp_path / 'new.py')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / 'new.py').exists()
    assert done.stderr.splitlines()[-1].startswith(f'error: {path} is a new-style config: write one')


def test_everything_registered_can_be_imported():
    """By the name in the table, from the package that the table names; no registered thing is hidden in a registry."""
    for entry in TABLE:
        if entry.module.startswith('bnet_mm.models'):
            pytest.importorskip('mmpretrain')
            importlib.import_module('bnet_mm.host.compat')
        target = getattr(importlib.import_module(entry.module), entry.attribute or entry.name)
        assert inspect.isclass(target) or target is WithBNET
        assert entry.registry.get(entry.name) is target
