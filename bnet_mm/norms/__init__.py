"""The layers. Start at bnet.py."""

from bnet_mm.norms.bn_conv import BNConv
from bnet_mm.norms.bnet import BNET
from bnet_mm.norms.cross_iteration_bn import CBN
from bnet_mm.norms.switchable_norm import SN1d, SN2d, SN3d, SyncSN

__all__ = ['BNET', 'CBN', 'BNConv', 'SN1d', 'SN2d', 'SN3d', 'SyncSN']
