import copy

import pytest
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from helpers.configs import load, scope


@pytest.fixture
def build(monkeypatch):
    """Build a config's model, without random numbers, which nothing here looks at."""
    for layer in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(layer, 'reset_parameters', lambda self: None)

    def build_model(name):
        with DefaultScope.overwrite_default_scope(scope(name)):
            return MODELS.build(copy.deepcopy(load(name).model))

    return build_model
