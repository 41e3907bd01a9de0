"""Changing built models: enhance.py (norms to BNET and back), positions.py (which norms), fold.py (for inference),
blocks.py (residual blocks with another forward), tails.py and activations.py (two such: the last norm with sum and ReLU
in one pass, FReLU), config.py (WithBNET), modules.py."""

from bnet_mm.surgery.config import WithBNET
from bnet_mm.surgery.enhance import enhance, restore
from bnet_mm.surgery.fold import fold
from bnet_mm.surgery.report import Report

__all__ = ['Report', 'WithBNET', 'enhance', 'fold', 'restore']
