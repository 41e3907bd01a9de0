"""Norms of a built model become BNET, and back.

Replacing norms after the host has built the model leaves the host's code, every other module and every name as they
are. Which norms those are is positions.py's business.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Union

from torch import nn

from bnet_mm.layers import BNET, BNConv, FReLU, SN1d, SN2d, SN3d
from bnet_mm.layers.arguments import Duck, is_lazy
from bnet_mm.layers.holders import convolution_before
from bnet_mm.layers.normalisers import can_be_normaliser
from bnet_mm.messages import first_of
from bnet_mm.surgery.modules import is_changed, is_norm, replace_modules
from bnet_mm.surgery.positions import POSITIONS, norm_names
from bnet_mm.surgery.report import Report
from bnet_mm.surgery.tails import fuse_tails, unfuse_tails

# Layers whose norms are their own.
OURS = (BNET, BNConv, FReLU, SN1d, SN2d, SN3d)
Where = Union[str, re.Pattern, Callable[[str, nn.Module], bool]]


def enhance(
    model: nn.Module, k: int = 3, where: Where = 'C', dilation: int = 1, inplace: bool = True, fuse: bool = True
) -> Report:
    """Replace norms by BNET with the same function: weight and bias of a norm move into centre tap and bias.

    Batch, synchronised, group, instance, switchable and cross-iteration norms of 4-D maps become BNET over that norm.
    They keep their names, statistics, mode, device and ``requires_grad``; a norm that two modules share stays shared.

    Args:
        model: Any torch model.
        k: Size of the depthwise kernel, odd.
        where: Which norms: positions in the residual blocks, one or more of the letters A, B, C (see positions.py);
            'all' for every norm of these kinds; a regular expression, searched in the names of the norms; or a function
            of name and module that says whether.
        dilation: Spacing of the taps.
        inplace: Change ``model`` itself; False for a copy.
        fuse: Let residual blocks that end in BNET, sum and ReLU run these in one pass, where their forward is known
            (see tails.py). Also for ``k=1``, BN itself.

    Returns:
        A report, with the model, what was replaced, and which norms were not and why, and the same of the tails.

    Raises:
        ValueError: If ``where`` is none of these, ``fuse`` is no bool, or there is nothing to replace; the model is as
            it was.
    """
    if not isinstance(fuse, bool):
        raise ValueError(f'enhance: fuse must be True or False, got {fuse!r}')
    nearby = next(iter(model.parameters()), None)  # for norms that have no tensor

    def make(norm: nn.Module) -> tuple[BNET, str]:
        layer = BNET.from_norm(norm, k, dilation)
        if nearby is not None and not norm.state_dict():
            layer.to(nearby)
        frozen = '' if layer.bnconv.weight.requires_grad else ', frozen as it was'
        return layer, f'BNET-{k}' + (f' dilated {dilation}' if dilation > 1 else '') + frozen

    def why_not(name: str, norm: nn.Module) -> str:
        return _why_not_bnet(model, name, norm)

    report = _change_norms('enhance', Report('enhanced', model), where, why_not, make, inplace)
    if fuse:
        report.tails = fuse_tails(report.model)
    return report


def insert_bn_conv(model: nn.Module, k: int = 3, where: Where = 'C') -> Report:
    """Put :class:`BNConv` in the place of batch norms, in place: the paper's counter-example (Table 11).

    Not the same function: each norm is kept, and followed by ReLU and a fresh depthwise convolution.

    Args and errors: As :func:`enhance`.
    """

    def make(norm: Duck) -> tuple[BNConv, str]:
        return BNConv.from_norm(norm, k), f'BNConv-{k}'

    def why_not(name: str, norm: nn.Module) -> str:
        return '' if type(norm) is nn.BatchNorm2d else 'no BatchNorm2d'

    return _change_norms('insert_bn_conv', Report('replaced', model), where, why_not, make)


def restore(model: nn.Module, inplace: bool = True) -> Report:
    """The inverse of :func:`enhance` where it is exact: every BNET becomes the norm that it holds, with an affine.

    Args:
        model: Any model with BNET layers whose taps are all zero but for the centre (or k = 1).
        inplace: Change ``model`` itself; False for a copy.

    Returns:
        A report.

    Raises:
        ValueError: If there is no BNET, or one whose other taps are not zero; the model is as it was.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BNET)}
    if not layers:
        raise ValueError(f'restore: {type(model).__name__} has no BNET')
    if trained := [name for name, layer in layers.items() if not layer.is_affine()]:
        raise ValueError(
            f'restore: {len(trained)} BNET layers have taps off the centre, no norm has: {first_of(trained, 8)}'
        )
    report = Report('restored', model if inplace else copy.deepcopy(model))
    replaced: dict[nn.Module, nn.Module] = {}
    for name in layers:
        layer: Duck = report.model.get_submodule(name)
        replaced[layer] = layer.to_norm()
        report.changed[name] = f'BNET-{layer.bnconv.k} -> {_title(replaced[layer])}'
    replace_modules(report.model, replaced)
    unfuse_tails(report.model)
    return report


