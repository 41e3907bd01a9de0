"""Importing the models of the four host libraries where their own packaging stands in the way."""

import importlib
import sys
import types
from contextlib import contextmanager

import pytest

# Packages that a host imports and that are not there: mmaction2 1.2.0's wheel forgets one of its own, and mmpretrain
# imports torchvision for a metric that has nothing to do with its models.
STAND_INS = {
    'mmaction': {'mmaction.models.localizers.drn': {}, 'mmaction.models.localizers.drn.drn': {'DRN': object}},
    'mmpretrain': {'torchvision': {}, 'torchvision.ops': {}, 'torchvision.ops.boxes': {}},
}


def import_host_models(scope):
    """Import <scope>.models; skip the test if the library is not installed."""
    if scope == 'mmengine':
        return
    pytest.importorskip(scope)
    with stand_ins(STAND_INS.get(scope, {})):
        importlib.import_module(f'{scope}.models')


@contextmanager
def stand_ins(modules):
    """Put empty modules in sys.modules for as long as the import lasts, where the real ones cannot be imported."""
    added = []
    for name, content in modules.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(content)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
