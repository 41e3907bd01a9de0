"""The backbones of bnet_mm.models, and FreezeTransform."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from paths import REPO
from torch import nn

import bnet_mm.host.compat  # noqa: F401  (before mmpretrain imports torchvision)
from bnet_mm import BNET
from bnet_mm.engine.hooks import FreezeTransform

pytest.importorskip('mmpretrain')
if importlib.util.find_spec('torchvision') is None:
    pytest.skip('mmpretrain needs torchvision', allow_module_level=True)

from bnet_mm.models import BinaryConv2d, BiRealResNet, ResNetV2  # noqa: E402
from bnet_mm.models.bireal import BiRealBlock, binary_activation, binary_weight  # noqa: E402
from bnet_mm.models.resnet_v2 import PreActivationBottleneck  # noqa: E402

# ---------------------------------------------------------------------------------------------------------- Bi-Real Net


def test_sign_of_activations_and_its_gradient():
    x = torch.cat([torch.randn(1000).double() * 1.5, torch.tensor([-2.0, -1, 0, 1, 2]).double()]).requires_grad_()
    weight = torch.randn(len(x)).double()
    y = binary_activation(x)
    assert y.dtype == x.dtype and torch.equal(y, torch.tensor([-1.0 if value < 0 else 1.0 for value in x]).double())
    (y * weight).sum().backward()
    twin = x.detach().clone().requires_grad_()  # ApproxSign, eq. 6 of the paper: its derivative is the gradient
    pieces = [twin * 0 - 1, 2 * twin + twin**2, 2 * twin - twin**2, twin * 0 + 1]
    index = (twin >= -1).long() + (twin >= 0).long() + (twin >= 1).long()
    (torch.stack(pieces).gather(0, index[None])[0] * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)


def test_sign_of_weights_and_its_gradient():
    weight = (torch.randn(4, 3, 3, 3).double() * 0.8).requires_grad_()
    upstream = torch.randn_like(weight)
    binary = binary_weight(weight)
    for filter_, result in zip(weight.detach(), binary):
        scale = sum(abs(value) for value in filter_.flatten().tolist()) / filter_.numel()
        torch.testing.assert_close(result, scale * (2 * (filter_ > 0) - 1.0).double())
    (binary * upstream).sum().backward()
    assert 0 < (weight.abs() > 1).sum() < weight.numel()
    torch.testing.assert_close(weight.grad, torch.where(weight.abs() > 1, 0, upstream))


def test_binary_convolution_is_one_of_signs():
    conv = BinaryConv2d(3, 6, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(2, 3, 7, 8).double()
    windows = F.unfold(torch.where(x < 0, -1.0, 1.0).double(), 3, padding=1, stride=2)
    scale = conv.weight.abs().flatten(1).mean(1)
    expected = scale[:, None] * (conv.weight.sign().flatten(1) @ windows)
    torch.testing.assert_close(conv(x), expected.view(2, 6, 4, 4))


def norm_of(x, layer):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def randomised(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(-1, 1), layer.bias.data.normal_()
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return module.double().eval()


@pytest.mark.parametrize('stride', [1, 2])
def test_bireal_block_has_a_shortcut_around_each_convolution(stride):
    down = None
    if stride == 2:
        down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = BiRealBlock(4, 4, stride=stride, downsample=down)
    randomised(block)
    x = torch.randn(2, 4, 6, 6).double()
    middle = norm_of(block.conv1(x), block.bn1) + (x if down is None else down(x))
    torch.testing.assert_close(block(x), norm_of(block.conv2(middle), block.bn2) + middle)


def test_bireal_resnet():
    model = BiRealResNet(depth=18, out_indices=(0, 1, 2, 3))
    model.init_weights()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(y.shape) for y in outputs] == [(2, 64 * 2**i, 16 >> i, 16 >> i) for i in range(4)]
    binary = [name for name, module in model.named_modules() if isinstance(module, BinaryConv2d)]
    assert binary == [f'layer{i}.{j}.conv{k}' for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert all(float(block.bn2.weight.min()) == 1 for block in model.layer4)
    outputs[3].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ ResNet v2


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


# ------------------------------------------------------------------------------------------------- FreezeTransform, use


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = BNET(4, k=3)
        self.head = nn.Conv2d(4, 1, 3)

    def forward(self, x, mode='loss'):
        return dict(loss=self.head(self.bn(self.conv(x))).square().mean())


def run(work_dir, epochs, **options):
    data = [dict(x=image) for image in torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    states = []

    class Record(FreezeTransform):
        def after_train_epoch(self, runner):
            model = getattr(runner.model, 'module', runner.model)
            states.append({key: value.clone() for key, value in model.state_dict().items()})

    runner = Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-2)),
        custom_hooks=[Record(epoch=1)],
        default_hooks=dict(logger=None, runtime_info=None),
        experiment_name=f'freeze{work_dir.name}{epochs}{len(options)}',
        **options,
    )
    runner.train()
    return states


def moved(old, new, part):
    return {not torch.equal(value, new[key]) for key, value in old.items() if key.startswith(part)}


def test_freeze_transform(tmp_path):
    states = run(tmp_path, 5)
    for epoch in range(1, 5):  # epochs 0 and 1 train the transform
        before, after = states[epoch - 1], states[epoch]
        assert moved(before, after, 'bn.bnconv') == {epoch <= 1}
        assert moved(before, after, 'bn.norm') == moved(before, after, 'head') == {True}
    resumed = run(tmp_path, 7, load_from=str(tmp_path / 'epoch_5.pth'), resume=True)
    assert len(resumed) == 2 and moved(states[-1], resumed[-1], 'bn.bnconv') == {False}
    assert moved(states[-1], resumed[-1], 'conv') == {True}


def test_freeze_transform_in_distributed_training(tmp_path, monkeypatch):
    for name in ('LOCAL_RANK', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # mmengine reads the first, sets the others
        monkeypatch.setenv(name, '0' if name == 'LOCAL_RANK' else '1')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        wrapped = dict(cfg=dict(model_wrapper_cfg=dict(wrapper, find_unused_parameters=True)))
        states = run(tmp_path, 3, launcher='pytorch', **wrapped)
        assert moved(states[1], states[2], 'bn.bnconv') == {False} and moved(states[0], states[1], 'bn.bnconv') == {
            True
        }
        wrapped['cfg']['model_wrapper_cfg']['find_unused_parameters'] = False
        with pytest.raises(ValueError, match='find_unused_parameters = True'):
            run(tmp_path, 3, launcher='pytorch', **wrapped)
    finally:
        dist.destroy_process_group()


def test_freeze_transform_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='epoch must be a positive integer, got 0'):
        FreezeTransform(epoch=0)
    runner = type('Runner', (), dict(model=nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match='no BNET'):
        FreezeTransform(epoch=1).before_train(runner)


def test_readme_command_makes_a_backbone_for_detectors(tmp_path):
    """The command of configs/README.md, on a checkpoint of resnet50_bnet5_imagenet.py, for mmdet's ResNet."""
    pytest.importorskip('mmdet.models')
    command = re.search(r'^python (tools/convert_checkpoint.py .+)', (REPO / 'configs/README.md').read_text(), re.M)[1]
    tool, source, target, option = command.split()
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        trained = MODELS.build(Config.fromfile(REPO / 'configs/resnet50_bnet5_imagenet.py').model)
    for p in trained.parameters():
        nn.init.normal_(p)
    source, target = tmp_path / Path(source).name, tmp_path / Path(target).name
    torch.save(dict(meta=dict(epoch=100), state_dict=trained.state_dict(), optimizer={}), source)
    done = subprocess.run([sys.executable, tool, source, target, option], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and 'left out: head.fc.weight, head.fc.bias' in done.stdout, done.stderr
    assert torch.load(target, weights_only=True)['meta'] == dict(epoch=100, converted_from=source.name)
    init = dict(type='Pretrained', checkpoint=str(target))
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(dict(type='WithBNET', base='ResNet', bnet=dict(k=5), depth=50, init_cfg=init))
        detector.init_weights()
    expected = trained.backbone.state_dict()
    assert expected.keys() == detector.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in detector.state_dict().items())
