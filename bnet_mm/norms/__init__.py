"""The layers. Start at bnet.py."""

from bnet_mm.norms.bnet import BNET

__all__ = ['BNET']
