"""Residual blocks whose forward is exactly known, and classes with another forward in its place.

What follows a norm in a block is in the forward of the host's class. To change that without a change of the host, a
block gets a class that is made at run time and inherits from its own. It keeps the name of the host's class, its place
in ``isinstance``, its children and its state, and is pickled as the host's class and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, SupportsIndex

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.positions import norm_names

# Where the blocks come from that are conv1, bn1, relu, conv2, bn2 and so on.
RESNETS = (
    'mmdet.models.backbones.resnet', 'mmpretrain.models.backbones.resnet', 'mmseg.models.backbones.resnet',
    'torchvision.models.resnet',
)  # fmt: skip
# The same with mmcv's ConvModules conv1, conv2 and so on, the last of which has no activation.
RESNETS_OF_CONV_MODULES = ('mmaction.models.backbones.resnet',)

MADE: dict[tuple[type[Block], type[nn.Module]], type[Block]] = {}  # our class and the host's -> both in one


class Block(nn.Module):
    """A block of a host with a forward of ours: the base of the classes that :func:`change_class` makes."""

    host_class: ClassVar[type[nn.Module]]
    our_class: ClassVar[type[Block]]
    if TYPE_CHECKING:  # what the hosts' blocks have; torch.jit.trace would read it
        conv1: nn.Module
        conv2: nn.Module
        conv3: nn.Module
        downsample: nn.Module | None

    def _checkpointed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if getattr(self, 'with_cp', False) and x.requires_grad:
            return checkpoint(function, x, use_reentrant=False)
        return function(x)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def _convolutions(self) -> list[nn.Module]:
        return [self.conv1, self.conv2, self.conv3] if hasattr(self, 'conv3') else [self.conv1, self.conv2]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        reduced = tuple(super().__reduce_ex__(protocol))  # by the name of a class, pickle finds the host's
        return _empty_block, (self.our_class, self.host_class), *reduced[2:]


class ResNetBlock(Block):
    """A block of :data:`RESNETS`."""

    if TYPE_CHECKING:
        forward_plugin: Callable[[Tensor, list[str]], Tensor]

    def _norm(self, i: int) -> nn.Module:
        return getattr(self, getattr(self, f'norm{i}_name', f'bn{i}'))

    def _plugins(self, i: int, x: Tensor) -> Tensor:
        names = self._plugin_names(i)
        return self.forward_plugin(x, names) if names else x

    def _plugin_names(self, i: int) -> list[str]:
        return getattr(self, f'after_conv{i}_plugin_names') if getattr(self, 'with_plugins', False) else []


def host_class(block: nn.Module) -> type[nn.Module]:
    """The host's class of a block, whether its class has been changed or not."""
    return block.host_class if isinstance(block, Block) else type(block)


def known_forward(block: nn.Module) -> str | None:
    """Which of the modules listed here the host's forward of a residual block comes from; None for any other."""
    module = host_class(block).forward.__module__
    return module if module in (*RESNETS, *RESNETS_OF_CONV_MODULES) else None


def change_class(block: nn.Module, our_class: type[Block]) -> None:
    """Give a block the forward of ``our_class``, in place."""
    block.__class__ = _made_class(our_class, host_class(block))


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, Duck]]:
    """Every residual block with known norms (positions.py), by its first name."""
    return ((name, block) for name, block in model.named_modules() if norm_names(block))


def _made_class(ours: type[Block], host: type[nn.Module]) -> type[Block]:
    if (ours, host) not in MADE:
        names = dict(__module__=host.__module__, __qualname__=host.__qualname__, __doc__=host.__doc__)
        MADE[ours, host] = type(host.__name__, (ours, host), dict(names, host_class=host, our_class=ours))
    return MADE[ours, host]


def _empty_block(ours: type[Block], host: type[nn.Module]) -> Block:
    kind = _made_class(ours, host)
    return kind.__new__(kind)
