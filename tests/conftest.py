import pytest
import torch
from mmengine.registry import DefaultScope
from paths import SHARED_DATA


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('data') and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason='needs ../shared/data, which is not part of the package'))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_default_scope():
    """Host registries look names up in a process-wide default scope; leave it as it was found."""
    instances = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(instances)
