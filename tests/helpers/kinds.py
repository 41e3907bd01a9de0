"""Every layer that normalises maps of four channels, by a name."""

import torch
from torch import nn

from bnet_mm import BNET, CBN, BNConv, FReLU, SN2d, SyncSN

KINDS = {
    'BNET': lambda **o: BNET(4, k=3, **o),
    'BNET over SyncBN': lambda **o: BNET(4, k=3, norm='SyncBN', **o),
    'BNET over GN': lambda **o: BNET(4, k=3, norm=dict(type='GN', num_groups=2), **o),
    'BNET over IN': lambda **o: BNET(4, k=3, norm='IN', **o),
    'BNET over SN': lambda **o: BNET(4, k=3, norm='SN', **o),
    'BNET over SyncSN': lambda **o: BNET(4, k=3, norm='SyncSN', **o),
    'BNET over CBN': lambda **o: BNET(4, k=3, norm='CBN', **o),
    'SN': lambda **o: SN2d(4, **o),
    'SyncSN': lambda **o: SyncSN(4, **o),
    'CBN': lambda **o: CBN(4, **o),
    'FReLU': lambda **o: FReLU(4, **o),
    'BNConv': lambda **o: BNConv(4, **o),
}
TRACKING = [name for name in KINDS if not name.endswith(('GN', 'IN'))]


def batch_norms(layer):
    """The modules that hold the statistics, as tools of torch and the hosts look for them."""
    return [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def maps(*shape):
    return torch.randn(*(shape or (3, 4, 5, 7))) * 2 + 1
