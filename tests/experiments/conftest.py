import pytest

from bnet_mm.datasets.toy import write_imagenet
from bnet_mm.experiments.plan import read_plan
from helpers.paths import REPO

BASE = """
_base_ = '{repo}/configs/experiments/imagenette_r18.py'
model = dict(backbone=dict(stem_channels=8, base_channels=4), head=dict(in_channels=32, num_classes=3))
data_root = '{data}'
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
data_preprocessor = dict(num_classes=3)
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1))
"""
PLAN = """
about: Shapes.
base: base.py
metric: accuracy/top1
seeds: {seeds}
variants:
  BN:
  BNET-3:
    than: BN
    options: {{model.backbone.type: WithBNET, model.backbone.base: ResNet, model.backbone.bnet: {{k: 3, where: C}}}}
  {more}
claims:
  - {{source: Table 2, says: better, printed: 0.7, variant: BNET-3, than: BN}}
"""


@pytest.fixture
def make_plan(tmp_path):
    """A plan of BN and BNET-3 on twelve generated images."""
    pytest.importorskip('mmpretrain')

    def make(seeds=1, more=''):
        if not (tmp_path / 'data').exists():
            write_imagenet(tmp_path / 'data', dict(train=12, val=6), size=48, seed=0)
        (tmp_path / 'base.py').write_text(BASE.format(repo=REPO, data=tmp_path / 'data'))
        (tmp_path / 'shapes.yml').write_text(PLAN.format(seeds=seeds, more=more))
        return read_plan(tmp_path / 'shapes.yml')

    return make
