"""Folding for inference: statistics go into the convolution before, exactly.

``DWConv((conv(x) - mean) * rstd) + bias``: the scale and shift of the normalisation become part of the convolution's
weight and bias. The depthwise convolution stays; as it pads with zeros after the normalisation, border pixels are exact
too. Plain batch norms disappear, and so do BNET layers that only scale and shift (k = 1).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bnet_mm.layers import BNET, CBN
from bnet_mm.layers.arguments import Duck
from bnet_mm.layers.normalisers import AffineFreeBatchNorm2d, is_foreign_sync_batch_norm
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from bnet_mm.messages import first_of
from bnet_mm.surgery.modules import is_changed, is_norm
from bnet_mm.surgery.partial_calls import sequentials_in_parts
from bnet_mm.surgery.report import Report

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
BATCH_NORM_FORWARDS = {kind.forward for kind in (BatchNorm, AffineFreeBatchNorm2d, SyncBatchNorm, CBN)}
# Maps for trials: small ones, and larger ones with many divisors for networks that shrink and enlarge them.
TRIAL_SIZES: dict[int, list[tuple[int, ...]]] = {2: [(9, 11), (64, 96)], 3: [(8, 32, 32)]}


def fold(model: nn.Module, inplace: bool = True, inputs: tuple | None = None, conv2d: bool = False) -> Report:
    """Fold the running statistics of batch norms and BNET layers into the convolutions before them.

    A norm is folded if it directly follows a 2-D or 3-D convolution that nothing else uses. ``nn.Sequential`` and
    mmcv's ``ConvModule`` say so themselves, provided that whoever holds them calls them as a whole. Of any other
    module, a copy with random weights is tried on a random map: the norm must get the very tensor that the convolution
    gave, and the folded copy must compute the same. A module that does not take one map alone is left as it is.

    Args:
        model: Any torch model in evaluation mode.
        inplace: Change ``model`` itself; False for a copy.
        inputs: Arguments to call the model with. If given, a copy is folded first and its outputs are compared.
        conv2d: Leave the depthwise convolutions as ``nn.Conv2d``, for tools that know torch's classes only, such as
            quantisers; without BNET's kernels.

    Returns:
        A report: which norms were folded, and which not and why.

    Warns:
        UserWarning: For an ``nn.Sequential`` whose owner takes it apart, if there are no ``inputs`` to compare.

    Raises:
        ValueError: If the model or one of its norms is in training mode, or if it does not compute the same on
            ``inputs``; the model is as it was.
    """
    training = [name for name, module in model.named_modules() if module.training and (is_norm(module) or not name)]
    if training:
        raise ValueError(
            f'fold: the model must be in evaluation mode, call eval(); {training[0] or "it"} is in training mode'
        )
    if inputs is None:
        report = _fold(model if inplace else copy.deepcopy(model), conv2d)
        _warn_of_parts(report)
        return report
    trial = _fold(copy.deepcopy(model), conv2d)
    if not _same(_outputs(model, *inputs), _outputs(trial.model, *inputs)):
        raise ValueError(
            'fold: the folded model does not compute the same on inputs: a part of it is not called as a whole, or '
            'uses the output of a convolution besides its norm'
        )
    return _fold(model, conv2d) if inplace else trial


def _fold(model: nn.Module, conv2d: bool) -> Report:
    report = Report('folded', model)
    names = {module: name for name, module in model.named_modules()}
    shared = _shared(model)
    norms = [m for m in names if isinstance(m, BNET) or is_norm(m)]
    inside = {m for norm in norms for m in norm.modules() if m is not norm}
    reasons = {
        norm: _why_not_foldable(norm) or 'no convolution directly before it' for norm in norms if norm not in inside
    }
    with torch.no_grad():
        for holder, pairs in list(_candidates(model)):
            possible = []
            for pair in pairs:
                if not _why_not_foldable(pair.norm):
                    reasons[pair.norm] = _why_not_into(pair, shared)
                    possible += [] if reasons[pair.norm] else [pair]
            reasons.update(_fold_pairs(holder, possible))
            for pair in possible:
                if not reasons[pair.norm]:
                    report.changed[names[pair.norm]] = _what_was_done(pair, names[pair.conv])
                    if conv2d and _keeps_transform(pair.norm):
                        setattr(pair.norm_holder, pair.attribute, _as_conv2d(pair.norm.bnconv))
    report.kept = {names[norm]: reason for norm, reason in reasons.items() if reason}
    return report


def _warn_of_parts(report: Report) -> None:
    """Say which of the folded norms are in a Sequential that may not be called as a whole."""
    names = {module: name for name, module in report.model.named_modules()}
    for module, owner in sequentials_in_parts(report.model):
        folded = [name for name in report.changed if name.rpartition('.')[0] == names[module]]
        if folded:
            warnings.warn(
                f'fold: {owner} takes the Sequential {names[module]} apart; if it uses the output of a convolution in '
                f'it before the norm ({first_of(folded)}), the result is wrong: give inputs=(...), and fold compares',
                stacklevel=3,
            )


@dataclass(frozen=True)
class Pair:
    """A norm, called ``attribute`` in ``norm_holder``, and the convolution before it."""

    conv: Duck
    norm: Duck
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
        convs, norms = getattr(holder, 'convs', None), getattr(holder, 'bns', None)
        if isinstance(convs, nn.ModuleList) and isinstance(norms, nn.ModuleList):
            pairs += [Pair(conv, norm, norms, str(i)) for i, (conv, norm) in enumerate(zip(convs, norms))]
        if pairs:
            yield holder, pairs


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that stand in several places, or whose weight does."""
    places = Counter(child for module in model.modules() for child in module._modules.values() if child is not None)
    weight = {module: module._parameters.get('weight') for module in places}
    users = Counter(id(value) for value in weight.values() if value is not None)
    return {module for module, count in places.items() if count > 1 or users[id(weight[module])] > 1}


