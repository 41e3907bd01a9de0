"""Changing built models: enhance.py (norms to BNET and back), positions.py (which norms), fold.py (for inference),
activations.py (FReLU in ResNets), config.py (WithBNET), modules.py."""

from bnet_mm.surgery.config import WithBNET
from bnet_mm.surgery.enhance import enhance, restore
from bnet_mm.surgery.fold import fold
from bnet_mm.surgery.report import Report

__all__ = ['Report', 'WithBNET', 'enhance', 'fold', 'restore']
