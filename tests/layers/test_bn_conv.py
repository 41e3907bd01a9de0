"""BNConv against the formula."""

import pytest
import torch
from torch import nn

from bnet_mm import BNET, BNConv
from helpers import reference
from helpers.norms import DOUBLE, make


@pytest.mark.parametrize('training', [True, False])
def test_bn_conv_equals_the_formula(training):
    layer = make(BNConv(4, k=5), training)
    x = torch.randn(3, 4, 7, 6, **DOUBLE) * 2 + 1
    norm = layer.norm
    mean, var = reference.batch_statistics(x) if training else (norm.running_mean, norm.running_var)
    y = reference.bnet(x, norm.weight.reshape(-1, 1, 1, 1), norm.bias, mean, var)
    want = reference.depthwise(y.clamp(min=0), layer.conv.weight, torch.zeros(4, **DOUBLE))
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    twin = BNConv(4, k=5).double().train(training)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x))


def test_bn_conv_reads_a_bn_checkpoint_and_costs_what_bnet_costs():
    bn = reference.randomise(nn.BatchNorm2d(4))
    layer = BNConv(4, k=3)
    report = layer.load_state_dict(bn.state_dict(), strict=False)
    assert report.missing_keys == ['conv.weight'] and not report.unexpected_keys
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.norm.eval()(x), bn.eval()(x))
    count = [sum(p.numel() for p in m.parameters()) for m in (layer, BNET(4, k=3))]
    assert count[0] == 4 * 2 + 4 * 9 and count[1] == 4 + 4 * 9
    with pytest.raises(ValueError, match='BNConv: k must be a positive odd integer, got 2'):
        BNConv(4, k=2)
    with pytest.raises(ValueError, match='BNConv: num_features must be'):
        BNConv(0)
