import pytest

from helpers.tools import call_tool


@pytest.fixture(scope='session')
def toy_coco(tmp_path_factory):
    """Ten and five images, among them one with a crowd and one with nothing."""
    folder = tmp_path_factory.mktemp('custom') / 'coco'
    assert call_tool('make_toy_data', 'coco', folder, '--train', 16, '--val', 5, '--size', 64) is None
    return folder
