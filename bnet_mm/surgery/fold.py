"""Folding for inference: statistics go into the convolution before, exactly.

``DWConv((conv(x) - mean) * rstd) + bias``: the scale and shift of the normalisation become part of the convolution's
weight and bias. The depthwise convolution stays; as it pads with zeros after the normalisation, border pixels are exact
too. Plain batch norms disappear, and so do BNET layers that only scale and shift (k = 1).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnet_mm.norms import BNET, CBN
from bnet_mm.norms.normalizers import AffineFreeBatchNorm2d, is_foreign_sync_batch_norm
from bnet_mm.norms.sync_batch_norm import SyncBatchNorm
from bnet_mm.surgery.positions import is_norm
from bnet_mm.surgery.report import Report

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
BATCH_NORM_FORWARDS = {kind.forward for kind in (BatchNorm, AffineFreeBatchNorm2d, SyncBatchNorm, CBN)}
# Maps for trials: small ones, and larger ones with many divisors for networks that shrink and enlarge them.
TRIAL_SIZES = {1: [(33,)], 2: [(9, 11), (64, 96)], 3: [(8, 32, 32)]}


def fold(model: nn.Module, inplace: bool = True) -> Report:
    """Fold the running statistics of batch norms and BNET layers into the convolutions before them.

    A norm is folded if it directly follows a convolution that nothing else uses. In ``nn.Sequential`` and mmcv's
    ``ConvModule`` this is certain. In any other module, a norm that is registered after a convolution is folded if
    the module still computes the same on a random input; if the module does not take one 4-D tensor, it is left alone.

    Args:
        model: Any torch model in evaluation mode.
        inplace: Change ``model`` itself; False for a copy.

    Returns:
        A report: which norms were folded, and which not and why.

    Raises:
        ValueError: If the model or one of its norms is in training mode; the model is as it was.
    """
    training = [name for name, module in model.named_modules() if module.training and (is_norm(module) or not name)]
    if training:
        raise ValueError(
            f'fold: the model must be in evaluation mode, call eval(); {training[0] or "it"} is in training mode'
        )
    report = Report('folded', model if inplace else copy.deepcopy(model))
    model = report.model
    names = {module: name for name, module in model.named_modules()}
    shared = _shared(model)
    norms = [m for m in names if isinstance(m, BNET) or is_norm(m)]
    inside = {m for norm in norms if isinstance(norm, BNET) for m in norm.modules() if m is not norm}
    reasons = {norm: _why_not(norm) or 'no convolution directly before it' for norm in norms if norm not in inside}
    with torch.no_grad():
        for holder, pairs in list(_candidates(model)):
            possible = []
            for pair in pairs:
                if not _why_not(pair.norm):
                    reasons[pair.norm] = _why_not_into(pair, shared)
                    possible += [] if reasons[pair.norm] else [pair]
            reasons.update(_fold_pairs(holder, possible))
            for pair in possible:
                if not reasons[pair.norm]:
                    report.changed[names[pair.norm]] = _what_was_done(pair, names[pair.conv])
    report.kept = {names[norm]: reason for norm, reason in reasons.items() if reason}
    return report


@dataclass(frozen=True)
class Pair:
    """A norm, called ``attribute`` in ``norm_holder``, and the convolution before it."""

    conv: nn.Module
    norm: nn.Module
    norm_holder: nn.Module
    attribute: str


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, list[Pair]]]:
    """Modules with the norms registered right after a convolution, or (Res2Net) in a list beside the convolutions."""
    for holder in model.modules():
        if isinstance(holder, BNET) or is_norm(holder):
            continue
        children = list(holder.named_children())
        pairs = [
            Pair(conv, norm, holder, name)
            for (_, conv), (name, norm) in zip(children, children[1:])
            if _output_channels(conv) and (isinstance(norm, BNET) or is_norm(norm))
        ]
        lists = (getattr(holder, 'convs', None), getattr(holder, 'bns', None))
        if all(isinstance(modules, nn.ModuleList) for modules in lists):
            pairs += [Pair(conv, norm, lists[1], str(i)) for i, (conv, norm) in enumerate(zip(*lists))]
        if pairs:
            yield holder, pairs


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that stand in several places, or whose weight does."""
    places = Counter(child for module in model.modules() for child in module._modules.values() if child is not None)
    weight = {module: module._parameters.get('weight') for module in places}
    users = Counter(id(value) for value in weight.values() if value is not None)
    return {module for module, count in places.items() if count > 1 or users[id(weight[module])] > 1}


def _why_not(norm: nn.Module) -> str:
    """Why this norm cannot be folded at all; empty if it can."""
    normalizer = norm.norm if isinstance(norm, BNET) else norm
    if not isinstance(normalizer, BatchNorm) and not is_foreign_sync_batch_norm(normalizer):
        return f'{type(normalizer).__name__} takes statistics from its input'
    if type(normalizer).forward not in BATCH_NORM_FORWARDS and not is_foreign_sync_batch_norm(normalizer):
        return f'{type(normalizer).__name__} has a forward of its own'
    if normalizer.running_mean is None:
        return f'{type(normalizer).__name__} tracks no running statistics'
    return ''


def _why_not_into(pair: Pair, shared: set[nn.Module]) -> str:
    """Why this norm cannot be folded into this convolution; empty if it can."""
    both = (pair.conv, pair.norm)
    if shared.intersection(both):
        return 'it or the convolution before it is used in several places'
    if is_parametrized(pair.conv) or any(m._forward_hooks or m._forward_pre_hooks for m in both):
        return 'it or the convolution before it has hooks or a parametrization'
    if _output_channels(pair.conv) != pair.norm.num_features:
        return 'the convolution before it has other channels'
    return ''


