"""FReLU in the place of the activations of a built ResNet, whose blocks are written with ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, SupportsIndex

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnet_mm.layers import FReLU
from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.positions import norm_names

# Where the blocks come from whose forward is the one below, but for the activations.
KNOWN_FORWARDS = (
    'mmdet.models.backbones.resnet', 'mmpretrain.models.backbones.resnet', 'mmseg.models.backbones.resnet',
    'torchvision.models.resnet',
)  # fmt: skip


BLOCK_CLASSES: dict[type[nn.Module], type[FReLUBlock]] = {}  # the host's -> ours


class FReLUBlock(nn.Module):
    """A basic or bottleneck block with an activation of its own after each convolution: a list ``relu`` of FReLUs.

    The hosts' blocks have one ReLU, which they call several times; which call it is could only be counted, and counters
    are wrong for threads, recomputation (``with_cp``) and after an exception. So this is their forward once more.
    """

    if TYPE_CHECKING:  # what the hosts' blocks have; torch.jit.trace would read it
        relu: nn.ModuleList
        downsample: nn.Module | None
        drop_path: nn.Module
        forward_plugin: Callable[[Tensor, list[str]], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, 'with_cp', False) and x.requires_grad:
            return self.relu[-1](checkpoint(self._residual, x, use_reentrant=False))
        return self.relu[-1](self._residual(x))

    def _residual(self, x: Tensor) -> Tensor:
        out, last = x, len(self.relu)
        for i in range(1, last + 1):
            norm = getattr(self, getattr(self, f'norm{i}_name', f'bn{i}'))
            out = norm(getattr(self, f'conv{i}')(out))
            if i < last:
                out = self.relu[i - 1](out)
            if getattr(self, 'with_plugins', False):  # mmdet, mmseg
                out = self.forward_plugin(out, getattr(self, f'after_conv{i}_plugin_names'))
        if hasattr(self, 'drop_path'):  # mmpretrain
            out = self.drop_path(out)
        return out + (x if self.downsample is None else self.downsample(x))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return _empty_block, (type(self).__mro__[2],), self.__dict__  # pickle finds no class that was made at run time


def _block_class(kind: type[nn.Module]) -> type[FReLUBlock]:
    if kind not in BLOCK_CLASSES:
        BLOCK_CLASSES[kind] = type(f'FReLU{kind.__name__}', (FReLUBlock, kind), {})
    return BLOCK_CLASSES[kind]


def _empty_block(kind: type[nn.Module]) -> FReLUBlock:
    block_class = _block_class(kind)
    return block_class.__new__(block_class)


def use_frelu(model: nn.Module) -> None:
    """Replace the activations in the residual blocks of a ResNet, in place, but for the stem's and the last stage's.

    That is where the official FReLU code has them (three in each bottleneck of stages 1 to 3).

    Raises:
        ValueError: If the model has no ``layer1`` to ``layer3`` of the basic or bottleneck blocks of mmdet's, mmseg's,
            mmpretrain's or torchvision's ResNet or ResNeXt, or has FReLU already; the model is as it was.
    """
    title = f'use_frelu: {type(model).__name__}'
    stages: list[Duck] = [getattr(model, f'layer{i}', None) for i in (1, 2, 3)]
    blocks = [m for stage in stages if stage is not None for m in stage.modules() if norm_names(m)]
    if None in stages or not blocks:
        raise ValueError(f'{title} has no stages layer1 to layer3 of residual blocks')
    for block in blocks:
        if type(block).forward.__module__ not in KNOWN_FORWARDS or not isinstance(block.relu, nn.ReLU):
            raise ValueError(
                f'{title} has blocks of {type(block).__module__}.{type(block).__qualname__}; known are those of '
                f'{", ".join(KNOWN_FORWARDS)}, with ReLU'
            )
    for block in blocks:
        widths = [block.get_submodule(name).num_features for names in norm_names(block).values() for name in names]
        block.relu = nn.ModuleList(FReLU(width) for width in widths)
        block.relu.requires_grad_(block.conv1.weight.requires_grad)  # frozen stages
        block.relu.train(block.training)
        block.__class__ = _block_class(type(block))