def _change_norms(
    function: str,
    report: Report,
    where: Where,
    why_not: Callable[[str, nn.Module], str],
    make: Callable[[nn.Module], tuple[nn.Module, str]],
    inplace: bool = True,
) -> Report:
    """Replace the norms that ``where`` means, in ``report.model`` or a copy of it, and fill in the report.

    Args:
        function: Who asks, for error messages.
        report: An empty one, with the model as it is.
        where: As in :func:`enhance`.
        why_not: Says of a name and norm why it cannot be replaced; empty if it can.
        make: Gives a norm's replacement and a title for it.
        inplace: False for a copy.
    """
    model = report.model
    names = _norms(model)
    wanted = _wanted(function, model, names, where)
    reasons = {name: why_not(name, norm) for name, norm in names.items()}
    chosen = {norm for name, norm in names.items() if name in wanted and not reasons[name]}
    if not chosen:
        refused = sorted({reasons[name] for name in wanted if reasons.get(name)})
        why = f': {"; ".join(refused)}' if refused else f', whose norms are {first_of(names, 8) or "none"}'
        raise ValueError(f'{function}: no norm to replace at where={where!r} in {type(model).__name__}{why}')
    report.model = model if inplace else copy.deepcopy(model)
    replaced = {}
    for name, norm in names.items():
        if norm not in chosen:
            report.kept[name] = reasons[name] if name in wanted else f'not at where={where!r}'
            continue
        norm = report.model.get_submodule(name)
        if norm not in replaced:
            replaced[norm] = make(norm)
        report.changed[name] = f'{_title(norm)} -> {replaced[norm][1]}'
    replace_modules(report.model, {norm: layer for norm, (layer, _) in replaced.items()})
    return report


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """All norms by every name they have; those inside our own layers are the layers' own."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f'{name}.' for name, module in modules.items() if isinstance(module, OURS))
    return {
        name: module
        for name, module in modules.items()
        if name and not name.startswith(inside) and (is_norm(module) or isinstance(module, BNET))
    }


def _wanted(function: str, model: nn.Module, norms: dict[str, nn.Module], where: Where) -> set[str]:
    """Names of the norms that ``where`` means."""
    if where == 'all':
        return set(norms)
    if isinstance(where, str) and where and not set(where) - set(POSITIONS) and len(set(where)) == len(where):
        blocks = model.named_modules(remove_duplicate=False)
        return {
            f'{prefix}.{name}' if prefix else name
            for prefix, block in blocks
            for position, names in norm_names(block).items()
            for name in names
            if position in where
        }
    if isinstance(where, (str, re.Pattern)) and where:
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ValueError(f'{function}: where={where!r} is no regular expression: {error}') from error
        return {name for name in norms if pattern.search(name)}
    if callable(where):
        return {name for name, module in norms.items() if where(name, module)}
    raise ValueError(
        f"{function}: where must be letters of {POSITIONS!r} such as 'C' or 'AC', 'all', a regular expression on "
        f'module names, or a function of name and module, got {where!r}'
    )


def _why_not_bnet(model: nn.Module, name: str, norm: nn.Module) -> str:
    """Why this norm cannot become BNET; empty if it can."""
    if isinstance(norm, BNET):
        return 'BNET already'
    if not can_be_normaliser(norm):
        return f'{type(norm).__name__} is no norm that BNET can hold'
    if is_changed(norm):
        return 'it has hooks or a parametrization, which would be lost'
    holder, _, attribute = name.rpartition('.')
    before = convolution_before(model.get_submodule(holder), attribute)
    conv: Duck = model.get_submodule(f'{holder}.{before}' if holder else before) if before else None
    if conv is not None and not isinstance(conv, nn.Conv2d) and (is_lazy(conv.weight) or conv.weight.dim() in (3, 5)):
        return f'{type(norm).__name__} after a convolution that is not 2-D'
    return ''


def _title(norm: nn.Module) -> str:
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    return f'{type(norm).__name__}({channels})'
