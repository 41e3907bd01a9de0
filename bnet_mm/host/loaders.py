"""mmengine's CheckpointLoader, made to read every kind of path with ``weights_only`` (checkpoint/safe_load.py).

So ``resume``, ``load_from``, ``init_cfg=dict(type='Pretrained')`` and the inference APIs all do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.checkpoint.safe_load import allow_list, clear_errors, load_checkpoint_file

# torch's switches for weights_only, by which a loader that forgets it can be made to use it.
FORCE_VARIABLES = ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD')


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """mmengine's loader for local paths (it logs the part of the name after ``load_from_``)."""
    return load_checkpoint_file(filename, map_location)


def weights_only(loader: Callable) -> Callable:
    """A loader of mmengine's for remote files that reads what it fetched with ``weights_only``, as it forgets to."""

    @functools.wraps(loader)
    def load(filename: str, *args, **kwargs) -> Any:
        # Both variables at once are an error to torch, and users set the second one to get round mmengine's defect.
        before = {name: os.environ.pop(name, None) for name in FORCE_VARIABLES}
        os.environ[FORCE_VARIABLES[0]] = '1'
        try:
            with clear_errors(filename), allow_list():
                return loader(filename, *args, **kwargs)
        finally:
            del os.environ[FORCE_VARIABLES[0]]
            os.environ.update({name: value for name, value in before.items() if value is not None})

    return load


def install() -> None:
    """Replace the loader of every prefix that mmengine knows."""
    from mmengine.runner.checkpoint import CheckpointLoader

    for prefix, loader in list(CheckpointLoader._schemes.items()):
        safe = load_from_local if prefix == '' else weights_only(loader)
        CheckpointLoader.register_scheme(prefixes=prefix, loader=safe, force=True)


def refuse(reason: Exception) -> None:
    """Make CheckpointLoader refuse every file: it could not be made safe."""
    from mmengine.runner.checkpoint import CheckpointLoader

    def load_checkpoint(filename: str, *args, **kwargs) -> NoReturn:
        raise CheckpointError(
            f'checkpoint {filename} was not read: bnet_mm cannot make this version of mmengine read files without '
            f'executing them ({type(reason).__name__}: {reason})'
        )

    CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)
