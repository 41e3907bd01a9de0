"""fold() warns of a Sequential that its owner takes apart, and of no other."""

import warnings

import pytest
import torch
from torch import nn

import bnet_mm
from bnet_mm import BNET


class Owner(nn.Module):
    """A stem of a convolution and its norm, which a subclass uses in its own way."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4), nn.ReLU())
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
        self.name = 'stem'


class Whole(Owner):
    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x) + x
        return self.stages[0](x)


class Indexes(Owner):
    def forward(self, x):
        return self.stem[1](self.stem[0](x).relu())


class Loops(Owner):
    def forward(self, x):
        outputs = []
        for layer in self.stem:
            x = layer(x)
            outputs.append(x)
        return outputs


class LoopsByName(Owner):
    def forward(self, x):
        stem = getattr(self, self.name)
        for i in range(2):
            x = stem[i](x)
        return x


class InList(Owner):
    def forward(self, x):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage[1](stage[0](x).relu()) * i
        return x


class OfAnotherName(Owner):
    def forward(self, x):
        return getattr(self, 'stages')[0](self.stem(x))  # noqa: B009


class ThroughAView(Owner):
    def forward(self, x):
        for layer in self.stem.children():
            x = layer(x)
        return x


class ThroughItsDict(Owner):
    def forward(self, x):
        return self.stem._modules['0'](x)


class ThroughAnotherMethod(Owner):
    def forward(self, x):
        return [layer for layer in self.stem.parameters()][0] + self.stem(x).mean()


class InListByIndex(Owner):
    def forward(self, x):
        return self.stages[0][1](self.stem(x))


@pytest.mark.parametrize('kind, names', [
    (Whole, []), (Indexes, ['stem']), (Loops, ['stem']), (LoopsByName, ['stem']), (ThroughAView, ['stem']),
    (ThroughItsDict, ['stem']), (ThroughAnotherMethod, []), (OfAnotherName, []),
    (InList, ['stages.0', 'stages.1']), (InListByIndex, ['stages.0', 'stages.1']),
])  # fmt: skip
def test_warns_of_what_is_taken_apart(kind, names):
    model = kind().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        bnet_mm.fold(model)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(names)
    for text, name in zip(texts, names):
        assert f'{kind.__name__} takes the Sequential {name} apart' in text and f'{name}.1' in text


def test_below_another_owner_and_with_inputs():
    """The owner is found at any depth; with inputs the comparison decides, and nothing is warned of."""
    model = nn.Sequential(nn.Sequential(Indexes())).eval()
    nn.init.constant_(model[0][0].stem[1].norm.running_mean, 0.5)
    with pytest.warns(UserWarning, match='Sequential 0.0.stem apart'):
        bnet_mm.fold(model, inplace=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='not called as a whole'):
            bnet_mm.fold(model, inputs=(torch.randn(1, 3, 8, 8),))
        bnet_mm.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())


@pytest.mark.parametrize('scope, kind', [
    ('mmdet', 'ResNet'), ('mmseg', 'ResNetV1c'), ('mmpretrain', 'ResNet'), ('mmaction', 'ResNet'),
])  # fmt: skip
def test_hosts_resnets_are_called_as_a_whole(scope, kind):
    pytest.importorskip(scope)
    import importlib

    from mmengine.registry import MODELS, DefaultScope

    importlib.import_module('bnet_mm.host.compat')
    importlib.import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(dict(type='WithBNET', base=kind, depth=18, bnet=dict(k=3)))
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bnet_mm.fold(model)