def _output_channels(conv: nn.Module) -> int:
    """Rows of a convolution's weight; 0 for other modules, and for transposed convolutions in groups."""
    weight = getattr(conv, 'weight', None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return 0
    if isinstance(conv, nn.ConvTranspose2d):
        return weight.shape[1] if conv.groups == 1 else 0
    return weight.shape[0]


def _fold_pairs(holder: nn.Module, pairs: list[Pair]) -> dict[nn.Module, str]:
    """Fold, and undo it where it is not certain and a trial differs. Returns why not for each norm; empty if folded."""
    certain = _is_certain(holder) and all(_is_plain(pair.conv) for pair in pairs)
    if not pairs or certain:
        for pair in pairs:
            _fold_into(pair)
        return {pair.norm: '' for pair in pairs}
    title = f'{type(holder).__name__}, which holds it,'
    try:
        x, before = _trial_input(holder, pairs[0].conv)
    except Exception as error:  # whatever a module raises that takes something else
        return {pair.norm: f'{title} cannot be tried on a map ({type(error).__name__})' for pair in pairs}
    old = [(pair.conv.weight, getattr(pair.conv, 'bias', None)) for pair in pairs]
    for pair in pairs:
        _fold_into(pair)
    try:
        if _same(before, _outputs(holder, x)):
            return {pair.norm: '' for pair in pairs}
        reason = f'{title} does not apply it directly to the convolution'
    except Exception as error:
        reason = f'{title} fails without it ({type(error).__name__})'
    for pair, (weight, bias) in zip(pairs, old):
        pair.conv.weight, pair.conv.bias = weight, bias
        setattr(pair.norm_holder, pair.attribute, pair.norm)
    if len(pairs) == 1:
        return {pairs[0].norm: reason}
    return {norm: why for pair in pairs for norm, why in _fold_pairs(holder, [pair]).items()}


def _is_certain(holder: nn.Module) -> bool:
    """Whether this module applies its norm directly to the output of the convolution, by its definition."""
    if type(holder) is nn.Sequential:
        return True
    order = getattr(holder, 'order', ())  # mmcv's ConvModule
    known = type(holder).__name__ == 'ConvModule' and getattr(holder, 'efficient_conv_bn_eval_forward', None) is None
    return known and ('conv', 'norm') in zip(order, order[1:])


def _is_plain(conv: nn.Module) -> bool:
    """torch's own convolution or mmcv's wrapper of it, which differs for empty inputs only."""
    return isinstance(conv, CONVOLUTIONS) and type(conv).__module__.startswith(('torch.nn.', 'mmcv.cnn.bricks.wrapper'))


def _trial_input(holder: nn.Module, conv: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """A random map that ``holder`` takes, and its outputs; raises what ``holder`` raises if it takes none."""
    weight = conv.weight
    first = next(m for m in holder.modules() if isinstance(m, CONVOLUTIONS) and m.weight.dim() == weight.dim())
    channels = getattr(first, 'in_channels', None) or first.in_features
    generator = torch.Generator().manual_seed(0)
    for size in TRIAL_SIZES.get(weight.dim() - 2, [()]):
        x = torch.randn(2, channels, *size, generator=generator).to(weight)
        try:
            return x, _outputs(holder, x)
        except Exception as error:
            reason = error
    raise reason


def _outputs(holder: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = holder(x)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if not all(isinstance(y, Tensor) and y.isfinite().all() for y in outputs):
        raise TypeError('the outputs are not finite tensors')
    return outputs


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Up to rounding, which is far below what a norm in the wrong place makes."""
    shapes = [y.shape for y in before] == [y.shape for y in after]
    return shapes and all((one - two).norm() <= 1e-2 * one.norm() for one, two in zip(before, after))


def _fold_into(pair: Pair) -> None:
    """Scale and shift the convolution's output as the normalisation does, and the affine where nothing else is left."""
    conv, norm = pair.conv, pair.norm
    normalizer = norm.norm if isinstance(norm, BNET) else norm
    scale = (normalizer.running_var.double() + normalizer.eps).rsqrt()
    shift = -normalizer.running_mean.double() * scale
    if not _keeps_transform(norm):
        if norm.weight is not None:
            scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
        if norm.bias is not None:
            shift = shift + norm.bias.double()
    shape = [1] * conv.weight.dim()
    shape[1 if isinstance(conv, nn.ConvTranspose2d) else 0] = -1
    if getattr(conv, 'bias', None) is not None:
        shift = shift + conv.bias.double() * scale
    conv.weight, conv.bias = (
        nn.Parameter(value.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        for value in (conv.weight.double() * scale.view(shape), shift)
    )
    setattr(pair.norm_holder, pair.attribute, _transform_alone(norm))


def _keeps_transform(norm: nn.Module) -> bool:
    return isinstance(norm, BNET) and not norm.is_affine()


def _transform_alone(norm: nn.Module) -> nn.Module:
    """What is left of a norm: the depthwise convolution of BNET, or nothing."""
    if not _keeps_transform(norm):
        return nn.Identity()
    transform = norm.bnconv
    conv = nn.Conv2d(
        norm.num_features,
        norm.num_features,
        transform.k,
        padding=transform.dilation * (transform.k // 2),
        dilation=transform.dilation,
        groups=norm.num_features,
    )
    conv.weight, conv.bias = transform.weight, transform.bias
    return conv.eval()


def _what_was_done(pair: Pair, conv: str) -> str:
    title = f'{type(pair.norm).__name__} -> folded into {conv}'
    if not _keeps_transform(pair.norm):
        return title
    return f'{title}, a {pair.norm.bnconv.k} x {pair.norm.bnconv.k} depthwise convolution left'
