"""The layers. Start at bnet.py."""

from bnet_mm.layers.bn_conv import BNConv
from bnet_mm.layers.bnet import BNET
from bnet_mm.layers.cross_iteration_bn import CBN
from bnet_mm.layers.frelu import FReLU
from bnet_mm.layers.switchable_norm import SN1d, SN2d, SN3d, SyncSN

__all__ = ['BNET', 'CBN', 'BNConv', 'FReLU', 'SN1d', 'SN2d', 'SN3d', 'SyncSN']
