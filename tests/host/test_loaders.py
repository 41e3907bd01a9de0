"""mmengine's loaders read what they fetch with weights_only."""

import os

import pytest
import torch
from mmengine.runner import CheckpointLoader

from bnet_mm.checkpoint.layouts import CheckpointError
from helpers.pickles import Exploit


@pytest.mark.parametrize('url', ['https://example.invalid/evil.pth', 'open-mmlab://detectron/resnet50_caffe'])
def test_what_is_fetched_is_read_safely_too(tmp_path, monkeypatch, url):
    """mmengine's own loaders ask torch for weights_only=False there."""

    def fetch(url, path, *args, **kwargs):
        torch.save(dict(state_dict={}, extra=Exploit(tmp_path / 'executed')), path)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))  # for its list of addresses; HOME may not be writable
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    with pytest.raises(CheckpointError, match='refused'):
        CheckpointLoader.load_checkpoint(url, map_location='cpu')
    assert list((tmp_path / 'hub' / 'checkpoints').iterdir())  # it was fetched
    assert not (tmp_path / 'executed').exists()
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


@pytest.mark.parametrize('path', ['evil.pth', 'https://example.invalid/evil.pth'])
def test_torchs_switch_to_unsafe_loading_has_no_effect(tmp_path, monkeypatch, path):
    """Many users set it to get round mmengine's defect; it stays set, and the file is still not executed."""
    torch.save(dict(state_dict={}, extra=Exploit(tmp_path / 'executed')), tmp_path / 'evil.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, to, *_, **__: os.link(tmp_path / 'evil.pth', to))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(CheckpointError, match='refused'):
        CheckpointLoader.load_checkpoint(path if '://' in path else str(tmp_path / path), map_location='cpu')
    assert not (tmp_path / 'executed').exists()
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'


def test_no_scheme_of_mmengine_is_left_out():
    for prefix, loader in CheckpointLoader._schemes.items():
        assert loader.__module__ == 'bnet_mm.host.loaders' or hasattr(loader, '__wrapped__'), prefix
