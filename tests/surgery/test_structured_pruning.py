"""Structured pruning (Torch-Pruning) takes the channels out of BNET as out of a norm and a depthwise convolution."""

import copy

import pytest
import torch
from torch import nn

from bnet_mm import BNET, CBN, BNConv

tp = pytest.importorskip('torch_pruning')


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), norm()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), norm()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 1), norm()
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        y = self.bn1(self.conv1(x)).relu()
        return self.fc((self.bn2(self.conv2(y)) + x).relu().mean((2, 3)))


def prune(model, x):
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    pruner.step()
    return model


@pytest.mark.parametrize('kind', ['BN', 'SyncBN', 'GN', 'IN'])
@pytest.mark.parametrize('k', [1, 3, 5])
def test_the_same_channels_go(kind, k):
    """The pruned BNET computes what the pruned pair of torch's layers does, and trains."""

    def ours():
        return BNET(16, k=k, norm=dict(type='GN', num_groups=4) if kind == 'GN' else kind)

    def torchs():
        kinds = dict(GN=lambda: nn.GroupNorm(4, 16, affine=False), IN=lambda: nn.InstanceNorm2d(16))
        norm = kinds.get(kind, lambda: nn.BatchNorm2d(16, affine=False))()
        return nn.Sequential(norm, nn.Conv2d(16, 16, k, padding=k // 2, groups=16))

    model, pair = Block(ours), Block(torchs)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for module in model.modules():
        if getattr(module, 'running_mean', None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    pair.load_state_dict(dict(zip(pair.state_dict(), model.state_dict().values())))
    x = torch.randn(2, 3, 8, 8)
    prune(model.eval(), x), prune(pair.eval(), x)
    assert model.conv1.out_channels == model.bn1.num_features == model.bn1.bnconv.num_features == 8
    assert {name: tuple(p.shape) for name, p in model.bn1.bnconv.named_parameters()} == dict(
        weight=(8, 1, k, k), bias=(8,)
    )
    torch.testing.assert_close(model(x), pair(x), rtol=1e-4, atol=1e-3)
    model.train()(x).sum().backward()
    assert model.bn1.bnconv.weight.grad.shape == model.bn1.bnconv.weight.shape
    copy.deepcopy(model).load_state_dict(model.state_dict())


@pytest.mark.parametrize('norm', [lambda: CBN(16), lambda: BNConv(16), lambda: BNET(16, norm='CBN')])
def test_other_layers(norm):
    model, x = Block(norm), torch.randn(2, 3, 8, 8)
    prune(model.eval(), x)
    assert model.conv1.out_channels == 8
    model.train()(x).sum().backward()
