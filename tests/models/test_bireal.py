"""Bi-Real Net against its formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.backbones import norm_of, randomised

# isort: split
from bnet_mm.models import BinaryConv2d, BiRealResNet
from bnet_mm.models.bireal import BiRealBlock, binary_activation, binary_weight


def test_sign_of_activations_and_its_gradient():
    x = torch.cat([torch.randn(1000).double() * 1.5, torch.tensor([-2.0, -1, 0, 1, 2]).double()]).requires_grad_()
    weight = torch.randn(len(x)).double()
    y = binary_activation(x)
    assert y.dtype == x.dtype and torch.equal(y, torch.tensor([-1.0 if value < 0 else 1.0 for value in x]).double())
    (y * weight).sum().backward()
    twin = x.detach().clone().requires_grad_()  # ApproxSign, eq. 6 of the paper: its derivative is the gradient
    pieces = [twin * 0 - 1, 2 * twin + twin**2, 2 * twin - twin**2, twin * 0 + 1]
    index = (twin >= -1).long() + (twin >= 0).long() + (twin >= 1).long()
    (torch.stack(pieces).gather(0, index[None])[0] * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)


def test_sign_of_weights_and_its_gradient():
    weight = (torch.randn(4, 3, 3, 3).double() * 0.8).requires_grad_()
    upstream = torch.randn_like(weight)
    binary = binary_weight(weight)
    for filter_, result in zip(weight.detach(), binary):
        scale = sum(abs(value) for value in filter_.flatten().tolist()) / filter_.numel()
        torch.testing.assert_close(result, scale * (2 * (filter_ > 0) - 1.0).double())
    (binary * upstream).sum().backward()
    assert 0 < (weight.abs() > 1).sum() < weight.numel()
    torch.testing.assert_close(weight.grad, torch.where(weight.abs() > 1, 0, upstream))


def test_binary_convolution_is_one_of_signs():
    conv = BinaryConv2d(3, 6, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(2, 3, 7, 8).double()
    windows = F.unfold(torch.where(x < 0, -1.0, 1.0).double(), 3, padding=1, stride=2)
    scale = conv.weight.abs().flatten(1).mean(1)
    expected = scale[:, None] * (conv.weight.sign().flatten(1) @ windows)
    torch.testing.assert_close(conv(x), expected.view(2, 6, 4, 4))


@pytest.mark.parametrize('stride', [1, 2])
def test_bireal_block_has_a_shortcut_around_each_convolution(stride):
    down = None
    if stride == 2:
        down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = BiRealBlock(4, 4, stride=stride, downsample=down)
    randomised(block)
    x = torch.randn(2, 4, 6, 6).double()
    middle = norm_of(block.conv1(x), block.bn1) + (x if down is None else down(x))
    torch.testing.assert_close(block(x), norm_of(block.conv2(middle), block.bn2) + middle)


@pytest.mark.parametrize('base_channels', [64, 16])
def test_bireal_resnet(base_channels):
    model = BiRealResNet(depth=18, out_indices=(0, 1, 2, 3), base_channels=base_channels)
    model.init_weights()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(y.shape) for y in outputs] == [(2, base_channels * 2**i, 16 >> i, 16 >> i) for i in range(4)]
    binary = [name for name, module in model.named_modules() if isinstance(module, BinaryConv2d)]
    assert binary == [f'layer{i}.{j}.conv{k}' for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert all(float(block.bn2.weight.min()) == 1 for block in model.layer4)
    outputs[3].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
