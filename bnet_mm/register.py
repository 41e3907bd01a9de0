"""Every name that configs can use, in one table."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS, Registry


class Entry(NamedTuple):
    """A name in one of mmengine's root registries, which those of all four libraries look into.

    module: Where the class or function stands. It is registered by ``import bnet_mm``, or, where that would import
        more than a layer needs, by the import of its own package.
    attribute: Its name there, if it is not the registered one.
    replaces: Whether mmengine has registered something under this name, which ours replaces.
    """

    registry: Registry
    name: str
    module: str
    attribute: str = ''
    replaces: bool = False


TABLE = (
    Entry(MODELS, 'BNET', 'bnet_mm.layers.bnet'),
    Entry(MODELS, 'SN', 'bnet_mm.layers.switchable_norm', 'SN2d'),
    Entry(MODELS, 'SN1d', 'bnet_mm.layers.switchable_norm'),
    Entry(MODELS, 'SN2d', 'bnet_mm.layers.switchable_norm'),
    Entry(MODELS, 'SN3d', 'bnet_mm.layers.switchable_norm'),
    Entry(MODELS, 'SyncSN', 'bnet_mm.layers.switchable_norm'),
    Entry(MODELS, 'CBN', 'bnet_mm.layers.cross_iteration_bn'),
    Entry(MODELS, 'BNConv', 'bnet_mm.layers.bn_conv'),
    Entry(MODELS, 'FReLU', 'bnet_mm.layers.frelu'),
    Entry(MODELS, 'WithBNET', 'bnet_mm.surgery.config'),
    Entry(HOOKS, 'CBNBurnIn', 'bnet_mm.engine.hooks'),
    Entry(HOOKS, 'FreezeTransform', 'bnet_mm.engine.hooks'),
    Entry(HOOKS, 'NormStatisticsHook', 'bnet_mm.engine.hooks'),
    Entry(HOOKS, 'PairedRun', 'bnet_mm.engine.hooks'),
    Entry(WEIGHT_INITIALIZERS, 'Pretrained', 'bnet_mm.host.pretrained', 'CheckedPretrainedInit', replaces=True),
    Entry(
        OPTIM_WRAPPER_CONSTRUCTORS, 'DefaultOptimWrapperConstructor', 'bnet_mm.host.paramwise',
        'LoggingOptimWrapperConstructor', replaces=True,
    ),
    # by the tools, which import bnet_mm.engine.processes
    Entry(MODEL_WRAPPERS, 'CPUDistributedDataParallel', 'bnet_mm.engine.processes'),
    # by custom_imports of bnet_mm.models, which needs mmpretrain
    Entry(MODELS, 'BinaryConv2d', 'bnet_mm.models.bireal'),
    Entry(MODELS, 'BiRealResNet', 'bnet_mm.models.bireal'),
    Entry(MODELS, 'ResNetV2', 'bnet_mm.models.resnet_v2'),
)  # fmt: skip


def register(*packages: str) -> None:
    """Register what the table has in these packages."""
    for entry in TABLE:
        if any(f'{entry.module}.'.startswith(f'{package}.') for package in packages):
            module = sys.modules.get(entry.module) or import_module(entry.module)
            target = getattr(module, entry.attribute or entry.name)
            entry.registry.register_module(name=entry.name, module=target, force=entry.replaces)


def our_types() -> set[str]:
    """The names in configs that nobody but this package registers."""
    return {entry.name for entry in TABLE if not entry.replaces}
