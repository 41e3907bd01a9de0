"""What the tests of bnet_mm.models share."""

import importlib.util

import pytest
import torch.nn.functional as F
from torch import nn

import bnet_mm.host.compat  # noqa: F401  (before mmpretrain imports torchvision)

pytest.importorskip('mmpretrain')
if importlib.util.find_spec('torchvision') is None:
    pytest.skip('mmpretrain needs torchvision', allow_module_level=True)


def norm_of(x, layer):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def randomised(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(-1, 1), layer.bias.data.normal_()
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return module.double().eval()
