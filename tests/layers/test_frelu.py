"""FReLU against the formula."""

import pytest
import torch

from bnet_mm import FReLU
from helpers import reference
from helpers.norms import DOUBLE, make


@pytest.mark.parametrize('training', [True, False])
def test_frelu_equals_the_formula(training):
    layer = make(FReLU(3), training)
    x = torch.randn(2, 3, 6, 5, **DOUBLE) * 2
    funnel = reference.depthwise(x, layer.conv.weight, torch.zeros(3, **DOUBLE))
    mean, var = reference.batch_statistics(funnel) if training else (layer.bn.running_mean, layer.bn.running_var)
    funnel = reference.bnet(funnel, layer.bn.weight.reshape(-1, 1, 1, 1), layer.bn.bias, mean, var)
    want = torch.where(funnel > x, funnel, x)
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    assert (layer(x) != x).any() and (layer(x) == x).any()


def test_frelu_gradcheck():
    layer = make(FReLU(2), training=False)
    x = torch.randn(2, 2, 4, 3, requires_grad=True, **DOUBLE)
    assert torch.autograd.gradcheck(layer, (x,))


def test_frelu_without_channels_says_so():
    with pytest.raises(RuntimeError, match='give num_features'):
        FReLU()(torch.randn(1, 2, 3, 3))
    with pytest.raises(ValueError, match='kernel_size must be a positive odd integer, got 4'):
        FReLU(3, kernel_size=4)
