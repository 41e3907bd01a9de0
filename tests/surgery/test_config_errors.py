"""What a person types wrong in a config: one sentence in the words of that config."""

import pytest
from mmengine.registry import MODELS, DefaultScope

from bnet_mm import BNET
from bnet_mm.surgery import config
from helpers.hosts import import_host_models


def build(**cfg):
    import_host_models('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='WithBNET', **cfg))


@pytest.mark.parametrize('cfg, message', [
    (dict(bnet=dict(k=3)), "WithBNET: base is missing: the type that stood here before, such as base='ResNet'"),
    (dict(base='ResNet', depth=18), "WithBNET: bnet must be a dict such as .* or None for no BNET, got nothing"),
    (dict(base='ResNet', bnet=5, depth=18), "WithBNET: bnet must be a dict such as .*, got 5"),
    (dict(base='ResNet', bnet='C', depth=18), "WithBNET: bnet must be a dict such as .*, got 'C'"),
    (dict(base='WithBNET', bnet=dict(k=3)), 'WithBNET: base must be the model itself, not another WithBNET'),
    (dict(base='ResNett', bnet={}), r"WithBNET: base='ResNett' is no model that mmdet knows; did you mean ResNet\?"),
    (dict(base='zzz', bnet=dict(k=3)), "WithBNET: base='zzz' is no model that mmdet knows"),
])  # fmt: skip
def test_bad_config(cfg, message):
    with pytest.raises(ValueError, match=message):
        build(**cfg)


def test_no_bnet_and_default_bnet_say_what_they_do(monkeypatch):
    said = []
    monkeypatch.setattr(config, 'print_log', lambda text, logger: said.append(text))
    plain = build(base='ResNet', bnet=None, depth=18)
    assert not any(isinstance(module, BNET) for module in plain.modules())
    default = build(base='ResNet', bnet={}, depth=18)
    assert sum(isinstance(module, BNET) for module in default.modules()) == 8
    assert said == ['WithBNET: bnet=None, so no norm was replaced', 'WithBNET: enhanced 8 of 20 norms of ResNet, k=3']


def test_options_that_belong_elsewhere():
    with pytest.raises(ValueError, match=r'BNET: unknown option where; it takes k, .*; where belongs to With'):
        BNET(8, k=3, where='C')
    with pytest.raises(ValueError, match='BNET: unknown option kernel_size; it takes k, dilation, eps, momentum'):
        BNET(8, kernel_size=3)
