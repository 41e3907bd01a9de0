"""The table of names in configs is what is registered, and by whom."""

import importlib
import re

import pytest
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, WEIGHT_INITIALIZERS

import bnet_mm
from bnet_mm.register import TABLE, our_types
from helpers.hosts import import_host_models
from helpers.paths import REPO
from helpers.tools import python


@pytest.mark.parametrize('entry', TABLE, ids=lambda entry: entry.name)
def test_entry(entry):
    if entry.module.startswith('bnet_mm.models.'):
        import_host_models('mmpretrain')
    importlib.import_module(entry.module.rpartition('.')[0])
    module = importlib.import_module(entry.module)
    assert entry.registry.get(entry.name) is getattr(module, entry.attribute or entry.name)


def test_names_are_there_once():
    assert len({(id(entry.registry), entry.name) for entry in TABLE}) == len(TABLE)
    assert {name for name in bnet_mm.__all__ if name[0].isupper()} <= our_types()
    assert 'Pretrained' not in our_types() and len(our_types()) == sum(not entry.replaces for entry in TABLE)


def test_nothing_of_ours_is_registered_beside_the_table():
    for registry in (HOOKS, MODELS, MODEL_WRAPPERS, WEIGHT_INITIALIZERS):
        ours = {name for name, kind in registry.module_dict.items() if kind.__module__.startswith('bnet_mm.')}
        assert ours <= {entry.name for entry in TABLE if entry.registry is registry}
    decorated = [
        path for path in REPO.glob('bnet_mm/**/*.py') if re.search(r'^@\w+\.register_module', path.read_text())
    ]
    assert not decorated


def test_the_import_leaves_what_needs_more_to_its_packages():
    later = [entry.name for entry in TABLE if entry.module.startswith(('bnet_mm.models.', 'bnet_mm.engine.processes'))]
    code = f"""
import bnet_mm
from bnet_mm.register import TABLE
missing = [entry.name for entry in TABLE if entry.name not in entry.registry.module_dict]
assert missing == {later!r}, missing
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
