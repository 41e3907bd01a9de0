"""Backbones that no installed library has, for mmpretrain configs: ``custom_imports`` of ``bnet_mm.models``.

They need mmpretrain, so ``import bnet_mm`` leaves them out; where torchvision is broken, name ``bnet_mm.host.compat``
first.
"""

from bnet_mm.models.bireal import BinaryConv2d, BiRealResNet
from bnet_mm.models.resnet_v2 import ResNetV2
from bnet_mm.register import register

__all__ = ['BiRealResNet', 'BinaryConv2d', 'ResNetV2']

register('bnet_mm.models')
