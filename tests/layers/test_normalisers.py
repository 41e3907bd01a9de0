"""BNET over GN, IN, SN and the synchronised norms."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import bnet_mm
from bnet_mm import BNET, BNConv, SN2d, SyncSN
from helpers import reference
from helpers.norms import DOUBLE, make

GN = dict(type='GN', num_groups=3)


def plain_norm(layer):
    """The norm with an affine that a BNET of six channels holds."""
    if isinstance(layer.norm, nn.modules.batchnorm._BatchNorm) and type(layer.norm) is not bnet_mm.CBN:
        return nn.BatchNorm2d(6)
    if isinstance(layer.norm, nn.InstanceNorm2d):
        return nn.InstanceNorm2d(6, affine=True)
    return nn.GroupNorm(3, 6) if isinstance(layer.norm, nn.GroupNorm) else type(layer.norm)(6)


def normalised(norm, x, training):
    """x_hat of each normaliser by the references."""
    if isinstance(norm, nn.GroupNorm):
        return reference.group_norm(x, norm.num_groups, norm.eps)
    if isinstance(norm, nn.InstanceNorm2d):
        return reference.group_norm(x, x.shape[1], norm.eps)
    running = None if training or not norm.using_bn else (norm.bn.running_mean, norm.bn.running_var)
    return reference.switchable_norm(x, norm.mean_weight, norm.var_weight, running, norm.eps)[0]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('norm', [GN, 'IN', 'SN', dict(type='SN', using_bn=False, eps=1e-3), 'SyncSN'], ids=str)
@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 1), (5, 2)])
def test_enhanced_norm_equals_the_formula(norm, k, dilation, training):
    layer = make(BNET(6, k=k, dilation=dilation, norm=norm), training)
    x = torch.randn(3, 6, 7, 5, **DOUBLE) * 2 + 1
    x_hat = normalised(layer.norm, x, training and layer.norm.training)
    want = reference.depthwise(x_hat, layer.bnconv.weight, layer.bnconv.bias, dilation)
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('norm', [GN, 'IN', 'SN'], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_enhanced_norm_gradcheck(norm, training):
    layer = make(BNET(3, k=3, norm=norm), training)
    names, parameters = zip(*layer.named_parameters())
    x = torch.randn(2, 3, 3, 4, requires_grad=True, **DOUBLE)

    def function(x, *values):
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize('norm', ['BN', 'SyncBN', GN, 'IN', 'SN', 'SyncSN', 'CBN'], ids=str)
def test_enhanced_norm_starts_as_the_norm(norm):
    """A fresh BNET over a norm equals the fresh norm with its affine, and from_norm keeps any norm's function."""
    layer = BNET(6, k=5, norm=norm)
    plain = make(plain_norm(layer)).float()
    x = torch.randn(4, 6, 5, 7) * 3 + 1
    torch.testing.assert_close(layer.eval()(x), plain_norm(layer).eval()(x))
    for training in (True, False):
        untouched = copy.deepcopy(plain).train(training)
        enhanced = BNET.from_norm(plain.train(training), k=3)
        torch.testing.assert_close(enhanced(x), untouched(x), rtol=1e-5, atol=1e-5)
        for name, value in enhanced.norm.state_dict().items():
            torch.testing.assert_close(value, untouched.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)
        assert enhanced.norm.training == enhanced.training == training


@pytest.mark.parametrize('norm', [GN, 'IN', 'SN', 'SyncBN', 'SyncSN', 'CBN'], ids=str)
def test_enhanced_norm_loads_the_plain_norms_checkpoint(norm):
    layer, fresh = BNET(6, k=3, norm=norm), BNET(6, k=3, norm=norm)
    plain = make(plain_norm(layer)).float()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    fresh.load_state_dict(layer.state_dict())
    for twin in (fresh.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert type(layer.norm).__name__ in repr(layer)


@pytest.mark.parametrize('norm', [GN, 'IN', 'SN'], ids=str)
def test_enhanced_norm_in_other_layouts_and_precisions(norm):
    """channels_last changes nothing; bfloat16's error is at most 4 x that of GroupNorm and Conv2d in bfloat16."""
    layer = make(BNET(6, k=3, norm=norm))
    pair = nn.Sequential(nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 6, 3, padding=1, groups=6)).double()
    pair[1].load_state_dict(layer.bnconv.state_dict())
    x = torch.randn(3, 6, 9, 11, **DOUBLE) * 2 + 1
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))
    layer, low = layer.eval(), x.bfloat16()
    error = (layer.float()(low).double() - layer.double()(low.double())).abs().max()
    theirs = (pair.bfloat16()(low).double() - pair.double()(low.double())).abs().max()
    assert 0 < error <= 4 * theirs


