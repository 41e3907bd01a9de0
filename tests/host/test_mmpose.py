"""mmpose, as an example of a library whose registries are children of mmengine's: nothing in the package knows of it."""

import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from bnet_mm import BNET, enhance
from helpers.paths import REPO

pytest.importorskip('mmpose', reason='needs mmpose, which is not among the pinned libraries')


def build(**cfg):
    pytest.importorskip('mmpose.models')
    with DefaultScope.overwrite_default_scope('mmpose'):
        return MODELS.build(cfg)


HRNET = dict(
    stage1=dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(16,)),
    stage2=dict(num_modules=1, num_branches=2, block='BASIC', num_blocks=(1, 1), num_channels=(8, 16)),
    stage3=dict(num_modules=1, num_branches=3, block='BASIC', num_blocks=(1, 1, 1), num_channels=(8, 16, 32)),
    stage4=dict(num_modules=1, num_branches=4, block='BASIC', num_blocks=(1,) * 4, num_channels=(8, 16, 32, 64)),
)


@pytest.mark.parametrize('base, options, where, layers', [
    ('ResNet', dict(depth=18), 'C', 8), ('HRNet', dict(extra=HRNET), 'C', 1 + 2 + 3 + 4),
    ('CSPNeXt', dict(widen_factor=0.25), 'all', None),
])  # fmt: skip
def test_backbones(base, options, where, layers):
    """In place and by the config; outputs as before."""
    model = build(type=base, **options)
    model.eval()
    layers = layers or sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        assert len(enhance(model, k=3, where=where).changed) == layers
        for one, other in zip(model(x), want):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    built = build(type='WithBNET', base=base, bnet=dict(k=5, where=where), **options)
    assert sum(isinstance(module, BNET) and module.bnconv.k == 5 for module in built.modules()) == layers


def test_convert_config(tmp_path):
    name = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'
    out = tmp_path / 'pose.py'
    command = [sys.executable, f'{REPO}/tools/convert_config.py', name, '-o', str(out), '--where', 'all']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'norms of TopdownPoseEstimator' in done.stdout and "base='TopdownPoseEstimator'" in out.read_text()
