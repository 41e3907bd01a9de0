"""BNET by configs: the model type ``WithBNET``, and the text of configs that use it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from bnet_mm.checkpoint.layouts import to_our_key
from bnet_mm.layers import BNET
from bnet_mm.layers.arguments import Duck
from bnet_mm.surgery.activations import use_frelu
from bnet_mm.surgery.enhance import enhance, insert_bn_conv
from bnet_mm.surgery.positions import norm_names

MISSING = 'missing'  # stands for an argument that was not given, where None has a meaning


def WithBNET(
    base: str | type[nn.Module] | None = None, bnet: dict | None | str = MISSING, frelu: bool = False, **kwargs: Any
) -> nn.Module:
    """The config form of :func:`enhance`, for a backbone, a whole detector, or any other model::

        backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C'), depth=50, ...)
        model = dict(type='WithBNET', base='RetinaNet', bnet=dict(k=3))
        model.update(type=WithBNET, base=model['type'], bnet=dict(k=3))  # new-style configs, where types are imported

    Args:
        base: What stood in ``type``: the registered name of the model, or its class.
        bnet: Arguments of :func:`enhance`, ``dict()`` for its defaults; ``where`` as letters, 'all' or a regular
            expression. With ``type='BNConv'`` those of :func:`insert_bn_conv`; None for neither.
        frelu: Put FReLU into the residual blocks, see activations.py.
        kwargs: Arguments of ``base``.

    Returns:
        The model that ``base`` and ``kwargs`` describe, itself, with BNET in it.

    Raises:
        ValueError: For a missing or unknown ``base``, a ``bnet`` that is no dict, an unknown key in it, a
            ``frelu`` that is no bool (any text would count as True), and as :func:`enhance`.
    """
    _check_base(base)
    if not isinstance(frelu, bool):
        raise ValueError(f'WithBNET: frelu must be True or False, got {frelu!r}')
    if not isinstance(bnet, (dict, type(None))):
        came = 'nothing' if bnet is MISSING else repr(bnet)
        raise ValueError(f"WithBNET: bnet must be a dict such as dict(k=5, where='C'), or None for no BNET, got {came}")
    options = dict(bnet or {})
    kind = options.pop('type', 'BNET')
    if kind not in ('BNET', 'BNConv'):
        raise ValueError(f"WithBNET: bnet.type must be 'BNET' or 'BNConv', got {kind!r}")
    if unknown := sorted(set(options) - ({'k', 'where', 'dilation', 'fuse'} if kind == 'BNET' else {'k', 'where'})):
        raise ValueError(f'WithBNET: bnet takes k, where, dilation and fuse, got {", ".join(unknown)}')
    model = MODELS.build(dict(type=base, **kwargs))
    if frelu:
        use_frelu(model)
    if bnet is None:
        print_log('WithBNET: bnet=None, so no norm was replaced', logger='current')
        return model
    report = (insert_bn_conv if kind == 'BNConv' else enhance)(model, **options)
    frozen = sum('frozen' in done for done in report.changed.values())
    print_log(
        f'WithBNET: {report.summary()}, k={options.get("k", 3)}'
        + (f'; {frozen} of them are frozen (norm_cfg.requires_grad=False or frozen stages)' if frozen else ''),
        logger='current',
    )
    _adapt_host(model)
    return model


def _check_base(base: Any) -> None:
    if base in ('WithBNET', WithBNET):
        raise ValueError('WithBNET: base must be the model itself, not another WithBNET')
    if base is None:
        raise ValueError("WithBNET: base is missing: the type that stood here before, such as base='ResNet'")
    if not isinstance(base, str):
        return
    with MODELS.switch_scope_and_registry(None) as registry:
        if registry.get(base) is None:
            close = difflib.get_close_matches(base, [*registry.module_dict, *MODELS.module_dict], n=1)
            hint = f'; did you mean {close[0]}?' if close else ''
            raise ValueError(f'WithBNET: base={base!r} is no model that {registry.scope} knows{hint}')


def config_text(cfg: Config, title: str, base: str, bnet: dict, stem: str, checkpoint: str | None = None) -> str:
    """A config that inherits from another and turns its model into the same with BNET.

    Args:
        cfg: The other config, as read.
        title: What the user calls it.
        base: Its path or name, as ``_base_`` takes it.
        bnet: Arguments of :func:`enhance`.
        stem: Name of the new config, without folder and ``.py``. Its runs go to a folder of that name beside the other
            config's ``work_dir``, if that is set: two models must not share one.
        checkpoint: Name of a checkpoint beside the new config that it starts from.

    Raises:
        ValueError: If it has no model, or BNET in it already, or is a new-style config (``with read_base()``).
    """
    model = cfg.get('model') or {}
    if callable(model.get('type')):
        bnet = {name: value for name, value in bnet.items() if (name, value) != ('dilation', 1)}
        raise ValueError(
            f'{title} is a new-style config: write one that imports it by `with read_base()`, and there '
            '`from bnet_mm import WithBNET` and '
            f"`model.update(type=WithBNET, base=model['type'], bnet={call_text(bnet)})`"
        )
    if not isinstance(model.get('type'), str):
        raise ValueError(f'config {title} has no model with a type')
    if place := _bnet_in(model, 'model'):
        raise ValueError(
            f'config {title} has BNET already, at {place}; change it there, for instance with --cfg-options {place}=7'
        )
    imports = dict(cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False))
    names = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
    imports['imports'] = [*names, *(['bnet_mm'] if 'bnet_mm' not in names else [])]
    if bnet['dilation'] == 1:
        bnet = dict(k=bnet['k'], where=bnet['where'])
    lines = [
        f'# {title} with BNET-{bnet["k"]} at {bnet["where"]!r}.',
        f'_base_ = {base!r}',
        f'custom_imports = {call_text(imports)}',
        f'model = {call_text(dict(type="WithBNET", base=model["type"], bnet=bnet))}',
    ]
    if cfg.get('work_dir'):
        lines.append(f'work_dir = {os.path.join(os.path.dirname(cfg.work_dir.rstrip("/")), stem)!r}')
    if checkpoint:
        lines.append(f"load_from = '{{{{ fileDirname }}}}/{checkpoint}'")
    return '\n'.join(lines) + '\n'


def inherited_names(cfg: Config, path: str = '') -> dict[str, Any]:
    """What names a run in a config, beside ``work_dir``: where it starts from, and what its visualizers call it."""
    found = {key: cfg[key] for key in ('load_from', 'resume') if cfg.get(key)}
    for place, node in dicts_in(cfg.get('visualizer') or {}, 'visualizer'):
        names = ('save_dir', 'name', 'project', 'experiment_name', 'exp_name', 'run_name', 'group', 'id')
        # The visualizer itself has a name, which nothing outside of the process sees.
        found |= {f'{place}.{key}': node[key] for key in names if node.get(key) and place != 'visualizer'}
        if place == 'visualizer' and node.get('save_dir'):
            found['visualizer.save_dir'] = node['save_dir']
    return found


def dicts_in(node: Any, place: str = '') -> Iterator[tuple[str, dict]]:
    """Every dict in a config, with the place where ``--cfg-options`` finds it."""
    if isinstance(node, dict):
        yield place, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        yield from dicts_in(child, f'{place}.{key}')


def type_name(node: dict) -> str:
    """The name in ``type``; empty if there is none. In new-style configs it is a class, or its path in dumped ones."""
    kind = node.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _bnet_in(model: dict, place: str) -> str:
    """Where k of a BNET stands in the config of a model; empty if there is none."""
    for where, node in dicts_in(model, place):
        if type_name(node) == 'WithBNET' and node.get('bnet') is not None:
            return f'{where}.bnet.k'
        if type_name(node) == 'BNET':
            return f'{where}.k'
    return ''


def call_text(value: Any) -> str:
    """A value as configs write it: dict(k=3, where='C')."""
    if isinstance(value, dict):
        if all(str(name).isidentifier() for name in value):
            return f'dict({", ".join(f"{name}={call_text(one)}" for name, one in value.items())})'
        return f'{{{", ".join(f"{name!r}: {call_text(one)}" for name, one in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(call_text, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(call_text, value))}{"," * (len(value) == 1)})'
    return repr(value)


def _adapt_host(model: nn.Module) -> None:
    """Change what hosts do to norms by other ways than the norms' methods.

    ``zero_init_residual`` reaches a BNET at C, which mmdet's and mmseg's ResNeXt forget; only where nothing pretrained
    is read: the host says that by a single ``init_cfg``, its own defaults are a list. And mmaction's ResNet, which
    reads torchvision's files by itself, reads norms by ``load_state_dict``.
    """
    networks: list[Duck] = [m for m in model.modules() if getattr(m, 'zero_init_residual', False)]
    networks = [network for network in networks if not isinstance(network.init_cfg, dict)]
    blocks: list[Duck] = [m for network in networks for m in network.modules()]
    for block in blocks:
        for name in norm_names(block).get('C', ()):
            if isinstance(block.get_submodule(name), BNET) and getattr(block, 'init_cfg', False) is None:
                block.init_cfg = dict(type='Constant', val=0, override=dict(name=name))
    module: Duck
    for module in model.modules():
        if hasattr(module, '_load_bn_params'):
            module._load_bn_params = _load_torchvision_norm


def _load_torchvision_norm(norm: nn.Module, state_dict: dict, name: str, loaded_names: list[str]) -> None:
    """What mmaction's ``ResNet._load_bn_params`` does, by ``load_state_dict``: BNET reads BN and official layers."""
    host_keys = {to_our_key(key): key for key in state_dict}
    found = {key: original for key, original in host_keys.items() if key.startswith(f'{name}.')}
    norm.load_state_dict({key[len(name) + 1 :]: state_dict[original] for key, original in found.items()})
    loaded_names.extend(found.values())
