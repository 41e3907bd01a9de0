"""The runner that does not go on with a checkpoint of another model."""

import logging

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from bnet_mm import SN2d
from bnet_mm.checkpoint.layouts import CheckpointError
from helpers import reference
from helpers.checkpoints import save
from helpers.hosts import import_host_models


def strict_runner(model):
    from bnet_mm.engine.runner import CheckedRunner

    runner = object.__new__(CheckedRunner)
    runner.model, runner.logger, runner._hooks, runner.strict_loading = model, logging.getLogger('nowhere'), [], True
    return runner


def test_the_official_layout_of_sn_can_be_resumed(tmp_path):
    """(1, C, 1, 1), which SN reads although the shape is another."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), SN2d(4))
    given = reference.randomise(net).state_dict()
    official = {
        key.replace('.bn.', '.'): value.view(1, -1, 1, 1) if value.shape == (4,) and key[0] == '1' else value
        for key, value in given.items()
    }
    fresh = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), SN2d(4))
    strict_runner(fresh).load_checkpoint(save(dict(state_dict=official), tmp_path / 'a.pth'))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, given[name]), name


@pytest.mark.parametrize('value, message', [
    ([1.0, 2.0], 'While copying the parameter named "0.weight".*expected torch.Tensor'),
    (torch.zeros(4, 3), 'size mismatch for 0.weight'), (torch.zeros(4, 3, 1, 1).to_sparse(), '"0.weight"'),
])  # fmt: skip
def test_what_torch_cannot_load_is_no_checkpoint_to_resume(tmp_path, value, message):
    """mmengine logs it and goes on; of what is no tensor our runner did not know."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    path = save(dict(state_dict={**net.state_dict(), '0.weight': value}), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f'a.pth is not a checkpoint of this model: {message}|not.*{message}'):
        strict_runner(net).load_checkpoint(path)


def test_pretrained_file_that_mmaction_cannot_use_is_one_sentence(tmp_path):
    """It reads torchvision's layout by itself; our runner says what was being done."""
    from bnet_mm.cli import UserError
    from bnet_mm.engine.runner import CheckedRunner

    import_host_models('mmaction')
    path = save({'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}, tmp_path / 'a.pth')
    runner = object.__new__(CheckedRunner)
    with DefaultScope.overwrite_default_scope('mmaction'):
        runner.model = MODELS.build(dict(type='ResNet', depth=18, pretrained=path, norm_eval=False))
    with pytest.raises(UserError, match='the weights of the model cannot be initialised: KeyError: conv1.weight'):
        runner._init_model_weights()
