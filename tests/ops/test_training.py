"""Fifty steps of training on the kernels."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from bnet_mm import BNET
from helpers.kernels import Calls, compiled


class Block(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        convs = [nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2)]
        self.body = nn.Sequential(convs[0], BNET(c, k), nn.ReLU(), convs[1], BNET(c, 3))

    def forward(self, x):
        return (x + self.body(x)).relu()


def train(model, noise, backend, monkeypatch):
    """Fifty steps of SGD on a fixed set of random images, which are off by ``noise``. Losses, and all weights."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    data = torch.Generator().manual_seed(7)
    images, labels = torch.randn(64, 3, 16, 16, generator=data), torch.randint(10, (64,), generator=data)
    losses = []
    for _ in range(50):
        batch = torch.randperm(64, generator=data)[:32]
        x = images[batch] * (1 + noise * torch.randn(32, 3, 16, 16))
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), torch.cat([v.flatten() for v in model.state_dict().values() if v.is_floating_point()])


@compiled
def test_fifty_steps_stay_within_rounding_growth(monkeypatch):
    """Losses and weights move at most 10 x as far off the reference path as by one rounding of the images."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), BNET(8, 3), nn.ReLU(), Block(8, 5), Block(8, 3), nn.MaxPool2d(2),
        Block(8, 7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    losses, weights = train(model, 0.0, 'reference', monkeypatch)
    rounded_losses, rounded = train(model, 1e-7, 'reference', monkeypatch)
    with Calls() as calls:
        fast_losses, fast = train(model, 0.0, 'cpp', monkeypatch)
    assert calls.names.count('norm') == calls.names.count('norm_backward') == 50 * 7
    assert losses[-5:].mean() < 0.7 * losses[0] and fast_losses[-5:].mean() < 0.7 * fast_losses[0]
    growth, change = (rounded - weights).norm(), (fast - weights).norm()
    assert 0 < growth < 0.01 * weights.norm() and change <= 10 * growth, (growth, change)
    growth, change = (rounded_losses - losses).abs().max(), (fast_losses - losses).abs().max()
    assert change <= 10 * growth, (growth, change)
