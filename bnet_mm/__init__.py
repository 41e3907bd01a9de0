"""BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries.

Importing this package registers on mmengine's root registries the norms ``BNET``, ``SN``, ``SN1d``, ``SN3d``,
``SyncSN``, ``CBN`` and ``BNConv`` (for ``norm_cfg``), the activation ``FReLU``, the model type ``WithBNET``, which puts
BNET at the paper's positions, and the hooks ``CBNBurnIn`` and ``FreezeTransform``. It makes mmengine read checkpoints
safely, refuse pretrained weights of which nothing fits and find configs named ``bnet_mm::...``, and tells our layers of
the modules that hold them.
"""

from mmengine.registry import HOOKS, MODELS

from bnet_mm.blocks import watch_blocks
from bnet_mm.checkpoint.pretrained import register_initializer
from bnet_mm.checkpoint.safe_load import register_loaders
from bnet_mm.config_lookup import register_configs
from bnet_mm.frelu import FReLU
from bnet_mm.hooks import CBNBurnIn, FreezeTransform
from bnet_mm.norms import BNET, CBN, BNConv, SN1d, SN2d, SN3d, SyncSN
from bnet_mm.surgery import enhance, fold, restore

__version__ = '0.1.0'
__all__ = ['BNET', 'CBN', 'BNConv', 'FReLU', 'SN1d', 'SN2d', 'SN3d', 'SyncSN', 'enhance', 'fold', 'restore']

for layer in (BNET, BNConv, CBN, FReLU, SN1d, SN3d, SyncSN):
    MODELS.register_module(module=layer)
MODELS.register_module(name=['SN', 'SN2d'], module=SN2d)
for hook in (CBNBurnIn, FreezeTransform):
    HOOKS.register_module(module=hook)
register_loaders()
register_configs()
register_initializer()
watch_blocks()
