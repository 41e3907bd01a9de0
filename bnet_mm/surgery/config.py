"""BNET by configs: the model type ``WithBNET``, and the text of configs that use it."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from bnet_mm.checkpoint.layouts import to_our_key
from bnet_mm.layers import BNET
from bnet_mm.surgery.activations import use_frelu
from bnet_mm.surgery.enhance import enhance, insert_bn_conv
from bnet_mm.surgery.positions import norm_names


def WithBNET(base: str, bnet: dict | None, frelu: bool = False, **kwargs: Any) -> nn.Module:
    """The config form of :func:`enhance`, for a backbone, a whole detector, or any other model::

        backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C'), depth=50, ...)
        model = dict(type='WithBNET', base='RetinaNet', bnet=dict(k=3))

    Args:
        base: Registered type of the model, as it stood in ``type``.
        bnet: Arguments of :func:`enhance`; ``where`` as letters, 'all' or a regular expression. With
            ``type='BNConv'`` those of :func:`insert_bn_conv`; None for neither.
        frelu: Put FReLU into the residual blocks, see activations.py.
        kwargs: Arguments of ``base``.

    Returns:
        The model that ``base`` and ``kwargs`` describe, itself, with BNET in it.

    Raises:
        ValueError: For an unknown key in ``bnet``, a ``frelu`` that is no bool (any text would count as True), and as
            :func:`enhance`.
    """
    if not isinstance(frelu, bool):
        raise ValueError(f'WithBNET: frelu must be True or False, got {frelu!r}')
    options = dict(bnet or {})
    kind = options.pop('type', 'BNET')
    if kind not in ('BNET', 'BNConv'):
        raise ValueError(f"WithBNET: bnet.type must be 'BNET' or 'BNConv', got {kind!r}")
    if unknown := sorted(set(options) - ({'k', 'where', 'dilation'} if kind == 'BNET' else {'k', 'where'})):
        raise ValueError(f'WithBNET: bnet takes k, where and dilation, got {", ".join(unknown)}')
    model = MODELS.build(dict(type=base, **kwargs))
    if frelu:
        use_frelu(model)
    if bnet is not None:
        report = (insert_bn_conv if kind == 'BNConv' else enhance)(model, **options)
        frozen = sum('frozen' in done for done in report.changed.values())
        print_log(
            f'WithBNET: {report.summary()}, k={options.get("k", 3)}'
            + (f'; {frozen} of them are frozen (norm_cfg.requires_grad=False or frozen stages)' if frozen else ''),
            logger='current',
        )
        _adapt_host(model)
    return model


def config_text(cfg: Config, title: str, base: str, bnet: dict) -> str:
    """A config that inherits from another and turns its model into the same with BNET.

    Args:
        cfg: The other config, as read.
        title: What the user calls it.
        base: Its path or name, as ``_base_`` takes it.
        bnet: Arguments of :func:`enhance`.

    Raises:
        ValueError: If it has no model, or BNET in it already.
    """
    model = cfg.get('model') or {}
    if not isinstance(model.get('type'), str):
        raise ValueError(f'config {title} has no model with a type')
    if model['type'] == 'WithBNET':
        raise ValueError(f'config {title} has BNET already (model.type is WithBNET); change model.bnet instead')
    imports = dict(cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False))
    names = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
    imports['imports'] = [*names, *(['bnet_mm'] if 'bnet_mm' not in names else [])]
    if bnet['dilation'] == 1:
        bnet = dict(k=bnet['k'], where=bnet['where'])
    return (
        f'# {title} with BNET-{bnet["k"]} at {bnet["where"]!r}.\n'
        f'_base_ = {base!r}\n'
        f'custom_imports = {_call(imports)}\n'
        f'model = {_call(dict(type="WithBNET", base=model["type"], bnet=bnet))}\n'
    )


def _call(options: dict) -> str:
    """A dict as configs write it: dict(k=3, where='C')."""
    items = (f'{name}={_call(value) if isinstance(value, dict) else repr(value)}' for name, value in options.items())
    return f'dict({", ".join(items)})'


def _adapt_host(model: nn.Module) -> None:
    """Change what hosts do to norms by other ways than the norms' methods.

    ``zero_init_residual`` reaches a BNET at C, which mmdet's and mmseg's ResNeXt forget; only where nothing pretrained
    is read: the host says that by a single ``init_cfg``, its own defaults are a list. And mmaction's ResNet, which
    reads torchvision's files by itself, reads norms by ``load_state_dict``.
    """
    networks = [m for m in model.modules() if getattr(m, 'zero_init_residual', False)]
    blocks = [m for network in networks if not isinstance(network.init_cfg, dict) for m in network.modules()]
    for block in blocks:
        for name in norm_names(block).get('C', ()):
            if isinstance(block.get_submodule(name), BNET) and getattr(block, 'init_cfg', False) is None:
                block.init_cfg = dict(type='Constant', val=0, override=dict(name=name))
    for module in model.modules():
        if hasattr(module, '_load_bn_params'):
            module._load_bn_params = _load_torchvision_norm


def _load_torchvision_norm(norm: nn.Module, state_dict: dict, name: str, loaded_names: list[str]) -> None:
    """What mmaction's ``ResNet._load_bn_params`` does, by ``load_state_dict``: BNET reads BN and official layers."""
    host_keys = {to_our_key(key): key for key in state_dict}
    found = {key: original for key, original in host_keys.items() if key.startswith(f'{name}.')}
    norm.load_state_dict({key[len(name) + 1 :]: state_dict[original] for key, original in found.items()})
    loaded_names.extend(found.values())
