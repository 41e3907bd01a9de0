"""Reading checkpoint files without executing them.

Checkpoints are pickles, and a pickle can run any code. Files are therefore read with torch's ``weights_only``
unpickler, extended by exactly what mmengine itself writes (its HistoryBuffer, numpy numbers, OneCycleLR's curve), which
upstream mmengine 0.10 forgets to allow on torch >= 2.6. host/loaders.py makes mmengine's CheckpointLoader do so.
"""

from __future__ import annotations

import errno
import functools
import os
import pickle
import re
import zipfile
from _codecs import encode
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.utils import digit_version

from bnet_mm.checkpoint.layouts import CheckpointError

# What ``getattr`` may give in a checkpoint: mmengine pickles these functions by class and name.
ATTRIBUTES = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _restricted_getattr(owner: object, name: str) -> Callable:
    """Stands in for ``getattr`` in a checkpoint."""
    if not isinstance(owner, type) or name not in ATTRIBUTES.get(owner, ()):
        raise pickle.UnpicklingError(f'Unsupported GLOBAL builtins.getattr of {owner!r}, {name!r}')
    return getattr(owner, name)


def _allowed_globals() -> list[tuple[Any, str]]:
    """(object, qualified name in the file) of all that mmengine writes beside tensors and plain Python values."""
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed = [
        (_restricted_getattr, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
        (encode, '_codecs.encode'),  # how protocol 2 writes bytes
        (Counter, 'collections.Counter'),  # MultiStepLR's milestones
        *((owner, f'{owner.__module__}.{owner.__name__}') for owner in ATTRIBUTES),
    ]
    for package in ('numpy.core', 'numpy._core'):  # numpy 1 and 2: files travel between machines
        allowed += [(reconstruct, f'{package}.multiarray._reconstruct'), (scalar, f'{package}.multiarray.scalar')]
    number_types = {type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}
    return allowed + [(number, f'{number.__module__}.{number.__name__}') for number in number_types]


@contextmanager
def clear_errors(filename: str) -> Iterator[None]:
    """Turn what torch raises of a bad or refused file into a CheckpointError that says which and why."""
    try:
        yield
    except (CheckpointError, torch.cuda.OutOfMemoryError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch's answer to some cut files
            raise
        raise CheckpointError(f'{filename} is not a readable checkpoint: it is damaged or cut short') from None
    except Exception as error:  # a damaged pickle can raise anything
        if refused := re.search(r'(?:GLOBAL|Unsupported class)\s+(\S+)', str(error)):
            raise CheckpointError(
                f'checkpoint {filename} was refused and not executed: it holds {refused[1]}, and only weights and '
                "plain values are read. If you trust its source, save its {'state_dict': ...} alone where it was made"
            ) from None
        text = str(error).strip() or type(error).__name__
        # Without torch's advice, which is to load without weights_only.
        found = re.search(r'(?:WeightsUnpickler error:\s*|Weights only load failed\. (?!In PyTorch))(.+)', text)
        reason = found[1] if found else text.splitlines()[0]
        raise CheckpointError(
            f'{filename} is not a readable checkpoint: it is damaged, cut short or no torch file ({reason})'
        ) from None


def load_checkpoint_file(filename: str, map_location: Any = None) -> dict:
    """Read a local checkpoint file; nothing in it is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not a checkpoint, is damaged, or holds more than weights and plain values.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        why = 'is a folder, not a file' if os.path.isdir(filename) else 'does not exist'
        raise FileNotFoundError(f'checkpoint {filename} {why}')
    with clear_errors(filename):
        _check_sums(filename)
        checkpoint = _load_weights_only(filename, map_location)
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict):
        raise CheckpointError(f'{filename} is not a checkpoint: it holds a {type(state_dict).__name__}, not a dict')
    if strange := [key for key in state_dict if not isinstance(key, str)]:
        raise CheckpointError(f'{filename} is not a checkpoint: {strange[0]!r} is no name of a tensor')
    return checkpoint


def _check_sums(filename: str) -> None:
    """Raise BadZipFile if a checksum of the file is wrong: torch writes them, and reads a changed number as it is.

    The format of torch before 1.6 has none.
    """
    with open(filename, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':
            return
    with zipfile.ZipFile(filename) as archive:
        for record in archive.infolist():
            if record.CRC:  # 0 where torch.serialization.set_crc32_options(False) left them out
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass


if digit_version(torch.__version__) >= digit_version('2.6.0'):

    @contextmanager
    def allow_list() -> Iterator[None]:
        already_allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([pair for pair in _allowed_globals() if pair not in already_allowed]):
            yield

    def _load_weights_only(filename: str, map_location: Any) -> Any:
        with allow_list():
            return torch.load(filename, map_location=map_location, weights_only=True)

else:
    # Before 2.6 torch's own list cannot be extended by (object, name) pairs, so the same list, torch's and ours, is
    # enforced by an unpickler of our own, which torch.load uses for every pickle in the file.

    @contextmanager
    def allow_list() -> Iterator[None]:
        yield

    def _load_weights_only(filename: str, map_location: Any) -> Any:
        if zipfile.is_zipfile(filename):
            with zipfile.ZipFile(filename) as archive:
                if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                    raise CheckpointError(f'{filename} is a TorchScript program, not a checkpoint; it was not executed')
        loader = SimpleNamespace(__name__='allow_list', Unpickler=_AllowListUnpickler, load=_allow_list_load)
        return torch.load(filename, map_location=map_location, pickle_module=loader)

    @functools.lru_cache(maxsize=1)
    def _allowed_by_name() -> dict[str, Any]:
        from torch._weights_only_unpickler import _get_allowed_globals

        return {**_get_allowed_globals(), **{name: value for value, name in _allowed_globals()}}

    _PythonUnpickler: Any = pickle._Unpickler  # typeshed leaves out most of it

    class _AllowListUnpickler(_PythonUnpickler):  # the Python one: its BUILD can be restricted as torch's is
        dispatch = dict(_PythonUnpickler.dispatch)

        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # protocol 2 writes Python 2's name
            if full_name not in _allowed_by_name():
                raise pickle.UnpicklingError(f'Unsupported GLOBAL {full_name}')
            return _allowed_by_name()[full_name]

        def load_build(self) -> None:
            target = self.stack[-2]
            if not isinstance(target, (torch.Tensor, OrderedDict, np.ndarray, np.dtype, *ATTRIBUTES)):
                raise pickle.UnpicklingError(f'Unsupported GLOBAL state of {type(target).__name__}')
            super().load_build()

        dispatch[pickle.BUILD[0]] = load_build

    def _allow_list_load(file, **options) -> Any:
        return _AllowListUnpickler(file, **options).load()
