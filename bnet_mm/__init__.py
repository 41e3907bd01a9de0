"""BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries.

Importing this package registers ``BNET`` (a ``norm_cfg`` type) and ``WithBNET`` (a model type that puts BNET at the
paper's positions) on mmengine's root registry, makes mmengine read checkpoints safely, and lets modules that hold a
BNET layer read the official checkpoints' names.
"""

from mmengine.registry import MODELS

from bnet_mm.checkpoint.blocks import watch_blocks
from bnet_mm.checkpoint.safe_load import register_loaders
from bnet_mm.norms import BNET
from bnet_mm.surgery import enhance

__version__ = '0.1.0'
__all__ = ['BNET', 'enhance']

MODELS.register_module(module=BNET)
register_loaders()
watch_blocks()
