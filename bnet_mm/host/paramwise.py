"""A word in the log where ``paramwise_cfg`` reaches BNET by accident.

mmengine looks for each of ``custom_keys`` anywhere in a parameter's name, so that ``conv`` also finds ``bn1.bnconv``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from bnet_mm.layers import BNET
from bnet_mm.messages import first_of


class LoggingOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, which also logs the keys that reach taps where they would not reach a norm's weight."""

    def __call__(self, model: nn.Module) -> OptimWrapper:
        keys = self.paramwise_cfg.get('custom_keys', {})
        for key, names in matches_by_accident(getattr(model, 'module', model), keys).items():
            print_log(
                f'custom_keys {key!r} ({keys[key]}) also reaches {first_of(names, 2)}, the taps of BNET, by their name '
                "bnconv; add a key 'bnconv' if they shall have other settings",
                logger='current',
                level=logging.WARNING,
            )
        return super().__call__(model)


def matches_by_accident(model: nn.Module, keys: Iterable[str]) -> dict[str, list[str]]:
    """Key -> the parameters of BNET's transforms that it reaches only because they are below ``bnconv``.

    A key that names ``bnconv`` in full means it; one that also finds the name without it, such as ``backbone`` or
    ``bn1``, would find a norm's weight there.
    """
    keys = sorted(sorted(keys), key=len, reverse=True)  # as mmengine does: the longest that matches counts

    def chosen(name: str) -> str | None:
        return next((key for key in keys if key in name), None)

    found: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.bnconv.named_parameters() if isinstance(module, BNET) else ():
            key = chosen(f'{prefix}.bnconv.{name}')
            if key and 'bnconv' not in key and key != chosen(f'{prefix}.{name}'):
                found.setdefault(key, []).append(f'{prefix}.bnconv.{name}')
    return found
