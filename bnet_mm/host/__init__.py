"""Everything that importing bnet_mm changes in its process, beside registering its types (register.py).

| what | why | where mmengine or torch lacks what it needs |
|---|---|---|
| `CheckpointLoader` reads every file with `weights_only` and an allow-list | a checkpoint is a pickle, which could run any code; and mmengine 0.10 cannot read its own files on torch >= 2.6 | reading a checkpoint raises a `CheckpointError` |
| `init_cfg=dict(type='Pretrained')` refuses a file of which nothing fits | mmengine only logs it: an untrained backbone that nobody notices | a warning; mmengine's own initialiser |
| `DefaultOptimWrapperConstructor` logs the `custom_keys` that reach BNET's taps by accident | `conv` is found in `bnconv`: taps with another learning rate than meant, which nobody sees | a warning; mmengine's own constructor |
| `Config` and `mmengine.hub` find `bnet_mm::name` | our configs by name, from anywhere | a warning; configs by path only |
| torch tells our layers of the module that they are put into | official checkpoint names, which stand beside a layer; the convolution that CBN and FReLU follow | a warning; official names are unexpected keys, CBN and FReLU need `follow` and `num_features` |
| `bnet_mm.host.compat` is imported where torchvision is built for another torch | it cannot be imported then, nor most host models: `operator torchvision::nms does not exist` | a warning; torchvision as it is |

Nothing else is touched. ``bnet_mm.host.compat``, which mends broken installations, is also imported by configs and tools.
"""  # noqa: E501

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from bnet_mm.host import configs, loaders
from bnet_mm.register import register


def _watch_holders() -> None:
    from torch.nn.modules.module import register_module_module_registration_hook

    from bnet_mm.layers.holders import prepare_holder

    register_module_module_registration_hook(prepare_holder)


def _torchvision_fits() -> bool:
    """Whether torchvision is this torch's, by what stands in its files: importing it would take a second."""
    spec = find_spec('torchvision')
    if spec is None or spec.origin is None or 'torchvision' in sys.modules:
        return True
    version = Path(spec.origin).with_name('version.py')
    if version.exists() and '+cu' in version.read_text() and torch.version.cuda is None:
        return False
    try:
        needs = ' '.join(metadata.requires('torchvision') or [])
    except metadata.PackageNotFoundError:
        return True
    torch_of_it = re.search(r'\btorch *\(?==([\w.]+)', needs)
    return torch_of_it is None or torch_of_it[1] == torch.__version__.split('+')[0]


def _mend_torchvision() -> None:
    if not _torchvision_fits():
        importlib.import_module('bnet_mm.host.compat')


# In the order of the table above.
EFFECTS: dict[str, Callable[[], None]] = {
    'CheckpointLoader': loaders.install,
    'Pretrained': lambda: register('bnet_mm.host.pretrained'),
    'DefaultOptimWrapperConstructor': lambda: register('bnet_mm.host.paramwise'),
    'bnet_mm::': configs.install,
    'holders': _watch_holders,
    'bnet_mm.host.compat': _mend_torchvision,
}
_done: set[str] = set()


def install() -> None:
    """Make these changes, each once in a process; warn of each that cannot be made."""
    for name, effect in EFFECTS.items():
        if name in _done:
            continue
        _done.add(name)
        try:
            effect()
        except Exception as error:  # whatever another version of a library makes of it
            if name == 'CheckpointLoader':
                loaders.refuse(error)
            warnings.warn(
                f'bnet_mm cannot install {name} in this mmengine and torch ({type(error).__name__}: {error}); see '
                'help(bnet_mm.host) for what that means',
                stacklevel=3,
            )
