"""Bi-Real Net (Liu et al., "Bi-Real Net: Enhancing the Performance of 1-bit CNNs", ECCV 2018, arXiv 1808.00278).

A ResNet of basic blocks whose 3x3 convolutions have binary inputs and binary weights. Stem, projections of the
shortcuts and classifier stay real.

Two points differ from the paper, both as in its official PyTorch code: the gradient of the weights is not multiplied by
their magnitude (section 3.3; Adam, with which these networks are trained, does not see the difference), and there is no
ReLU anywhere. Weights start as the host initialises convolutions, not as small positive numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _BinaryActivation(torch.autograd.Function):
    """Forward: -1 below 0, else 1. Backward: the derivative 2 - 2|x| of a piecewise polynomial on [-1, 1], else 0."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x < 0, -1, 1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (2 - 2 * x.abs()).clamp(min=0)


class _BinaryWeight(torch.autograd.Function):
    """Forward: the sign, scaled by the mean |weight| of each filter. Backward: straight through where |weight| <= 1."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.sign() * weight.abs().mean(dim=(1, 2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return gradient * (weight.abs() <= 1)


def binary_activation(x: Tensor) -> Tensor:
    """Sign of the activations, with the gradient of section 3.3 (ApproxSign): any shape, 1 at 0."""
    return _BinaryActivation.apply(x)


def binary_weight(weight: Tensor) -> Tensor:
    """``mean(|w|) * sign(w)`` for each output channel of a weight (O, I, k, k)."""
    return _BinaryWeight.apply(weight)


class BinaryConv2d(nn.Conv2d):
    """Convolution of the signs of its input with the scaled signs of its weight. A convolution for ``conv_cfg``.

    Args, shapes and state dict: As ``nn.Conv2d``. Padding is 0, which no sign is.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = binary_weight(self.weight)
        return F.conv2d(binary_activation(x), weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BiRealBlock(BasicBlock):
    """Two binary 3x3 convolutions, each with a norm and a shortcut of its own (section 3.2, figure 3b).

    Args: As mmpretrain's BasicBlock. ``downsample`` is the shortcut around the first convolution.
    """

    def __init__(self, *args: Any, conv_cfg: None = None, **kwargs: Any) -> None:
        super().__init__(*args, conv_cfg=dict(type='BinaryConv2d'), **kwargs)
        del self.relu

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x)) + shortcut
        return self.norm2(self.conv2(x)) + x


class BiRealResNet(ResNet):
    """Bi-Real ResNet-18 or -34; BNET's position A is the norm after a block's first convolution, C after its second.

    Args:
        depth: 18 or 34.
        norm_cfg: Config of all norms.
        out_indices: Which stages' outputs to return.
        frozen_stages, norm_eval: As in mmpretrain's ResNet.
        init_cfg: Initialisation; None for that of mmpretrain's ResNet.
        base_channels: Channels of the stem and of the first stage.

    Shapes:
        input (N, 3, H, W); output a tuple of (N, base_channels * 2^i, H / 2^(i+2), W / 2^(i+2)) for the stages i.
    """

    arch_settings = {18: (BiRealBlock, (2, 2, 2, 2)), 34: (BiRealBlock, (3, 4, 6, 3))}

    def __init__(
        self,
        depth: int = 18,
        norm_cfg: dict[str, Any] | None = None,
        out_indices: tuple[int, ...] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        base_channels: int = 64,
    ) -> None:
        options = {} if init_cfg is None else dict(init_cfg=init_cfg)
        super().__init__(
            depth,
            stem_channels=base_channels,
            base_channels=base_channels,
            norm_cfg=norm_cfg or dict(type='BN'),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            avg_down=True,  # 2x2 average pooling before the 1x1 projection
            zero_init_residual=False,
            **options,
        )
        self.relu = nn.Identity()
