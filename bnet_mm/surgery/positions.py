"""Where the norms of residual blocks are: the positions A, B and C of the paper (section 4.5, Table 10).

In a residual bottleneck, A is the norm after the first 1x1 convolution, B after the 3x3 and C after the last 1x1; in a
basic block, A is the first and C the last norm. In an inverted residual block (MobileNetV2) A is the norm of the
expansion, where the paper has BNET in these networks, B that of the depthwise convolution and C that of the projection.

A further block family takes one more function in ``FAMILIES``.
"""

from __future__ import annotations

from torch import nn

from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.modules import is_norm

POSITIONS = 'ABC'
Names = dict[str, list[str]]


def norm_names(block: nn.Module) -> Names:
    """Position -> names of the norms there, below ``block``; empty for any module that is no known residual block."""
    for family in FAMILIES:
        names = family(block)
        if names:
            # A network that calls its stem as blocks call their layers (HRNet, MobileNetV2) is no block.
            holds_blocks = any(norm_names(child) for child in block.modules() if child is not block)
            return {} if holds_blocks else names
    return {}


def _named_norms(block: Duck) -> Names:
    """``norm1_name`` and so on: ResNet, ResNeXt, RegNet, HRNet, Res2Net, ResNeSt in mmdet, mmseg, mmpretrain."""
    first, second, third = (getattr(block, f'norm{i}_name', None) for i in (1, 2, 3))
    if not first or not second:
        return {}
    if not third:
        return dict(A=[first], C=[second])
    middle = [second]
    if isinstance(getattr(block, 'bns', None), nn.ModuleList):  # Res2Net has one for each scale
        middle = [f'bns.{i}' for i in range(len(block.bns))]
    elif hasattr(getattr(block, 'conv2', None), 'norm0_name'):  # ResNeSt: in its split attention
        middle = [f'conv2.{block.conv2.norm0_name}']
    return dict(A=[first], B=middle, C=[third])


def _conv_modules(block: nn.Module) -> Names:
    """``conv1``, ``conv2`` (and ``conv3``) that hold their norms: mmaction's ResNets, Darknet, CSPDarknet."""
    found = {f'conv{i}': _norm_of_conv_module(block, f'conv{i}') for i in (1, 2, 3)}
    names = {conv: norm for conv, norm in found.items() if norm}
    if isinstance(block, nn.Sequential) or list(names) not in (['conv1', 'conv2'], ['conv1', 'conv2', 'conv3']):
        return {}
    # One after the other, and nothing else beside a shortcut: not YOLO's necks and poolings, not CornerNet's.
    others = [name for name, child in block.named_children() if name not in (*names, 'downsample', 'shortcut')]
    channels = [_channels(getattr(block, conv)) for conv in names]
    in_order = all(before[1] == after[0] for before, after in zip(channels, channels[1:]))
    if not in_order or any(is_norm(module) for name in others for module in getattr(block, name).modules()):
        return {}
    return dict(zip('ABC' if len(names) == 3 else 'AC', ([norm] for norm in names.values())))


def _inverted_residuals(block: nn.Module) -> Names:
    """MobileNetV2 and V3 in mmdet and mmpretrain: three named convolutions, the first of which may be missing."""
    keys = dict(A='expand_conv', B='depthwise_conv', C='linear_conv')
    names = {position: _norm_of_conv_module(block, key) for position, key in keys.items()}
    if not names['B'] or not names['C']:
        return {}
    return {position: [name] for position, name in names.items() if name}


def _sequential_inverted_residuals(block: Duck) -> Names:
    """MobileNetV2 in mmseg, mmpretrain, mmaction and torchvision: a sequence ``conv`` with two or three norms."""
    if 'InvertedResidual' not in type(block).__name__ or not isinstance(getattr(block, 'conv', None), nn.Sequential):
        return {}
    norms = [f'conv.{name}' for name, module in block.conv.named_modules() if is_norm(module)]
    norms = [name for name in norms if not any(name.startswith(f'{other}.') for other in norms)]
    return dict(zip('ABC'[3 - len(norms) :], ([name] for name in norms))) if len(norms) in (2, 3) else {}


def _torchvision(block: nn.Module) -> Names:
    """torchvision's and timm's ResNets: ``conv1``, ``bn1``, ``conv2``, ``bn2`` (and ``conv3``, ``bn3``)."""
    there = [hasattr(block, f'conv{i}') and hasattr(block, f'bn{i}') for i in (1, 2, 3)]
    if not there[0] or not there[1]:
        return {}
    return dict(A=['bn1'], B=['bn2'], C=['bn3']) if there[2] else dict(A=['bn1'], C=['bn2'])


FAMILIES = (_named_norms, _inverted_residuals, _sequential_inverted_residuals, _conv_modules, _torchvision)


def _norm_of_conv_module(block: nn.Module, name: str) -> str | None:
    """Name of the norm of mmcv's ConvModule ``name``, or of the last one in its depthwise separable pair."""
    module: Duck = getattr(block, name, None)
    if hasattr(module, 'pointwise_conv'):
        module, name = module.pointwise_conv, f'{name}.pointwise_conv'
    norm = getattr(module, 'norm_name', None)
    return f'{name}.{norm}' if norm else None


def _channels(module: nn.Module) -> tuple[int | None, int | None]:
    """Input and output channels of a ConvModule or a depthwise separable pair of them."""
    first, last = getattr(module, 'depthwise_conv', module), getattr(module, 'pointwise_conv', module)
    return getattr(first, 'in_channels', None), getattr(last, 'out_channels', None)
