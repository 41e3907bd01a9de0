"""The runner that does not go on with a checkpoint of another model."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from helpers.checkpoints import save
from helpers.hosts import import_host_models


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
