"""A child config's custom_imports replace the base's: our tools say so, and the documented line keeps both."""

import argparse

import pytest
from mmengine.config import Config

from bnet_mm.cli import UserError, load_config

BASE = """
custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)
model = dict(type='WithBNET', base='ResNet', bnet=dict(k=3), depth=18)
"""


@pytest.fixture
def load(tmp_path):
    """load(line): a child of BASE with this line, read as the tools do."""

    def read(line):
        (tmp_path / 'base.py').write_text(BASE)
        (tmp_path / 'child.py').write_text(f"_base_ = './base.py'\n{line}\n")
        path = str(tmp_path / 'child.py')
        return load_config(
            argparse.Namespace(config=path, cfg_options={}, launcher='none', work_dir=None, local_rank=0)
        )

    return read


def test_the_child_that_loses_them(load):
    with pytest.raises(UserError, match=r"child.py uses type='WithBNET' but does not import bnet_mm: add") as caught:
        load("custom_imports = dict(imports=['json'])")
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('line', [
    "custom_imports = dict(imports=['bnet_mm', 'json'])",
    "custom_imports = dict(imports=[*_base_.custom_imports.imports, 'json'])",
    'work_dir = "elsewhere"',
])  # fmt: skip
def test_the_child_that_keeps_them(load, line):
    cfg = load(line)
    assert isinstance(cfg, Config) and 'bnet_mm' in cfg.custom_imports.imports
    assert ('json' in cfg.custom_imports.imports) == ('json' in line)
