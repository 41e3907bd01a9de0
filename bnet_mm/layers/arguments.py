"""Questions about arguments and tensors that the layers share."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin


def check_positive_int(layer: str, name: str, value: object, odd: bool = False) -> None:
    """Raise a ValueError that names layer and argument unless ``value`` is a positive (and, if asked, odd) int."""
    allowed = 'a positive odd integer' if odd else 'a positive integer'
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1 or (odd and value % 2 == 0):
        raise ValueError(f'{layer}: {name} must be {allowed}, got {value!r}')


def is_lazy(parameter: Tensor | None) -> bool:
    """Whether this is a parameter of one of torch's lazy modules, which has no shape before their first call."""
    return isinstance(parameter, UninitializedTensorMixin)
