"""The tail of a residual block, its last norm, the sum with the shortcut and ReLU, in one pass over the maps.

``relu(bn3(conv3(x)) + identity)`` takes a pass for each of the three, over the largest maps of a network; BNET does it
in one. A block whose forward is known (blocks.py) gets a class that calls ``bn3(conv3(x), identity, relu=True)``, and
the host's own forward whenever anything is in between or looks at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (  # torch's own question, _has_any_global_hook, is newer than torch 2.6
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from bnet_mm.layers import BNET
from bnet_mm.layers.arguments import Duck, is_symbolic
from bnet_mm.layers.bnet import DepthwiseTransform
from bnet_mm.layers.normalisers import has_hooks
from bnet_mm.ops.dispatch import is_exporting
from bnet_mm.surgery.activations import FReLUBlock
from bnet_mm.surgery.blocks import (
    RESNETS,
    Block,
    ResNetBlock,
    change_class,
    host_class,
    known_forward,
    residual_blocks,
)
from bnet_mm.surgery.positions import norm_names


class FusedTail(Block):
    """A block that runs its tail in one pass where it can, and else the host's own forward."""

    if TYPE_CHECKING:
        relu: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if is_symbolic(x) or torch.jit.is_tracing() or is_exporting() or self.why_not_fused():
            return self.host_class.forward(self, x)
        return self._checkpointed(self._fused, x)

    def why_not_fused(self) -> str:
        """Why the host's own forward runs, as the block is now; empty if the tail runs in one pass."""
        norm = self._last_norm()
        if norm is None or type(norm) not in (BNET, DepthwiseTransform):  # the latter is what folding leaves of BNET
            return f'the last norm is {type(norm).__name__}'
        if type(self.relu) is not nn.ReLU:
            return f'the activation is {type(self.relu).__name__}'
        every_module = (
            _global_forward_pre_hooks or _global_forward_hooks or _global_backward_pre_hooks or _global_backward_hooks
        )
        if has_hooks(norm) or has_hooks(self.relu) or every_module:
            return 'norm or activation has hooks'
        return self._why_not_in_between()

    def _last_norm(self) -> nn.Module | None:
        raise NotImplementedError

    def _why_not_in_between(self) -> str:
        """What else than the tail is between the last convolution and the end."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FusedResNetBlock(FusedTail, ResNetBlock):
    """For the blocks of :data:`RESNETS`."""

    def _last_norm(self) -> nn.Module:
        return self._norm(len(self._convolutions()))

    def _why_not_in_between(self) -> str:
        if self._plugin_names(len(self._convolutions())):
            return 'a plugin follows the last norm'
        drop_path = getattr(self, 'drop_path', None)  # mmpretrain
        active = drop_path is not None and not isinstance(drop_path, nn.Identity) and drop_path.training
        if active or (drop_path is not None and has_hooks(drop_path)):
            return f'{type(drop_path).__name__} follows the last norm'
        return ''

    def _fused(self, x: Tensor) -> Tensor:
        *inner, last = self._convolutions()
        identity = self._shortcut(x)  # first, while there is no large map beside its own
        out = x
        for i, conv in enumerate(inner, 1):
            out = conv(out)  # one step at a time: what a nested call was given would live until all of it returns
            out = self._norm(i)(out)
            out = self._plugins(i, self.relu(out))
        out = last(out)
        return self._last_norm()(out, identity, relu=True)


class FusedConvModuleBlock(FusedTail):
    """For the blocks of :data:`RESNETS_OF_CONV_MODULES`."""

    def _last_norm(self) -> nn.Module | None:
        return getattr(self._convolutions()[-1], 'norm', None)

    def _why_not_in_between(self) -> str:
        last: Duck = self._convolutions()[-1]
        plain = (
            type(last).__name__ == 'ConvModule'
            and last.order == ('conv', 'norm', 'act')
            and not last.with_activation
            and not last.with_explicit_padding
            and getattr(last, 'efficient_conv_bn_eval_forward', None) is None
        )
        return '' if plain and not has_hooks(last) else 'the last ConvModule does more than convolution and norm'

    def _fused(self, x: Tensor) -> Tensor:
        convolutions: list[Duck] = self._convolutions()
        identity = self._shortcut(x)
        out = x
        for conv in convolutions[:-1]:
            out = conv(out)
        last = convolutions[-1]
        out = last.conv(out)
        return last.norm(out, identity, relu=True)


def fuse_tails(model: nn.Module) -> dict[str, str]:
    """Let the residual blocks whose last norm is BNET run their tails in one pass, in place.

    Returns:
        Name of each of these blocks -> why it cannot; empty if it can.
    """
    reasons = {}
    for name, block in residual_blocks(model):
        last = norm_names(block).get('C', [''])[-1]
        if not isinstance(block.get_submodule(last), BNET):
            continue
        module = known_forward(block)
        if isinstance(block, FReLUBlock):
            reasons[name] = 'the activation is FReLU'
        elif module is None or 'forward' in block.__dict__:
            reasons[name] = f'the forward of {host_class(block).__qualname__} is none of those that are known'
        else:
            ours: type[FusedTail] = FusedResNetBlock if module in RESNETS else FusedConvModuleBlock
            change_class(block, ours)
            reasons[name] = block.why_not_fused()
    return reasons


def unfuse_tails(model: nn.Module) -> None:
    """Give blocks their host's class back, in place."""
    for block in model.modules():
        if isinstance(block, FusedTail):
            block.__class__ = block.host_class  # type: ignore[assignment]
