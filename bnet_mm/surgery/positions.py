"""Where BNET sits: replace the batch norms of a built model at the positions of the paper (section 4.5, Table 10).

In a residual bottleneck, A is the norm after the first 1x1 convolution, B after the 3x3 and C after the last 1x1; in a
basic block, A is the first and C the last norm. The paper replaces C only, not the stem's and the shortcut's norms.

Replacing norms after the host has built the model leaves the host's code, every other module and every name as they
are. A further block family takes one more entry in :func:`norm_names`.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import nn

from bnet_mm.norms import BNET

POSITIONS = 'ABC'
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def norm_names(block: nn.Module) -> dict[str, str]:
    """Position -> attribute name of the norms of a residual block; empty for any other module.

    Knows the blocks that say ``norm1_name``, ``norm2_name`` (and ``norm3_name``), as those of ResNet and ResNeXt in
    mmdet, mmseg and mmpretrain do.
    """
    names = [getattr(block, f'norm{i}_name', None) for i in (1, 2, 3)]
    if all(names):
        return dict(zip('ABC', names))
    if all(names[:2]):
        return dict(zip('AC', names))
    return {}


def enhance(model: nn.Module, k: int = 3, where: str = 'C', dilation: int = 1) -> list[str]:
    """Replace batch norms by BNET, in place and with the same function: gamma and beta move into centre tap and bias.

    Args:
        model: Any module that contains residual blocks (or, with ``where='all'``, any batch norms).
        k: Size of the depthwise kernel, odd.
        where: Positions in the residual blocks: one or more of the letters A, B, C; or 'all' for every batch norm.
        dilation: Spacing of the taps.

    Returns:
        Names of the replaced layers. They keep these names and their ``requires_grad``.

    Raises:
        ValueError: If ``where`` is not as above, or if the model has no batch norm there.
    """
    targets = _targets(model, where)
    if not targets:
        raise ValueError(
            f'enhance: no batch norm at where={where!r} in {type(model).__name__}; known are the residual blocks of '
            "ResNet and ResNeXt, and 'all' for every batch norm"
        )
    names = {module: name for name, module in model.named_modules()}
    new_layers = {}  # a norm that two blocks share stays shared
    for parent, attribute in targets:
        norm = getattr(parent, attribute)
        if norm not in new_layers:
            new_layers[norm] = BNET.from_batch_norm(norm, k, dilation)
        setattr(parent, attribute, new_layers[norm])
    return ['.'.join(filter(None, (names[parent], attribute))) for parent, attribute in targets]


def _targets(model: nn.Module, where: str) -> list[tuple[nn.Module, str]]:
    """(parent, attribute name) of the norms to replace, each checked to be a batch norm."""
    if where == 'all':
        parents = [m for m in model.modules() if not isinstance(m, BNET)]
        return [(m, name) for m in parents for name, child in m.named_children() if isinstance(child, BATCH_NORMS)]
    if not isinstance(where, str) or not where or set(where) - set(POSITIONS) or len(set(where)) < len(where):
        raise ValueError(
            f"enhance: where must be 'all' or letters of {POSITIONS!r}, such as 'C' or 'AC', got {where!r}"
        )
    targets = [(m, name) for m in model.modules() for position, name in norm_names(m).items() if position in where]
    for block, name in targets:
        norm = getattr(block, name, None)
        if not isinstance(norm, BATCH_NORMS):
            raise ValueError(
                f'enhance: {name} of {type(block).__name__} is {type(norm).__name__}; only batch norms can become BNET '
                '(set norm_cfg=dict(type="BN") or "SyncBN" in the backbone)'
            )
    return targets


@MODELS.register_module(name='WithBNET')
def enhance_backbone(base: str, bnet: dict | None = None, **kwargs: Any) -> nn.Module:
    """The config form of :func:`enhance`, for a backbone or any other model::

        backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C'), depth=50, ...)

    Args:
        base: Registered type of the model, as it stood in ``type``.
        bnet: Arguments of :func:`enhance`.
        kwargs: Arguments of ``base``.

    Returns:
        The model that ``base`` and ``kwargs`` describe, itself, with BNET in it.

    Raises:
        ValueError: For an unknown key in ``bnet``.
    """
    bnet = dict(bnet or {})
    if unknown := sorted(set(bnet) - {'k', 'where', 'dilation'}):
        raise ValueError(f'WithBNET: bnet takes k, where and dilation, got {", ".join(unknown)}')
    model = MODELS.build(dict(type=base, **kwargs))
    enhance(model, **bnet)
    if getattr(model, 'zero_init_residual', False) and not (kwargs.get('init_cfg') or kwargs.get('pretrained')):
        _zero_init_last_norm(model)
    return model


def _zero_init_last_norm(model: nn.Module) -> None:
    """Make ``zero_init_residual`` reach a BNET at C: mmdet's and mmseg's ResNeXt ignore the option."""
    for block in model.modules():
        last_norm = norm_names(block).get('C')
        if last_norm and isinstance(getattr(block, last_norm), BNET) and block.init_cfg is None:
            block.init_cfg = dict(type='Constant', val=0, override=dict(name=last_norm))
