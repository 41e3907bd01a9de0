"""Randomised norms in float64."""

import torch
from torch import nn

from helpers import reference

DOUBLE = {'dtype': torch.float64}


def make(layer, training=True):
    layer = reference.randomise(layer).double()
    for name in ('mean_weight', 'var_weight'):
        for module in layer.modules():
            if hasattr(module, name):
                nn.init.normal_(getattr(module, name))
    return layer.train(training)
