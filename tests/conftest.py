import sys

import pytest
import torch
from mmengine.registry import DefaultScope

pytest.register_assert_rewrite('helpers')

from bnet_mm.cli import run_tool  # noqa: E402
from helpers.hosts import import_host_models  # noqa: E402
from helpers.paths import SHARED_DATA  # noqa: E402
from helpers.tools import load_tool  # noqa: E402


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


@pytest.fixture
def mmdet_scope():
    pytest.importorskip('mmdet')
    import_host_models('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture
def leftovers(monkeypatch):
    """What mmengine's loader reported since the test began; it prints, or logs to 'current', as its caller asks."""
    reports = []
    monkeypatch.setattr('mmengine.runner.checkpoint.print_log', lambda text, **_: reports.append(text))
    return lambda: [text for text in reports if 'do not match exactly' in text]


@pytest.fixture
def prepare_data(monkeypatch, capsys):
    """Run tools/prepare_data.py with these arguments: exit code, stdout and stderr."""
    pytest.importorskip('pycocotools')
    tool = load_tool('prepare_data')

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['prepare_data.py', *map(str, arguments)])
        code, message = 0, ''
        try:
            run_tool(tool.main)
        except SystemExit as end:
            code, message = (1, end.code) if isinstance(end.code, str) else (end.code, '')
        printed = capsys.readouterr()
        return code, printed.out, printed.err + message

    return run
