"""Reading checkpoint files without executing them.

Checkpoints are pickles, and a pickle can run any code. Every file is therefore read with torch's ``weights_only``
unpickler, extended by exactly what mmengine itself writes (its HistoryBuffer and numpy numbers), which upstream
mmengine 0.10 forgets to allow on torch >= 2.6. Importing bnet_mm makes mmengine's CheckpointLoader read local and
http(s) files through this module, so ``resume``, ``load_from``, ``init_cfg=dict(type='Pretrained')`` and the
inference APIs all do.
"""

from __future__ import annotations

import os
import pickle
import re
from _codecs import encode
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from bnet_mm.checkpoint.layouts import CheckpointError


def _history_buffer_method(owner: object, name: str) -> Callable:
    """Stands in for ``getattr`` in a checkpoint: gives HistoryBuffer's four statistics methods and nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'Unsupported GLOBAL builtins.getattr of {owner!r}, {name!r}')
    return getattr(HistoryBuffer, name)


def _allowed_globals() -> list[tuple[Any, str]]:
    """(object, qualified name in the file) of all that mmengine writes beside tensors and plain Python values."""
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_buffer_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
        (encode, '_codecs.encode'),  # how protocol 2 writes bytes; on torch's own list from 2.4
    ]
    for package in ('numpy.core', 'numpy._core'):  # numpy 1 and 2: files travel between machines
        allowed += [(reconstruct, f'{package}.multiarray._reconstruct'), (scalar, f'{package}.multiarray.scalar')]
    number_types = {type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}
    return allowed + [(number, f'{number.__module__}.{number.__name__}') for number in number_types]


def load_checkpoint_file(filename: str, map_location: Any = None) -> dict:
    """Read a local checkpoint file; nothing in it is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not a checkpoint, is damaged, or holds more than weights and plain values.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename} does not exist')
    try:
        checkpoint = _load_weights_only(filename, map_location)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if refused := re.search(r'GLOBAL\s+(\S+)', str(error)):
            raise CheckpointError(
                f'checkpoint {filename} was refused and not executed: it holds {refused[1]}, and only weights and '
                "plain values are read. If you trust its source, save its {'state_dict': ...} alone where it was made"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f'{filename} is not a readable checkpoint: it is damaged, cut short or no torch file ({reason})'
        ) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{filename} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict')
    return checkpoint


if hasattr(torch.serialization, 'safe_globals'):  # torch >= 2.5

    def _load_weights_only(filename: str, map_location: Any) -> Any:
        already_allowed = torch.serialization.get_safe_globals()
        ours = [pair for pair in _allowed_globals() if pair not in already_allowed]
        with torch.serialization.safe_globals(ours):
            return torch.load(filename, map_location=map_location, weights_only=True)

else:
    # torch < 2.5 cannot extend the list of its weights_only unpickler, so the same list, torch's and ours, is enforced
    # by an unpickler of our own, which torch.load uses for every pickle in the file.

    def _load_weights_only(filename: str, map_location: Any) -> Any:
        from torch._weights_only_unpickler import _get_allowed_globals

        allowed = {**_get_allowed_globals(), **{name: value for value, name in _allowed_globals()}}

        class AllowListUnpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                full_name = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # protocol 2 writes Python 2's name
                if full_name not in allowed:
                    raise pickle.UnpicklingError(f'Unsupported GLOBAL {full_name}')
                return allowed[full_name]

        def load(file, **options) -> Any:
            return AllowListUnpickler(file, **options).load()

        allow_list_pickle = SimpleNamespace(
            __name__='allow_list_pickle',
            Unpickler=AllowListUnpickler,
            load=load,
            UnpicklingError=pickle.UnpicklingError,
        )
        return torch.load(filename, map_location=map_location, pickle_module=allow_list_pickle)


def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = True) -> Any:
    """mmengine's loader for URLs: downloads once to torch.hub's cache, then reads the file as any other."""
    model_dir = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(model_dir, os.path.basename(urlparse(filename).path))
    if is_main_process() and not os.path.exists(path):
        os.makedirs(model_dir, exist_ok=True)
        torch.hub.download_url_to_file(filename, path, progress=progress)
    barrier()
    return load_checkpoint_file(path, map_location)


def register_loaders() -> None:
    """Make mmengine read checkpoints through this module."""
    CheckpointLoader.register_scheme(prefixes='', loader=load_checkpoint_file, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)
