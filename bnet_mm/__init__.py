"""BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries.

Importing this package registers its types on mmengine's root registries (register.py) and makes the changes to mmengine
and torch that ``help(bnet_mm.host)`` lists.
"""

from bnet_mm import host
from bnet_mm.layers import BNET, CBN, BNConv, FReLU, SN1d, SN2d, SN3d, SyncSN
from bnet_mm.register import register
from bnet_mm.surgery import WithBNET, enhance, fold, restore

__version__ = '0.2.0'
__all__ = ['BNET', 'CBN', 'BNConv', 'FReLU', 'SN1d', 'SN2d', 'SN3d', 'SyncSN', 'WithBNET', 'enhance', 'fold', 'restore']

register('bnet_mm.layers', 'bnet_mm.surgery', 'bnet_mm.engine.hooks')
host.install()
