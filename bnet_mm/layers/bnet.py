"""BNET: batch normalisation with an enhanced linear transformation.

Paper: Xu et al., "Batch Normalization with Enhanced Linear Transformation", arXiv 2011.14150, section 3.2.

Differences from the official code: the layer holds its normaliser instead of inheriting from BatchNorm2d (the host
converts, fuses and initialises every ``_BatchNorm`` it sees and would drop the convolution), so that any normaliser
will do (Table 12); and it starts as the identity, so that a fresh BNET equals a fresh BN.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import adapt_bnet_keys
from bnet_mm.layers.arguments import Duck, check_positive_int, is_symbolic
from bnet_mm.layers.cross_iteration_bn import CBN
from bnet_mm.layers.normalisers import (
    Normaliser,
    build_normaliser,
    has_hooks,
    is_foreign_sync_batch_norm,
    statistics,
    statistics_of_whole_norm,
    with_affine,
    without_affine,
)
from bnet_mm.layers.scripting import refuse_scripting
from bnet_mm.layers.statistics import uses_batch_statistics
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from bnet_mm.ops import describe_backend, select_backend
from bnet_mm.ops.bnet import fused_bnet
from bnet_mm.ops.dispatch import convolution_dtype
from bnet_mm.ops.norm import fused_norm, fused_transform


@torch.fx.wrap  # host tools trace models symbolically; a check of shapes cannot be traced, only kept as a call
def check_input(x: Tensor, num_features: int, needs_several_values: bool) -> None:
    """Raise a ValueError for an input that BNET cannot normalise."""
    shape = tuple(x.shape)
    if x.dim() != 4:
        raise ValueError(f'BNET: input must be 4-D (N, C, H, W), got {x.dim()}-D of shape {shape}')
    if shape[1] != num_features:
        raise ValueError(f'BNET: input must have num_features={num_features} channels, got shape {shape}')
    if needs_several_values and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f'BNET: input must have more than one value per channel in training mode, got shape {shape}; '
            'use a larger batch or map, or eval() with running statistics'
        )


def with_tail(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(y + residual)``: what follows the last norm of a residual block, in torch's own operators."""
    if residual is None:
        return y.relu() if relu else y
    y = y + residual
    return y.relu_() if relu else y


