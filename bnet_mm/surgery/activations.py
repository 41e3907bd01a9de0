"""FReLU in the place of the activations of a built ResNet, whose blocks are written with ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from bnet_mm.layers import FReLU
from bnet_mm.surgery.positions import norm_names


class BlockFReLUs(nn.ModuleList):
    """Stands for the one ReLU that a residual block calls several times: a FReLU for each call, in their order."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__(FReLU(width) for width in widths)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self[(self.calls - 1) % len(self)](x)


def _start_block(block: nn.Module, inputs: tuple) -> None:
    block.relu.calls = 0


def use_frelu(model: nn.Module) -> None:
    """Replace the activations in the residual blocks of a ResNet, in place, but for the stem's and the last stage's.

    That is where the official FReLU code has them (three in each bottleneck of stages 1 to 3).

    Raises:
        ValueError: If the model has no ``layer1`` to ``layer3`` of blocks with a ``relu``.
    """
    stages = [getattr(model, f'layer{i}', None) for i in (1, 2, 3)]
    blocks = [m for stage in stages if stage is not None for m in stage.modules() if norm_names(m)]
    if None in stages or not blocks or not all(isinstance(getattr(block, 'relu', None), nn.ReLU) for block in blocks):
        raise ValueError(f'use_frelu: {type(model).__name__} has no stages layer1 to layer3 of blocks with one relu')
    for block in blocks:
        widths = [block.get_submodule(name).num_features for names in norm_names(block).values() for name in names]
        block.relu = BlockFReLUs(widths)
        block.relu.requires_grad_(block.conv1.weight.requires_grad)  # frozen stages
        block.register_forward_pre_hook(_start_block)
