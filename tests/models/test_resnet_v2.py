"""ResNet v2 against its formulas, and official checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.backbones import norm_of, randomised

# isort: split
from bnet_mm.models import ResNetV2
from bnet_mm.models.resnet_v2 import PreActivationBottleneck


@pytest.mark.parametrize('stride', [1, 2])
def test_pre_activation_bottleneck(stride):
    projection = nn.Conv2d(8, 8, 1, stride=stride, bias=False)
    down = nn.Sequential(projection, nn.BatchNorm2d(8)) if stride == 2 else None
    block = PreActivationBottleneck(8, 8, stride=stride, downsample=down)
    randomised(block), projection.double()
    x = torch.randn(2, 8, 6, 6).double()
    active = F.relu(norm_of(x, block.bn1))
    out = F.conv2d(active, block.conv1.weight)
    out = F.conv2d(F.relu(norm_of(out, block.bn2)), block.conv2.weight, stride=stride, padding=1)
    out = F.conv2d(F.relu(norm_of(out, block.bn3)), block.conv3.weight)
    shortcut = x if stride == 1 else F.conv2d(active, projection.weight, stride=2)
    torch.testing.assert_close(block(x), out + shortcut)
    order = [name for name, _ in block.named_children()]
    assert order[:6] == ['bn1', 'conv1', 'bn2', 'conv2', 'bn3', 'conv3']  # CBN looks for the convolution before it


def official_v2_state(depth_blocks, using_bn=True):
    """Shapes of the checkpoints of switchable norm's ResNet v2, written down from its model."""
    state = {}

    def add_norm(name, channels):
        state.update({f'{name}.{key}': (1, channels, 1, 1) for key in ('weight', 'bias')})
        state.update({f'{name}.{key}': (3,) for key in ('mean_weight', 'var_weight')})
        state.update({f'{name}.{key}': (1, channels, 1) for key in ('running_mean', 'running_var')})

    state['conv1.weight'] = (64, 3, 7, 7)
    add_norm('sn1', 64)
    channels = 64
    for stage, blocks in enumerate(depth_blocks):
        width = 64 * 2**stage
        for i in range(blocks):
            block = f'layer{stage + 1}.{i}'
            add_norm(f'{block}.sn1', channels)
            add_norm(f'{block}.sn2', width)
            add_norm(f'{block}.sn3', width)
            state[f'{block}.conv1.weight'] = (width, channels, 1, 1)
            state[f'{block}.conv2.weight'] = (width, width, 3, 3)
            state[f'{block}.conv3.weight'] = (4 * width, width, 1, 1)
            if i == 0:
                state[f'{block}.downsample.weight'] = (4 * width, channels, 1, 1)
            channels = 4 * width
    add_norm('sn_out', channels)
    return {key: torch.randn(shape).abs() for key, shape in state.items()}


@pytest.mark.parametrize('depth, blocks', [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_resnet_v2_reads_official_switchable_norm_files(depth, blocks):
    model = ResNetV2(depth, norm_cfg=dict(type='SN'))
    state = official_v2_state(blocks)
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    for key, value in model.state_dict().items():
        if key in state:
            torch.testing.assert_close(value.flatten(), state[key].flatten())
    model.train()
    (y,) = model(torch.randn(2, 3, 64, 64))
    assert tuple(y.shape) == (2, 2048, 2, 2) and y.min() == 0  # norm and ReLU at the end


def test_resnet_v2_starts_with_all_branches_on():
    model = ResNetV2(50, norm_cfg=dict(type='SN'))
    model.init_weights()
    assert all(float(block.sn3.weight.min()) == 1 for block in model.layer1)
