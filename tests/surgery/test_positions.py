"""Where BNET sits: names, parameter counts, costs and functions of mmdet's ResNet and ResNeXt."""

import copy

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import bnet_mm
from bnet_mm import BNET
from bnet_mm.surgery.positions import norm_names
from helpers import reference
from helpers.nets import BLOCKS_50, backbone, bnet_names
from helpers.paths import REPO

pytestmark = pytest.mark.usefixtures('mmdet_scope')


BLOCKS_18 = [f'layer{i}.{j}' for i in range(1, 5) for j in range(2)]


@pytest.mark.parametrize('kind', ['ResNet', 'ResNeXt'])
@pytest.mark.parametrize('where', ['A', 'B', 'C', 'AC', 'CBA'])
def test_positions_of_bottlenecks(kind, where):
    extra = dict(groups=32, base_width=4) if kind == 'ResNeXt' else {}
    model = backbone(kind, dict(k=3, where=where), **extra)
    want = {f'{block}.bn{"ABC".index(letter) + 1}' for block in BLOCKS_50 for letter in where}
    assert bnet_names(model) == want
    plain = backbone(kind, **extra)
    assert type(model) is type(plain)
    changed = {name for name in want for name in (name, f'{name}.norm', f'{name}.bnconv')}
    assert {n for n, _ in model.named_modules()} - changed == {n for n, _ in plain.named_modules()} - want


def test_positions_of_basic_blocks_and_everywhere():
    assert bnet_names(backbone(bnet=dict(k=3), depth=18)) == {f'{block}.bn2' for block in BLOCKS_18}
    assert bnet_names(backbone(bnet=dict(k=3, where='A'), depth=18)) == {f'{block}.bn1' for block in BLOCKS_18}
    plain = backbone()
    everywhere = {name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert bnet_names(backbone(bnet=dict(k=3, where='all'))) == everywhere and len(everywhere) == 53


@pytest.mark.parametrize('where', ['C', 'ABC', 'all'])
@pytest.mark.parametrize('depth', [18, 50])
def test_enhancing_keeps_the_function(where, depth):
    """In eval and in training mode, with the gradients of all other parameters; against an untouched copy."""
    plain = reference.randomise(backbone(depth=depth, base_channels=8, stem_channels=8)).double()
    model = copy.deepcopy(plain)
    plain.layer2[0].bn1.requires_grad_(False)
    model.layer2[0].bn1.requires_grad_(False)
    report = bnet_mm.enhance(model, k=5, where=where)
    assert set(report.changed) == bnet_names(model)
    x = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    for mode in (True, False):
        plain.train(mode), model.train(mode)
        for got, want in zip(model(x), plain(x)):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * want.abs().max().item())
    if where == 'all':
        assert not any(p.requires_grad for p in model.layer2[0].bn1.parameters())
    sum(y.square().mean() for y in model(x)).backward()
    sum(y.square().mean() for y in plain(x)).backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in gradients and parameter.requires_grad:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-6, atol=1e-12)


def test_trainable_parameters_of_faster_rcnn_equal_the_printed_ones():
    """Table 5, in millions; stem and stage 1 are frozen."""
    printed = dict(bn=41.5, bnet3=41.6, bnet5=41.9, bnet7=42.2)
    trainable = {}
    for norm in printed:
        cfg = Config.fromfile(f'{REPO}/configs/faster_rcnn_r50_{norm}_1x.py').model
        model = MODELS.build(cfg)
        trainable[norm] = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert {norm: round(value, 1) for norm, value in trainable.items()} == printed


def test_trainable_parameters_of_resnet_101_equal_the_printed_ones():
    """Table 5, in millions."""
    for norm, printed in dict(bn=60.5, bnet3=60.8, bnet5=61.3).items():
        model = MODELS.build(Config.fromfile(f'{REPO}/configs/faster_rcnn_r101_{norm}_1x.py').model)
        assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == printed


@pytest.mark.parametrize('depth, added', [(50, {3: 0.121, 5: 0.362, 7: 0.725}), (101, {3: 0.260, 5: 0.780})])
def test_added_parameters_of_the_backbone(depth, added):
    plain = sum(p.numel() for p in backbone(depth=depth).parameters())
    for k, want in added.items():
        got = sum(p.numel() for p in backbone(depth=depth, bnet=dict(k=k)).parameters()) - plain
        assert round(got / 1e6, 3) == want


def convolution_gflops(model):
    """Multiply-adds of all convolutions at 1280 x 800, by mmengine's counter."""
    analyzer = FlopAnalyzer(model.eval() or model, torch.zeros(1, 3, 800, 1280))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analyzer.by_operator()['conv'] / 1e9


def test_gflops_at_1280x800_rise_by_the_printed_amount():
    """0.11264 k^2 multiply-adds; with the 207.07 of the BN detector this is Table 5."""
    plain = convolution_gflops(backbone())
    for k, printed in {3: 208.1, 5: 209.9, 7: 212.6}.items():
        rise = convolution_gflops(backbone(bnet=dict(k=k))) - plain
        assert rise == pytest.approx(0.11264 * k * k, rel=1e-9)
        assert round(207.07 + rise, 1) == printed


def test_everywhere_leaves_alone_what_is_no_2d_batch_norm():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        dict(bnet=BNET(4, k=5), flat=nn.BatchNorm1d(4), one=nn.Sequential(shared), two=nn.Sequential(shared))
    )
    report = bnet_mm.enhance(model, k=3, where='all')
    assert list(report.changed) == ['one.0', 'two.0'] and model['one'][0] is model['two'][0]
    assert report.kept == dict(bnet='BNET already', flat='BatchNorm1d is no norm that BNET can hold')
    assert isinstance(model['bnet'].norm, nn.BatchNorm2d) and isinstance(model['flat'], nn.BatchNorm1d)


def test_nothing_to_replace_is_an_error():
    with pytest.raises(ValueError, match="no norm to replace at where='B' in ResNet"):
        backbone(bnet=dict(where='B'), depth=18)
    with pytest.raises(ValueError, match='BNET already'):
        bnet_mm.enhance(backbone(bnet=dict(k=3)), k=5)


def test_a_block_without_a_first_pair_has_no_positions():
    """Whatever else it has: bn2 after conv2 alone says nothing of A, B and C."""
    block = nn.Module()
    block.conv2, block.bn2, block.bn3 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    assert norm_names(block) == {}
    block.conv1, block.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    assert norm_names(block) == dict(A=['bn1'], C=['bn2'])
