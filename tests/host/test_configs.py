"""Our configs by name, from anywhere."""

import mmengine.hub
import pytest
from mmengine.config import Config

from bnet_mm.host.configs import find_config, find_weights
from helpers.paths import REPO


def test_configs_by_name(tmp_path):
    """From the checkout, as in an editable installation."""
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'bnet_mm::faster_rcnn_r50_bnet5_1x.py'\nmodel = dict(backbone=dict(depth=18))"
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert (cfg.model.backbone.type, cfg.model.backbone.bnet.k, cfg.model.backbone.depth) == ('WithBNET', 5, 18)
    assert find_config('tsn_r50_bn_ucf101') == str(REPO / 'configs' / 'tsn_r50_bn_ucf101.py')
    with pytest.raises(
        FileNotFoundError, match=r'no config tsn_r50_bnet9_ucf101.py; did you mean tsn_r50_bnet\d_ucf101'
    ):
        find_config('bnet_mm::tsn_r50_bnet9_ucf101.py')


def test_hub():
    cfg = mmengine.hub.get_config('bnet_mm::retinanet_r101_bn_1x.py', pretrained=True)
    assert cfg.model_path.endswith('retinanet_r101_fpn_1x_coco_20200130-7a93545f.pth')
    with pytest.raises(ValueError, match='no weights were released for tsn_r50_bn_ucf101.py'):
        find_weights('tsn_r50_bn_ucf101')
    stock = mmengine.hub.get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert stock.model.backbone.type == 'ResNet'
