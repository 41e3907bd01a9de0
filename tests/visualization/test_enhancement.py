"""Enhancement maps against numpy's polyfit."""

import numpy as np
import pytest
import torch

from bnet_mm.layers import BNET
from bnet_mm.visualization.enhancement import enhancement_map


def random_layer(channels, k, norm='BN', dilation=1, dtype=torch.float32):
    layer = BNET(channels, k, dilation, norm=norm, dtype=dtype).eval()
    with torch.no_grad():
        layer.bnconv.weight.normal_()
        layer.bnconv.bias.normal_()
        for value in layer.norm.buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 2)
    return layer


def with_polyfit(x_hat, y):
    """Counts by numpy, channel by channel, in float64."""
    x_hat, y = x_hat.double().numpy(), y.double().numpy()
    count = np.zeros((x_hat.shape[0], *x_hat.shape[2:]), dtype=int)
    for x, out in zip(x_hat.swapaxes(0, 1), y.swapaxes(0, 1)):
        slope, intercept = np.polyfit(x.ravel(), out.ravel(), 1)
        count += out > slope * x + intercept
    return count


@pytest.mark.parametrize('norm', ['BN', 'IN', 'SN', dict(type='GN', num_groups=2)])
@pytest.mark.parametrize('k, dilation, shape', [(3, 1, (2, 4, 7, 5)), (5, 2, (1, 6, 9, 4)), (7, 1, (3, 2, 1, 6))])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_counts_are_those_of_polyfit(norm, k, dilation, shape, layout):
    layer = random_layer(shape[1], k, norm, dilation)
    x_hat = layer.norm(torch.randn(shape).mul(3).add(1).contiguous(memory_format=layout)).detach()
    y = layer.bnconv(x_hat).detach()
    got = enhancement_map(layer, x_hat, y)
    assert got.shape == (shape[0], *shape[2:])
    assert (got.numpy() == with_polyfit(x_hat, y)).all()
    assert 0 < got.sum() < y.numel()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('k', [1, 5])
def test_bn_enhances_nothing(dtype, k):
    """Also where the output is small beside the bias, or the channel constant."""
    layer = random_layer(8, k, dtype=dtype)
    with torch.no_grad():
        centre = layer.bnconv.centre_tap().clone()
        layer.bnconv.weight.zero_()
        layer.bnconv.centre_tap().copy_(centre)
        layer.bnconv.centre_tap()[0] = 1e-3
        layer.bnconv.bias[:4] = 1000.0
    x = torch.randn(2, 8, 33, 17, dtype=dtype)
    x[:, 5] = 2
    x_hat = layer.norm(x)
    assert enhancement_map(layer, x_hat, layer.bnconv(x_hat)).sum() == 0


def test_one_bright_neighbour_is_enhanced():
    """A tap that looks right enhances the pixel left of the only bright one."""
    layer = BNET(1, 3).eval()
    with torch.no_grad():
        layer.bnconv.weight[0, 0, 1, 2] = 0.5
    x_hat = torch.zeros(1, 1, 5, 7)
    x_hat[0, 0, 2, 4] = 1
    assert enhancement_map(layer, x_hat, layer.bnconv(x_hat)).nonzero().tolist() == [[0, 2, 3]]
