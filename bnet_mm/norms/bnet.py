"""BNET: batch normalisation with an enhanced linear transformation.

Paper: Xu et al., "Batch Normalization with Enhanced Linear Transformation", arXiv 2011.14150, section 3.2.

Differences from the official code: the layer holds its normaliser instead of inheriting from BatchNorm2d (the host
converts, fuses and initialises every ``_BatchNorm`` it sees and would drop the convolution), and it starts as the
identity, so that a fresh BNET equals a fresh BN.
"""

from __future__ import annotations

from numbers import Integral

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.checkpoint.layouts import adapt_bnet_keys


def check_positive_int(name: str, value: object, odd: bool = False) -> None:
    """Raise a ValueError that names the argument unless ``value`` is a positive (and, if asked, odd) int."""
    allowed = 'a positive odd integer' if odd else 'a positive integer'
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1 or (odd and value % 2 == 0):
        raise ValueError(f'BNET: {name} must be {allowed}, got {value!r}')


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
            'use a larger batch or map, or eval()'
        )


class DepthwiseTransform(nn.Module):
    """The k x k depthwise convolution with bias that replaces the affine of a norm (eq. 5).

    Not an ``nn.Conv2d``: the OpenMMLab default initialisation would overwrite the identity start of one.

    Shapes:
        weight: (C, 1, k, k); bias: (C,); input and output: (N, C, H, W).
    """

    def __init__(self, num_features: int, k: int, dilation: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features, self.k, self.dilation = num_features, k, dilation
        self.weight = nn.Parameter(torch.empty(num_features, 1, k, k, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity: centre tap 1, other taps 0, bias 0."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.centre_tap())
        nn.init.zeros_(self.bias)

    def centre_tap(self) -> Tensor:
        """View (C,) of the taps that multiply the pixel itself: BN's gamma."""
        return self.weight[:, 0, self.k // 2, self.k // 2]

    def forward(self, x: Tensor) -> Tensor:
        # Like BatchNorm2d, follow the input's dtype when the parameters are wider (autocast, bf16 activations).
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        padding = self.dilation * (self.k // 2)
        return F.conv2d(x, weight, bias, padding=padding, dilation=self.dilation, groups=self.num_features)

    def extra_repr(self) -> str:
        return f'{self.num_features}, kernel_size={self.k}, dilation={self.dilation}'


class BNET(nn.Module):
    """``y = DWConv_k((x - mean) / sqrt(var + eps)) + bias``, a drop-in for BatchNorm2d (paper, eq. 5, Algorithm 1).

    The convolution has stride 1 and pads with zeros after the normalisation, so that border pixels see the mean.
    ``k=1`` is plain BN. Statistics, running buffers and ``num_batches_tracked`` are BatchNorm2d's own; whether batch
    or running statistics are used follows ``self.norm.training``, the flag that ``norm_eval=True`` sets.

    Args:
        num_features: Number of channels C.
        k: Size of the depthwise kernel, odd.
        dilation: Spacing of its taps.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics, as in BatchNorm2d; None for their plain average.
        track_running_stats: Keep running statistics for evaluation, as in BatchNorm2d.

    Shapes:
        input and output: (N, C, H, W).

    Raises:
        ValueError: For an even k, a k, dilation or num_features below 1; in forward for an input that is not 4-D,
            has another channel count, or has a single value per channel in training mode.

    A BatchNorm2d checkpoint loads and keeps its function; see :mod:`bnet_mm.checkpoint.layouts`.
    """

    _abbr_ = 'bn'  # host blocks call it bn1, bn2, bn3, as they call BN

    def __init__(
        self,
        num_features: int,
        k: int = 3,
        dilation: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int('num_features', num_features)
        check_positive_int('k', k, odd=True)
        check_positive_int('dilation', dilation)
        self.norm = nn.BatchNorm2d(
            num_features,
            eps,
            momentum,
            affine=False,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
        self.bnconv = DepthwiseTransform(num_features, k, dilation, device=device, dtype=dtype)

    @classmethod
    def from_batch_norm(cls, norm: nn.modules.batchnorm._BatchNorm, k: int = 3, dilation: int = 1) -> BNET:
        """A BNET with the function, statistics, mode, device and ``requires_grad`` of a (Sync)BatchNorm layer."""
        reference = norm.running_mean if norm.weight is None else norm.weight
        options = {} if reference is None else {'device': reference.device, 'dtype': reference.dtype}
        layer = cls(norm.num_features, k, dilation, norm.eps, norm.momentum, norm.track_running_stats, **options)
        if norm.track_running_stats:
            layer.norm.load_state_dict({name: value for name, value in norm.named_buffers()})
        with torch.no_grad():
            if norm.weight is not None:
                layer.bnconv.centre_tap().copy_(norm.weight)
            if norm.bias is not None:
                layer.bnconv.bias.copy_(norm.bias)
        if isinstance(norm, nn.SyncBatchNorm):
            layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer, norm.process_group)
        if norm.weight is not None:
            layer.requires_grad_(norm.weight.requires_grad)
        return layer.train(norm.training)

    @property
    def num_features(self) -> int:
        return self.bnconv.num_features

    @property
    def weight(self) -> Tensor:
        """BN's gamma: a view (C,) of the centre taps. Host code that writes 0 or 1 to a norm's weight stays right."""
        return self.bnconv.centre_tap()

    @property
    def bias(self) -> Tensor:
        """BN's beta (C,)."""
        return self.bnconv.bias

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_features, self.norm.training and not isinstance(self.norm, nn.SyncBatchNorm))
        return self.bnconv(self.norm(x))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        adapt_bnet_keys(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)
