import pytest
from torch import distributed as dist


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()
