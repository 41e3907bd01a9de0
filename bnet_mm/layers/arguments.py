"""Questions about arguments and tensors that the layers share."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch.fx
from torch import Tensor
from torch.nn import parameter as torch_parameter

Duck = Any  # a module of a host, known by what it has: torch's types allow no such question of an nn.Module


def is_integer(value: object) -> bool:
    """Whether this is a whole number of any type, NumPy's too, but no bool."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_real(value: object) -> bool:
    """Whether this is a real number of any type, NumPy's too, or a bool."""
    return isinstance(value, Real)


def check_positive_int(layer: str, name: str, value: Any, odd: bool = False) -> None:
    """Raise a ValueError that names layer and argument unless ``value`` is a positive (and, if asked, odd) int."""
    allowed = 'a positive odd integer' if odd else 'a positive integer'
    if not is_integer(value) or value < 1 or (odd and value % 2 == 0):
        raise ValueError(f'{layer}: {name} must be {allowed}, got {value!r}')


def is_lazy(parameter: Tensor | None) -> bool:
    """Whether this is a parameter of one of torch's lazy modules, which has no shape before their first call."""
    return parameter is not None and torch_parameter.is_lazy(parameter)


def is_symbolic(x: object) -> bool:
    """Whether torch.fx traces, so that this has no values, whatever it is annotated as."""
    return isinstance(x, torch.fx.Proxy)