def in_one_pass(
    function: Callable[[Tensor | None, bool], Tensor], x: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """``function(residual, relu)`` in autocast's dtype; with the tail after it unless the residual is a map like x."""
    dtype = convolution_dtype(x)
    if residual is None or (residual.stride() == x.stride() and _like(residual, x) and x.dtype == dtype):
        y = function(residual, relu)
        return y if y.dtype == dtype else y.to(dtype)
    return with_tail(function(None, False).to(dtype), residual, relu)


def _like(residual: Tensor, x: Tensor) -> bool:
    return (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)


class DepthwiseTransform(nn.modules.conv._ConvNd):
    """The k x k depthwise convolution with bias that replaces the affine of a norm (eq. 5).

    Not an ``nn.Conv2d``: hosts that initialise every one would overwrite the identity start. But of its base class, by
    which tools know what to do with the parameters: optimizer constructors (TSM's), structured pruners.

    Shapes:
        weight: (C, 1, k, k); bias: (C,); input and output: (N, C, H, W).
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, num_features: int, k: int, dilation: int, device=None, dtype=None) -> None:
        padding = dilation * (k // 2)
        super().__init__(
            num_features,
            num_features,
            kernel_size=(k, k),
            stride=(1, 1),
            padding=(padding, padding),
            dilation=(dilation, dilation),
            transposed=False,
            output_padding=(0, 0),
            groups=num_features,
            bias=True,
            padding_mode='zeros',
            device=device,
            dtype=dtype,
        )
        self.bias: nn.Parameter

    @property
    def num_features(self) -> int:
        return self.out_channels  # which a pruner changes

    @property
    def k(self) -> int:
        return self.kernel_size[0]

    def reset_parameters(self) -> None:
        """Identity: centre tap 1, other taps 0, bias 0."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.centre_tap())
        nn.init.zeros_(self.bias)

    def centre_tap(self) -> Tensor:
        """View (C,) of the taps that multiply the pixel itself: BN's gamma."""
        return self.weight[:, 0, self.k // 2, self.k // 2]

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``act(DWConv_k(x) + bias + residual)``, as in :meth:`BNET.forward`."""
        weight: Tensor
        bias: Tensor
        weight, bias = self.weight, self.bias
        if not is_symbolic(x):  # in which quantisation must find a convolution by the parameters alone
            backend = select_backend(x, self.k, self.dilation[0])
            if backend != 'reference':
                return in_one_pass(functools.partial(fused_transform, backend, x, weight, bias), x, residual, relu)
            # Like BatchNorm2d, follow the input's dtype when the parameters are wider (autocast, bf16 activations).
            weight, bias = (value if value.dtype == x.dtype else value.to(x.dtype) for value in (weight, bias))
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return with_tail(y, residual, relu)

    def extra_repr(self) -> str:
        return f'{self.num_features}, kernel_size={self.k}, dilation={self.dilation[0]}'


class BNET(nn.Module):
    """``y = DWConv_k((x - mean) / sqrt(var + eps)) + bias``, a drop-in for BatchNorm2d (paper, eq. 5, Algorithm 1).

    The convolution has stride 1 and pads with zeros after the normalisation, so that border pixels see the mean.
    ``k=1`` is plain BN. Statistics, running buffers and ``num_batches_tracked`` are the normaliser's own; whether batch
    or running statistics are used follows ``self.norm.training``, the flag that ``norm_eval=True`` sets in batch norms.

    Args:
        num_features: Number of channels C.
        k: Size of the depthwise kernel, odd.
        dilation: Spacing of its taps.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics, as in BatchNorm2d; None for their plain average.
        track_running_stats: Keep running statistics for evaluation, as in BatchNorm2d.
        norm: The normaliser, whose affine the transform replaces: 'BN', 'SyncBN', 'GN', 'IN', 'SN', 'SyncSN' or 'CBN',
            or a dict of ``type`` and the options of that norm, such as ``dict(type='GN', num_groups=32)``. The options
            above are its defaults; momentum and track_running_stats are refused where the normaliser has none.

    Shapes:
        input and output: (N, C, H, W).

    Raises:
        ValueError: For an unknown option, an even k, a k, dilation or num_features below 1, or a normaliser that is
            none of these; in forward for an input that is not 4-D, has another channel count, or has a single value
            per channel in training mode.

    A checkpoint of the normaliser with its affine, such as BatchNorm2d's, loads and keeps its function; see
    :mod:`bnet_mm.checkpoint.layouts`. ``convert_sync_batchnorm`` makes batch statistics synchronised ones.
    """

    _abbr_ = 'bn'  # host blocks call it bn1, bn2, bn3, as they call BN
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_features: int,
        k: int = 3,
        dilation: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        norm: str | dict[str, Any] = 'BN',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(BNET).parameters if name not in ('num_features', 'unknown')]
            hint = '; where belongs to WithBNET or enhance, which choose norms in a model' if 'where' in unknown else ''
            raise ValueError(f'BNET: unknown option {", ".join(unknown)}; it takes {", ".join(known)}{hint}')
        check_positive_int('BNET', 'num_features', num_features)
        check_positive_int('BNET', 'k', k, odd=True)
        check_positive_int('BNET', 'dilation', dilation)
        options = dict(eps=eps, momentum=momentum, track_running_stats=track_running_stats)
        self.norm: Normaliser = build_normaliser(norm, num_features, options).to(device=device, dtype=dtype)
        self.bnconv = DepthwiseTransform(num_features, k, dilation, device=device, dtype=dtype)

    @classmethod
    def from_norm(cls, norm: Duck, k: int = 3, dilation: int = 1) -> BNET:
        """A BNET over a copy of ``norm``, with its function, statistics, mode, device and ``requires_grad``.

        Args:
            norm: A batch, synchronised, group, instance, switchable or cross-iteration norm, with or without affine.

        Raises:
            ValueError: For any other module.
        """
        normaliser = without_affine(norm)
        reference = next((t for t in (norm.weight, *norm.buffers()) if t is not None), torch.empty(0))
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        layer = cls(channels, k, dilation, device=reference.device, dtype=reference.dtype)
        layer.norm = normaliser
        with torch.no_grad():
            if norm.weight is not None:
                layer.bnconv.centre_tap().copy_(norm.weight)
            if norm.bias is not None:
                layer.bnconv.bias.copy_(norm.bias)
        for name in ('weight', 'bias'):
            if getattr(norm, name) is not None:
                getattr(layer.bnconv, name).requires_grad_(getattr(norm, name).requires_grad)
        layer.training = layer.bnconv.training = norm.training
        return layer

    def is_affine(self) -> bool:
        """Whether the transform is only a scale and shift: all taps but the centre are 0."""
        others = self.bnconv.weight.detach().clone()
        others[:, 0, self.bnconv.k // 2, self.bnconv.k // 2] = 0
        return not others.any()

    def to_norm(self) -> nn.Module:
        """The normaliser, with centre taps and bias as its affine; torch's SyncBatchNorm for synchronised statistics.

        Raises:
            ValueError: If the other taps are not 0.
        """
        if not self.is_affine():
            raise ValueError(f'BNET: a norm has no taps off the centre, this layer of {self.num_features} channels has')
        values = dict(weight=self.bnconv.centre_tap(), bias=self.bnconv.bias)
        affine = {
            name: nn.Parameter(value.detach().clone(), requires_grad=getattr(self.bnconv, name).requires_grad)
            for name, value in values.items()
        }
        return with_affine(self.norm, **affine)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Conversions of torch and mmengine put their SyncBatchNorm here; ours does the same, on CPUs too."""
        if name == 'norm' and is_foreign_sync_batch_norm(module):
            module = self.norm if isinstance(self.norm, CBN) else SyncBatchNorm.from_host(module)
        super().add_module(name, module)

    @property
    def num_features(self) -> int:
        return self.bnconv.num_features

    @property
    def weight(self) -> Tensor:
        """BN's gamma (C,): the centre taps, but no parameter.

        Hosts that write 0 or 1 to a norm's weight write to the taps. Optimizers that collect every module's ``weight``
        and ``bias`` find each parameter once, in ``bnconv``.
        """
        return self.bnconv.centre_tap().detach()

    @property
    def bias(self) -> Tensor:
        """BN's beta (C,), likewise."""
        return self.bnconv.bias.detach()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raise a ValueError: pruning and reparametrisation of this layer are those of its taps."""
        raise ValueError(f'BNET: it has no parameter of its own to register as {name!r}; its taps are bnconv.weight')

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``act(BNET(x) + residual)``; kernels do it in one pass over the maps where ``residual`` is a map like x.

        Args:
            x: (N, C, H, W).
            residual: Added to the output as torch adds, with its broadcasting and type promotion; None for nothing.
            relu: Whether act is ReLU, else the identity.
        """
        # Modules, parameters and buffers take a microsecond to find as attributes; not so in these dicts.
        norm: Duck = self._modules['norm']
        transform: Duck = self._modules['bnconv']
        needs_several_values = isinstance(norm, nn.BatchNorm2d) and uses_batch_statistics(norm)
        check_input(x, transform.out_channels, needs_several_values)
        y = self._fused(x, residual, relu, norm, transform)
        return with_tail(transform(norm(x)), residual, relu) if y is None else y

    def _fused(self, x: Tensor, residual: Tensor | None, relu: bool, norm: Duck, transform: Duck) -> Tensor | None:
        """``act(transform(norm(x)) + residual)`` in one pass; None where modules have to run one after the other."""
        # A wrapper in its place, such as FSDP's, has the taps only while it is called itself.
        if is_symbolic(x) or not isinstance(transform, DepthwiseTransform) or has_hooks(transform):
            return None
        backend = select_backend(x, transform.kernel_size[0], transform.dilation[0])
        if backend == 'reference':
            return None
        weight, bias = transform.weight, transform.bias
        whole = statistics_of_whole_norm(norm, x, weight, bias)
        if whole is not None:
            return in_one_pass(functools.partial(fused_norm, backend, x, weight, bias, *whole), x, residual, relu)
        found = statistics(norm, x)
        if found is None:
            return None
        maps, mean, var = found
        rstd = (var.to(torch.promote_types(x.dtype, torch.float32)) + norm.eps).rsqrt()
        return in_one_pass(functools.partial(fused_bnet, maps, mean, rstd, weight, bias), x, residual, relu)

    def extra_repr(self) -> str:
        return f'backend={describe_backend(self.bnconv.weight, self.bnconv.k, self.bnconv.dilation[0])}'

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        adapt_bnet_keys(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)
