"""BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries.

Importing this package registers ``BNET`` (a ``norm_cfg`` type) and ``WithBNET`` (a model type that puts BNET at the
paper's positions) on mmengine's root registry, and makes mmengine read checkpoints safely.
"""

from mmengine.registry import MODELS

from bnet_mm.checkpoint.safe_load import register_loaders
from bnet_mm.norms import BNET
from bnet_mm.surgery import enhance

__version__ = '0.1.0'
__all__ = ['BNET', 'enhance']

MODELS.register_module(module=BNET)
register_loaders()
