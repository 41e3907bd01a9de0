"""Putting BNET into built models: positions.py."""

from bnet_mm.surgery.positions import enhance

__all__ = ['enhance']