def test_norms_in_norm_cfg():
    """Through mmcv's builder, with the eps and requires_grad that it handles."""
    mmcv = pytest.importorskip('mmcv.cnn')
    for cfg, kind in [
        (dict(type='BNET', k=3, norm=dict(type='GN', num_groups=2), requires_grad=False), BNET),
        (dict(type='SN', using_bn=False), SN2d),
        (dict(type='SyncSN'), SyncSN),
        (dict(type='BNConv', k=5), BNConv),
        (dict(type='CBN', buffer_num=2, burnin=1), bnet_mm.CBN),
    ]:
        module = mmcv.ConvModule(3, 4, 3, padding=1, norm_cfg=cfg)
        assert type(module.norm) is kind
        assert all(p.requires_grad != ('requires_grad' in cfg) for p in module.norm.parameters())
        assert module.eval()(torch.randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)
    assert MODELS.get('SN') is MODELS.get('SN2d') is SN2d
    assert MODELS.build(dict(type='SN3d', num_features=2))(torch.randn(2, 2, 2, 3, 3)).shape == (2, 2, 2, 3, 3)


@pytest.mark.parametrize('options, message', [
    (dict(norm='LN'), "norm must be one of BN, SyncBN, GN, .*got 'LN'"),
    (dict(norm=dict(num_groups=2)), 'norm must be one of .*got None'),
    (dict(norm='GN'), 'num_groups'),
    (dict(norm=dict(type='GN', groups=2)), "norm='GN'.*groups"),
    (dict(norm=dict(type='GN', num_groups=4)), 'divisible by num_groups'),
    (dict(norm=dict(type='BN', affine=True)), 'norm takes no affine'),
    (dict(norm=dict(type='BN', num_features=4)), 'norm takes no num_features'),
    (dict(norm=None), 'norm must be one of .*got None'),
    (dict(norm='IN', momentum=0.2), "momentum=0.2 has no meaning for norm='IN'"),
    (dict(norm='SN', track_running_stats=False), 'track_running_stats=False has no meaning'),
])  # fmt: skip
def test_bad_normaliser_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BNET(6, **options)


def test_options_of_bnet_reach_the_normaliser():
    assert BNET(6, eps=0.5, momentum=0.3, norm='SN').norm.bn.momentum == 0.3
    layer = BNET(6, eps=0.5, momentum=0.3, norm=dict(type='SyncBN', momentum=0.2, track_running_stats=False))
    assert (layer.norm.eps, layer.norm.momentum, layer.norm.running_mean) == (0.5, 0.2, None)


def test_norms_that_do_more_are_refused():
    class Loud(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    for norm in (Loud(3), nn.BatchNorm3d(3), nn.LayerNorm(3), nn.Conv2d(3, 3, 1)):
        with pytest.raises(ValueError, match=f'got {type(norm).__name__}'):
            BNET.from_norm(norm)


def test_restored_norm_joins_the_same_processes():
    """The process group of SyncBN goes into BNET and out of it again."""
    plain = nn.SyncBatchNorm(6)
    plain.process_group = group = object()
    model = nn.Sequential(nn.Conv2d(3, 6, 1), plain)
    bnet_mm.enhance(model, k=1, where='1')
    assert isinstance(model[1], BNET) and model[1].norm.process_group is group
    bnet_mm.restore(model)
    assert type(model[1]) is nn.SyncBatchNorm and model[1].process_group is group
