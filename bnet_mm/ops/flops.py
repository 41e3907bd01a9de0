"""What the operators cost, for ``torch.utils.flop_counter``: as the depthwise convolutions whose work they do."""

from __future__ import annotations

import torch
from torch.utils import flop_counter

from bnet_mm.ops import schemas  # noqa: F401  (declares torch.ops.bnet_mm)

# torch 2.1 has no place for formulas
register_flop_formula = getattr(flop_counter, 'register_flop_formula', lambda operator: lambda formula: formula)


def _convolution(k: int) -> tuple:
    """Stride, padding, dilation, transposed."""
    return [1, 1], [k // 2, k // 2], [1, 1], False


@register_flop_formula(torch.ops.bnet_mm.forward)
def forward_flop(x, mean, rstd, weight, bias, residual, relu, out_shape=None, **kwargs) -> int:
    return flop_counter.conv_flop(x, weight, bias, *_convolution(weight[-1]), out_val=x)


@register_flop_formula(torch.ops.bnet_mm.norm)
def norm_flop(x, residual, weight, bias, *args, out_shape=None, **kwargs) -> int:
    return forward_flop(x, None, None, weight, bias, residual, False)


@register_flop_formula(torch.ops.bnet_mm.backward)
def backward_flop(grad, x, mean, rstd, weight, needs_weight, *args, out_shape=None, **kwargs) -> int:
    options = (*_convolution(weight[-1]), [0, 0], x[1], [True, needs_weight, True])
    return flop_counter.conv_backward_flop(grad, x, weight, None, *options, out_val=(x, weight, x[1:2]))


@register_flop_formula(torch.ops.bnet_mm.norm_backward)
def norm_backward_flop(
    grad, x, mean, rstd, weight, y, batch_statistics, needs_weight, *args, out_shape=None, **kwargs
) -> int:
    return backward_flop(grad, x, mean, rstd, weight, needs_weight)
