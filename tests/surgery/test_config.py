"""WithBNET."""

import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from bnet_mm import BNConv
from bnet_mm.surgery.config import config_text, inherited_names
from helpers import reference
from helpers.nets import BLOCKS_50, backbone, bnet_names, build
from helpers.paths import REPO


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_bn_conv_and_frelu_through_with_bnet(scope):
    """BNConv at C keeps the BN; FReLU replaces all activations of stages 1 to 3, in the order of their calls."""
    cfg = dict(type='ResNet', depth=50, base_channels=8, stem_channels=8)
    if scope == 'mmpretrain':
        cfg = dict(type='ResNet', depth=50)
    plain = build(scope, cfg)
    conv = build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': dict(type='BNConv', k=3, where='C')})
    layers = {name: m for name, m in conv.named_modules() if isinstance(m, BNConv)}
    assert len(layers) == 16 and all(name.endswith('bn3') for name in layers)
    report = conv.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys and all(name.endswith('bn3.conv.weight') for name in report.missing_keys)

    model = build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': None, 'frelu': True})
    reference.randomise(model)
    block = model.layer2[1]
    model.eval()
    assert len(model.layer1[0].relu) == 3 and isinstance(model.layer4[0].relu, nn.ReLU) and not bnet_names(model)
    first, second, third = block.relu
    x = torch.randn(2, block.conv1.in_channels, 6, 5)
    y = second(block.norm2(block.conv2(first(block.norm1(block.conv1(x))))))
    want = third(block.norm3(block.conv3(y)) + x)
    for _ in range(2):
        torch.testing.assert_close(block(x), want)
    twin = pickle.loads(pickle.dumps(block))
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(ValueError, match="bnet.type must be 'BNET' or 'BNConv', got 'GN'"):
        build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': dict(type='GN')})


@pytest.mark.usefixtures('mmdet_scope')
def test_dilation():
    layer = backbone(bnet=dict(k=3, dilation=2)).layer1[0].bn3
    assert (layer.bnconv.k, layer.bnconv.dilation[0]) == (3, 2)


@pytest.mark.usefixtures('mmdet_scope')
@pytest.mark.parametrize('bnet, message', [
    (dict(where='D'), "no norm to replace at where='D' in ResNet, whose norms are bn1, layer1.0.bn1"),
    (dict(where=''), "where must be letters of 'ABC'"),
    (dict(where='('), "where='\\(' is no regular expression"),
    (dict(where=3), 'where must be'),
    (dict(kernel_size=3), 'bnet takes k, where, dilation and fuse, got kernel_size'),
    (dict(k=4), 'k must be a positive odd integer, got 4'),
])  # fmt: skip
def test_bad_options_are_named(bnet, message):
    with pytest.raises(ValueError, match=message):
        backbone(bnet=bnet)


@pytest.mark.usefixtures('mmdet_scope')
def test_cfg_options_set_k_and_where():
    cfg = Config.fromfile(f'{REPO}/configs/faster_rcnn_r50_bnet5_1x.py')
    cfg.merge_from_dict({'model.backbone.bnet.k': 7, 'model.backbone.bnet.where': 'AB'})
    model = MODELS.build(cfg.model.backbone)
    assert bnet_names(model) == {f'{block}.bn{i}' for block in BLOCKS_50 for i in (1, 2)}
    assert model.layer1[0].bn1.bnconv.k == 7


@pytest.mark.parametrize('bnet, written', [
    (dict(k=5, where='AC', dilation=1), "bnet=dict(k=5, where='AC'))"),
    (dict(k=3, where='C', dilation=2), "bnet=dict(k=3, where='C', dilation=2))"),
])  # fmt: skip
def test_text_of_a_config(bnet, written):
    cfg = Config(dict(model=dict(type='FCOS'), work_dir='runs/old/', custom_imports=dict(imports='mine')))
    assert config_text(cfg, 'my config', './old.py', bnet, 'new', 'new.pth').splitlines() == [
        f'# my config with BNET-{bnet["k"]} at {bnet["where"]!r}.',
        "_base_ = './old.py'",
        "custom_imports = dict(imports=['mine', 'bnet_mm'])",
        f"model = dict(type='WithBNET', base='FCOS', {written}",
        "work_dir = 'runs/new'",
        "load_from = '{{ fileDirname }}/new.pth'",
    ]


def test_text_of_a_config_without_imports():
    lines = config_text(Config(dict(model=dict(type='FCOS'))), 'a', './a.py', dict(k=3, where='C', dilation=1), 'b')
    assert "custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)" in lines.splitlines()
    assert 'work_dir' not in lines and 'load_from' not in lines


def test_what_names_a_run():
    """load_from, resume, and names of the visualizer's backends; its own name is seen by nobody, its folder is."""
    backends = [dict(type='LocalVisBackend', save_dir='a'), dict(type='WandbVisBackend', init_kwargs=dict(project='p'))]
    visualizer = dict(type='DetLocalVisualizer', name='visualizer', save_dir='runs', vis_backends=backends)
    assert inherited_names(Config(dict(load_from='x.pth', resume=False, visualizer=visualizer))) == {
        'load_from': 'x.pth',
        'visualizer.save_dir': 'runs',
        'visualizer.vis_backends.0.save_dir': 'a',
        'visualizer.vis_backends.1.init_kwargs.project': 'p',
    }
    assert inherited_names(Config(dict(load_from=None))) == {}