def _why_not_foldable(norm: nn.Module) -> str:
    """Why this norm cannot be folded at all; empty if it can."""
    normaliser: Duck = norm.norm if isinstance(norm, BNET) else norm
    foreign = is_foreign_sync_batch_norm(normaliser)
    if not foreign and not isinstance(normaliser, BatchNorm):
        return f'{type(normaliser).__name__} takes statistics from its input'
    if not foreign and type(normaliser).forward not in BATCH_NORM_FORWARDS:
        return f'{type(normaliser).__name__} has a forward of its own'
    if normaliser.running_mean is None:
        return f'{type(normaliser).__name__} tracks no running statistics'
    return ''


def _why_not_into(pair: Pair, shared: set[nn.Module]) -> str:
    """Why this norm cannot be folded into this convolution; empty if it can."""
    both = (pair.conv, pair.norm)
    if shared.intersection(both):
        return 'it or the convolution before it is used in several places'
    if any(is_changed(module) for module in both):
        return 'it or the convolution before it has hooks or a parametrization'
    if pair.conv.weight.dim() - 2 not in TRIAL_SIZES:
        return f'{type(pair.conv).__name__} before it is no 2-D or 3-D convolution'
    if _output_channels(pair.conv) != pair.norm.num_features:
        return 'the convolution before it has other channels'
    return ''


