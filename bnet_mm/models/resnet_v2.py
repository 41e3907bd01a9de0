"""ResNet v2, with norm and ReLU before the convolutions (He et al., "Identity Mappings in Deep Residual Networks",
ECCV 2016, arXiv 1603.05027), in the layout of the switchable-norm models, whose checkpoints it reads.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule
from mmpretrain.models.backbones.resnet import ResNet
from torch import Tensor, nn


class PreActivationBottleneck(BaseModule):
    """``x + conv3(relu(norm3(conv2(relu(norm2(conv1(relu(norm1(x)))))))))`` (section 4.2, figure 4e).

    Where the shape changes, the shortcut is a 1x1 convolution, without a norm, of ``relu(norm1(x))``. The norms and
    convolutions are registered in the order in which they are computed.

    Args:
        in_channels, out_channels: Number of channels.
        expansion: Channels outside by channels inside.
        stride: Of the 3x3 convolution.
        dilation: Of the 3x3 convolution.
        downsample: The host's sequence of convolution and norm, of which the convolution is kept.
        conv_cfg, norm_cfg: Configs of the convolutions and norms.
        ignored: What the host passes to its own blocks.

    Shapes:
        input (N, in_channels, H, W); output (N, out_channels, H / stride, W / stride).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int = 4,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Sequential | None = None,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        middle = out_channels // expansion
        options = [
            dict(kernel_size=1),
            dict(kernel_size=3, stride=stride, padding=dilation, dilation=dilation),
            dict(kernel_size=1),
        ]
        channels = [in_channels, middle, middle, out_channels]
        for i in range(3):
            name, norm = build_norm_layer(norm_cfg or dict(type='BN'), channels[i], postfix=i + 1)
            setattr(self, f'norm{i + 1}_name', name)
            self.add_module(name, norm)
            conv = build_conv_layer(conv_cfg, channels[i], channels[i + 1], bias=False, **options[i])
            self.add_module(f'conv{i + 1}', conv)
        self.downsample = None if downsample is None else downsample[0]
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        active = self._activate(x, 1)
        shortcut = x if self.downsample is None else self.downsample(active)
        out = self.conv2(self._activate(self.conv1(active), 2))
        return self.conv3(self._activate(out, 3)) + shortcut

    def _activate(self, x: Tensor, i: int) -> Tensor:
        norm = getattr(self, getattr(self, f'norm{i}_name'))
        return F.relu(norm(x))


class ResNetV2(ResNet):
    """Pre-activation ResNet-50, -101 or -152 with the stem of ResNet v1, and norm and ReLU after the last stage.

    With ``norm_cfg=dict(type='SN')`` the norms are called ``sn1``, ``sn2``, ``sn3`` and, at the end, ``sn_out``.

    Args:
        depth: 50, 101 or 152.
        norm_cfg: Config of all norms.
        conv_cfg: Config of all convolutions.
        frozen_stages, norm_eval: As in mmpretrain's ResNet.
        init_cfg: Initialisation; None for that of mmpretrain's ResNet.

    Shapes:
        input (N, 3, H, W); output a tuple of one map (N, 2048, H / 32, W / 32).
    """

    arch_settings = {depth: (PreActivationBottleneck, ResNet.arch_settings[depth][1]) for depth in (50, 101, 152)}

    def __init__(
        self,
        depth: int,
        norm_cfg: dict[str, Any] | None = None,
        conv_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        options: dict[str, Any] = dict(norm_cfg=norm_cfg or dict(type='BN'), conv_cfg=conv_cfg, norm_eval=norm_eval)
        if init_cfg is not None:
            options['init_cfg'] = init_cfg
        super().__init__(depth, frozen_stages=frozen_stages, **options)
        self.norm_out_name, norm_out = build_norm_layer(self.norm_cfg, self.feat_dim, postfix='_out')
        self.add_module(self.norm_out_name, norm_out)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        (x,) = super().forward(x)
        return (F.relu(getattr(self, self.norm_out_name)(x)),)
