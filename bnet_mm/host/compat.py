"""Defects of released libraries that stop their use, mended where they are found: ``import bnet_mm.host.compat``.

Nothing here is needed, and nothing is done, on a healthy installation. Each function goes when its library is mended.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

KEPT: list[torch.library.Library] = []


def mend_torchvision() -> bool:
    """A torchvision whose compiled part does not fit this torch cannot be imported at all.

    Its transforms and models, which is what mmpretrain and mmengine's log need, are Python. They can be imported once
    the operators exist by name; calling one of these operators still raises.
    """
    if find_spec('torchvision') is None:
        return False
    try:
        importlib.import_module('torchvision')
        return False
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]
    library = torch.library.Library('torchvision', 'FRAGMENT')
    KEPT.append(library)  # it must live as long as the operators
    for operator in ('nms', 'qnms'):
        library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    importlib.import_module('torchvision')
    return True


def mend_mmaction() -> bool:
    """mmaction2 1.2.0's wheel lacks one of its own packages, DRN, a localizer that nothing here uses."""
    spec = find_spec('mmaction')
    folders = [] if spec is None else spec.submodule_search_locations or []
    if spec is None or any((Path(path) / 'models/localizers/drn').is_dir() for path in folders):
        return False

    class DRN:
        def __init__(self, *args, **kwargs) -> None:
            raise ImportError("DRN is missing in mmaction2's wheel; install mmaction2 from its repository")

    package: Any = types.ModuleType('mmaction.models.localizers.drn')
    package.drn = types.ModuleType('mmaction.models.localizers.drn.drn')
    package.drn.DRN = DRN
    for module in (package, package.drn):
        sys.modules.setdefault(module.__name__, module)
    return True


MENDED = [mend.__name__ for mend in (mend_torchvision, mend_mmaction) if mend()]
