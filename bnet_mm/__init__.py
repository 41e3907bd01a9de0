"""BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries.

Importing this package registers on mmengine's root registries the norms ``BNET``, ``SN``, ``SN1d``, ``SN3d``,
``SyncSN``, ``CBN`` and ``BNConv`` (for ``norm_cfg``), the activation ``FReLU``, the model type ``WithBNET``, which puts
BNET at the paper's positions, and the hooks ``CBNBurnIn`` and ``FreezeTransform``. It makes mmengine read checkpoints
safely, and tells our layers of the modules that hold them.
"""

from mmengine.registry import HOOKS, MODELS

from bnet_mm.blocks import watch_blocks
from bnet_mm.checkpoint.safe_load import register_loaders
from bnet_mm.frelu import FReLU
from bnet_mm.hooks import FreezeTransform
from bnet_mm.norms import BNET, CBN, BNConv, CBNBurnIn, SN1d, SN2d, SN3d, SyncSN
from bnet_mm.surgery import enhance, fold, restore

__version__ = '0.1.0'
__all__ = ['BNET', 'CBN', 'BNConv', 'FReLU', 'SN1d', 'SN2d', 'SN3d', 'SyncSN', 'enhance', 'fold', 'restore']

for layer in (BNET, BNConv, CBN, FReLU, SN1d, SN3d, SyncSN):
    MODELS.register_module(module=layer)
MODELS.register_module(name=['SN', 'SN2d'], module=SN2d)
for hook in (CBNBurnIn, FreezeTransform):
    HOOKS.register_module(module=hook)
register_loaders()
watch_blocks()