def _output_channels(conv: nn.Module) -> int:
    """Rows of a convolution's weight, those of a group of a transposed one; 0 for other modules."""
    weight = getattr(conv, 'weight', None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return 0
    return weight.shape[1] if isinstance(conv, nn.ConvTranspose2d) else weight.shape[0]


def _fold_pairs(holder: nn.Module, pairs: list[Pair]) -> dict[nn.Module, str]:
    """Fold what is certain or passes a trial. Returns why not for each norm; empty if folded."""
    reasons = dict.fromkeys((pair.norm for pair in pairs), '')
    if pairs and not (_is_certain(holder) and all(_is_plain(pair.conv) for pair in pairs)):
        reason = _trial(holder, pairs)
        if reason and len(pairs) > 1:
            return {norm: why for pair in pairs for norm, why in _fold_pairs(holder, [pair]).items()}
        reasons = dict.fromkeys(reasons, reason)
    for pair in pairs:
        if not reasons[pair.norm]:
            _fold_into(pair)
    return reasons


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


def _trial(holder: nn.Module, pairs: list[Pair]) -> str:
    """Fold ``pairs`` in a copy of ``holder`` and try it on a random map; why they cannot be folded, or nothing."""
    title = f'{type(holder).__name__}, which holds it,'
    if not _is_certain(holder) and len(inspect.signature(holder.forward).parameters) != 1:
        return f'{title} does not take one map alone'
    memo: dict = {}
    twin = copy.deepcopy(holder, memo).double()
    twins = [Pair(memo[id(p.conv)], memo[id(p.norm)], memo[id(p.norm_holder)], p.attribute) for p in pairs]
    _randomise(twin)
    seen: list[tuple[nn.Module, Tensor]] = []  # what each convolution gave and each norm got, in order
    for pair in twins:
        pair.conv.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
        pair.norm.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    try:
        x, before = _random_input(twin, pairs[0].conv, seen)
    except Exception as error:  # whatever a module raises that takes something else
        return f'{title} cannot be tried on a map ({type(error).__name__})'
    for pair in twins:
        gave, got = ([value for module, value in seen if module is part] for part in (pair.conv, pair.norm))
        if not len(gave) == len(got) == 1 or gave[0] is not got[0]:
            return f'{title} does not apply it directly to the convolution'
    for pair in twins:
        _fold_into(pair)
    try:
        same = _same(before, _outputs(twin, x))
    except Exception as error:
        return f'{title} fails without it ({type(error).__name__})'
    return '' if same else f'{title} uses the convolution besides it'


def _randomise(module: nn.Module) -> None:
    """Random weights and statistics, without touching torch's random state: zeros and ones hide what is different."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
            positive = name.endswith('running_var') or value.dim() < 2
            fan = max(1, value[0].numel()) if value.dim() > 1 else 1
            value.copy_(noise + 0.5 if positive else (noise - 0.5) * 4 / fan**0.5)


def _random_input(holder: nn.Module, conv: Duck, seen: list) -> tuple[Tensor, list[Tensor]]:
    """A random map that ``holder`` takes, and its outputs; raises what ``holder`` raises if it takes none."""
    dims = conv.weight.dim()
    layers: Iterator[Duck] = holder.modules()
    first = next(m for m in layers if _output_channels(m) and m.weight.dim() == dims)
    generator = torch.Generator().manual_seed(0)
    for size in TRIAL_SIZES[dims - 2]:
        seen.clear()
        x = torch.randn(2, first.in_channels, *size, generator=generator, dtype=torch.float64)
        try:
            return x.to(first.weight), _outputs(holder, x.to(first.weight))
        except Exception as error:
            reason = error
    raise reason


def _outputs(module: nn.Module, *inputs) -> list[Tensor]:
    """All tensors that a module returns, in lists or alone."""
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    while any(isinstance(y, (tuple, list)) for y in outputs):
        outputs = [z for y in outputs for z in (y if isinstance(y, (tuple, list)) else [y])]
    if not outputs or not all(isinstance(y, Tensor) and y.numel() and y.isfinite().all() for y in outputs):
        raise TypeError('the outputs are not finite, non-empty tensors')
    return outputs


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Up to rounding: 1e-6 of the largest value in float64, where trials are made, and more in shorter types."""
    if [y.shape for y in before] != [y.shape for y in after]:
        return False
    for one, two in zip(before, after):
        tolerance = max(1e-6, 1e3 * torch.finfo(one.dtype).eps) * one.double().abs().max()
        if not one.any() or (one.double() - two.double()).abs().max() > tolerance:
            return False
    return True


def _fold_into(pair: Pair) -> None:
    """Scale and shift the convolution's output as the normalisation does, and the affine where nothing else is left."""
    conv, norm = pair.conv, pair.norm
    normaliser: Duck = norm.norm if isinstance(norm, BNET) else norm
    left = _transform_alone(norm)
    with torch.no_grad():
        scale = (normaliser.running_var.double() + normaliser.eps).rsqrt()
        shift = -normaliser.running_mean.double() * scale
        if not _keeps_transform(norm) and getattr(norm, 'affine', True):
            if norm.weight is not None:
                scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
            if norm.bias is not None:
                shift = shift + norm.bias.double()
        if getattr(conv, 'bias', None) is not None:
            shift = shift + conv.bias.double() * scale
        shape = [1] * conv.weight.dim()
        shape[1 if isinstance(conv, nn.ConvTranspose2d) else 0] = -1
        values = [value.to(conv.weight.dtype) for value in (conv.weight.double() * scale.view(shape), shift)]
    conv.weight, conv.bias = (nn.Parameter(value, requires_grad=conv.weight.requires_grad) for value in values)
    setattr(pair.norm_holder, pair.attribute, left)


def _keeps_transform(norm: nn.Module) -> bool:
    return isinstance(norm, BNET) and not norm.is_affine()


def _transform_alone(norm: Duck) -> nn.Module:
    """What is left of a norm: the depthwise convolution of BNET, or nothing."""
    if not _keeps_transform(norm):
        return nn.Identity()
    return norm.bnconv.eval()


def _as_conv2d(transform: Duck) -> nn.Conv2d:
    """torch's own depthwise convolution, with the very parameters of a transform."""
    options = dict(padding=transform.padding, dilation=transform.dilation, groups=transform.groups, device='meta')
    conv = nn.Conv2d(transform.in_channels, transform.out_channels, transform.kernel_size, **options)
    conv.weight, conv.bias = transform.weight, transform.bias
    return conv.eval()


def _what_was_done(pair: Pair, conv: str) -> str:
    title = f'{type(pair.norm).__name__} -> folded into {conv}'
    if not _keeps_transform(pair.norm):
        return title
    return f'{title}, a {pair.norm.bnconv.k} x {pair.norm.bnconv.k} depthwise convolution left'
