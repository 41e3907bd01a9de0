"""FReLU (Ma et al., "Funnel Activation for Visual Recognition", arXiv 2007.11824; BNET paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnet_mm.layers.arguments import Duck, check_positive_int


class FReLU(nn.Module):
    """``max(x, BN(DWConv_3x3(x)))``: ``act_cfg=dict(type='FReLU')``.

    Args:
        num_features: Number of channels C. Hosts do not tell an activation its channels: with None it takes those of
            the convolution that the module that holds it registered before it, as in ``ConvModule``.
        kernel_size: Size of the depthwise kernel, odd.
        device, dtype: Of its parameters; those of that convolution if num_features is None.
        inplace: Ignored; hosts pass it to every activation, and this one needs its input.

    Shapes:
        input and output: (N, C, H, W).

    Raises:
        ValueError: For an even kernel_size, or a number below 1.
        RuntimeError: In forward, if the number of channels is not known.
    """

    def __init__(
        self,
        num_features: int | None = None,
        kernel_size: int = 3,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int('FReLU', 'kernel_size', kernel_size, odd=True)
        self.kernel_size = kernel_size
        self.conv: nn.Conv2d | None = None
        self.bn: nn.BatchNorm2d | None = None
        if num_features is not None:
            check_positive_int('FReLU', 'num_features', num_features)
            self._build(num_features, device=device, dtype=dtype)

    def _build(self, num_features: int, **options) -> None:
        self.conv = nn.Conv2d(
            num_features,
            num_features,
            self.kernel_size,
            padding=self.kernel_size // 2,
            groups=num_features,
            bias=False,
            **options,
        )
        self.bn = nn.BatchNorm2d(num_features, **options)

    def follow_registered(self, convolution: Duck) -> None:
        """Take the number of channels from the convolution that was registered before this activation."""
        if self.conv is None and hasattr(convolution, 'out_channels'):
            weight = convolution.weight
            self._build(convolution.out_channels, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None or self.bn is None:
            raise RuntimeError('FReLU: no convolution is known before this activation; give num_features')
        return torch.maximum(x, self.bn(self.conv(x)))
