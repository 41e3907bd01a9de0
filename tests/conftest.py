from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = REPO.parent / 'shared' / 'data'


def pytest_configure(config):
    pytest.REPO, pytest.SHARED_DATA = REPO, SHARED_DATA


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        if item.get_closest_marker('data') and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason='needs ../shared/data, which is not part of the package'))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope():
    """Host registries look names up in a process-wide default scope; leave it as it was found."""
    from mmengine.registry import DefaultScope

    instances = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(instances)
