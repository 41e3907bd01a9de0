"""FReLU in the place of the activations of a built ResNet, whose blocks are written with ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bnet_mm.layers import FReLU
from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.blocks import RESNETS, ResNetBlock, change_class, host_class, known_forward
from bnet_mm.surgery.positions import norm_names


class FReLUBlock(ResNetBlock):
    """A basic or bottleneck block with an activation of its own after each convolution: a list ``relu`` of FReLUs.

    The hosts' blocks have one ReLU, which they call several times; which call it is could only be counted, and counters
    are wrong for threads, recomputation (``with_cp``) and after an exception. So this is their forward once more.
    """

    if TYPE_CHECKING:
        relu: nn.ModuleList
        drop_path: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.relu[-1](self._checkpointed(self._residual, x))

    def _residual(self, x: Tensor) -> Tensor:
        out, convolutions = x, self._convolutions()
        for i, conv in enumerate(convolutions, 1):
            out = self._norm(i)(conv(out))
            if i < len(convolutions):
                out = self.relu[i - 1](out)
            out = self._plugins(i, out)
        if hasattr(self, 'drop_path'):  # mmpretrain
            out = self.drop_path(out)
        return out + self._shortcut(x)


def use_frelu(model: nn.Module) -> None:
    """Replace the activations in the residual blocks of a ResNet, in place, but for the stem's and the last stage's.

    That is where the official FReLU code has them (three in each bottleneck of stages 1 to 3).

    Raises:
        ValueError: If the model has no ``layer1`` to ``layer3`` of the basic or bottleneck blocks of mmdet's, mmseg's,
            mmpretrain's or torchvision's ResNet or ResNeXt, or these have another activation than ReLU; the model is
            as it was.
    """
    title = f'use_frelu: {type(model).__name__}'
    stages: list[Duck] = [getattr(model, f'layer{i}', None) for i in (1, 2, 3)]
    blocks = [m for stage in stages if stage is not None for m in stage.modules() if norm_names(m)]
    if None in stages or not blocks:
        raise ValueError(f'{title} has no stages layer1 to layer3 of residual blocks')
    for block in blocks:
        kind = host_class(block)
        if known_forward(block) not in RESNETS:
            raise ValueError(
                f'{title} has blocks of {kind.__module__}.{kind.__qualname__}; known are those of {", ".join(RESNETS)}'
            )
        if not isinstance(block.relu, nn.ReLU):
            activation = 'FReLU' if isinstance(block, FReLUBlock) else type(block.relu).__name__
            raise ValueError(f'{title} has blocks with {activation} in the place of ReLU')
    for block in blocks:
        widths = [block.get_submodule(name).num_features for names in norm_names(block).values() for name in names]
        block.relu = nn.ModuleList(FReLU(width) for width in widths)
        block.relu.requires_grad_(block.conv1.weight.requires_grad)  # frozen stages
        block.relu.train(block.training)
        change_class(block, FReLUBlock)
