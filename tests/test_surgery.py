"""enhance() beyond mmdet's ResNet, restore(), tools/convert_config.py. Stock configs of all libraries: test_zoo.py."""

import copy
import importlib
import os
import pickle
import re
import subprocess
import sys

import pytest
import reference
import torch
from hosts import import_host_models
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS, DefaultScope
from paths import REPO
from torch import nn

import bnet_mm
from bnet_mm import BNET, CBN, BNConv, FReLU, SN2d
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from bnet_mm.surgery.enhance import insert_bn_conv


class Bottleneck(nn.Module):
    """As torchvision and timm write it."""

    def __init__(self, c=4, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 1, bias=False), norm(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)
        self.conv3, self.bn3 = nn.Conv2d(c, c, 1, bias=False), norm(c)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (x + self.bn3(self.conv3(y))).relu()


def small_net(norm=nn.BatchNorm2d):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), Bottleneck(norm=norm), Bottleneck(norm=norm))
    return reference.randomise(net)


def bnet_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, BNET)}


WHERE = [
    ('C', {'3.bn3', '4.bn3'}),
    ('BA', {'3.bn1', '3.bn2', '4.bn1', '4.bn2'}),
    ('all', {'1', *(f'{i}.bn{j}' for i in (3, 4) for j in (1, 2, 3))}),
    (r'^4\..*[12]$', {'4.bn1', '4.bn2'}),
    (re.compile('bn2'), {'3.bn2', '4.bn2'}),
    (lambda name, module: name.startswith('3') and module.num_features == 4, {'3.bn1', '3.bn2', '3.bn3'}),
]


@pytest.mark.parametrize('where, names', WHERE, ids=lambda value: str(value)[:12])
def test_where(where, names):
    """Letters, 'all', regular expressions, predicates; what is reported is what was done, and the function is kept."""
    net = small_net()
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 9, 8)
    report = bnet_mm.enhance(net, k=5, where=where)
    everything = {'1', *(f'{i}.bn{j}' for i in (3, 4) for j in (1, 2, 3))}
    assert bnet_names(net) == set(report.changed) == names and report.model is net
    assert set(report.kept) == everything - names
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), twin.train(mode)(x))
    text = str(report)
    assert text.startswith(f'enhanced {len(names)} of 7 norms of Sequential')
    assert all(f'  {name}: BatchNorm2d(4) -> BNET-5\n' in text + '\n' for name in names)
    assert len(names) == 7 or f'not enhanced ({7 - len(names)})' in text


def test_copy_leaves_the_model_alone():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    report = bnet_mm.enhance(net, k=3, inplace=False)
    assert not bnet_names(net) and bnet_names(report.model) == {'3.bn3', '4.bn3'}
    reference.randomise_parameters(report.model)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize('norm', [
    nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True), SN2d, CBN,
    nn.SyncBatchNorm, nn.InstanceNorm2d,
])  # fmt: skip
def test_every_norm(norm):
    """Also in double precision, in the norm's mode and with its requires_grad."""
    net = small_net(norm).double()
    net[4].bn3.eval()
    if net[3].bn3.weight is not None:
        net[3].bn3.weight.requires_grad_(False)
        net[3].bn3.bias.requires_grad_(False)
    twin = copy.deepcopy(net)
    bnet_mm.enhance(net, k=3)
    assert [net[i].bn3.norm.training for i in (3, 4)] == [True, False]
    if net[3].bn3.weight is not None and norm is not nn.InstanceNorm2d:
        assert not any(p.requires_grad for p in net[3].bn3.bnconv.parameters())
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    if norm is nn.SyncBatchNorm:
        assert isinstance(net[3].bn3.norm, SyncBatchNorm)
        net.eval(), twin.eval()  # torch's does not train on a CPU
    torch.testing.assert_close(net(x), twin(x))


def test_what_cannot_be_replaced_is_reported():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(dict(plain=nn.BatchNorm2d(4), scaled=Scaled(4), flat=nn.LayerNorm(4), cube=nn.BatchNorm3d(4)))
    report = bnet_mm.enhance(net, where='all')
    assert list(report.changed) == ['plain']
    assert set(report.kept) == {'scaled', 'flat', 'cube'} and type(net['scaled']) is Scaled
    assert 'Scaled is no norm that BNET can hold' in str(report)
    again = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='BNET already; BatchNorm3d is no norm'):
        bnet_mm.enhance(net, where='all')
    with pytest.raises(ValueError, match="where='head', in|where='head' in ModuleDict, whose norms are plain, scaled"):
        bnet_mm.enhance(net, where='head')
    assert list(again) == list(net.state_dict())


def test_what_would_be_lost_is_left_alone():
    """Hooks, subclasses (frozen statistics), norms of other dimensions; requires_grad of weight and bias apart."""

    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    net = nn.ModuleDict(
        dict(hooked=nn.BatchNorm2d(4), frozen=Frozen(4), cube=nn.Sequential(nn.Conv3d(3, 4, 1), nn.SyncBatchNorm(4)),
             ours=BNConv(4), funnel=FReLU(4), bias=nn.BatchNorm2d(4), sn=SN2d(4))
    )  # fmt: skip
    net['hooked'].register_forward_hook(lambda module, inputs, output: output * 2)
    net['bias'].bias.requires_grad_(False)
    net['sn'].mean_weight.requires_grad_(False)
    report = bnet_mm.enhance(net, where='all')
    assert set(report.changed) == {'bias', 'sn'} and set(report.kept) == {'hooked', 'frozen', 'cube.1'}
    assert [p.requires_grad for p in (net['bias'].bnconv.weight, net['bias'].bnconv.bias)] == [True, False]
    frozen = {name for name, p in net['sn'].named_parameters() if not p.requires_grad}
    assert frozen == {'norm.mean_weight'}
    double = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)).double()
    bnet_mm.enhance(double, where='all')
    assert double[1].bnconv.weight.dtype == torch.float64


def test_optimizer_ema_and_ddp_after_enhancing(tmp_path):
    net = small_net()
    bnet_mm.enhance(net, k=3)
    average = ExponentialMovingAverage(net, momentum=0.5)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        before = net[3].bn3.bnconv.weight.detach().clone()
        wrapped(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    after = net[3].bn3.bnconv.weight.detach()
    assert (after != before).all()
    for _ in range(2):  # the first update copies
        average.update_parameters(net)
    torch.testing.assert_close(average.module[3].bn3.bnconv.weight, after)


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_bn_conv_and_frelu_through_with_bnet(scope):
    """BNConv at C keeps the BN; FReLU replaces all activations of stages 1 to 3, in the order of their calls."""
    cfg = dict(type='ResNet', depth=50, base_channels=8, stem_channels=8)
    if scope == 'mmpretrain':
        cfg = dict(type='ResNet', depth=50)
    plain = build(scope, cfg)
    conv = build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': dict(type='BNConv', k=3, where='C')})
    layers = {name: m for name, m in conv.named_modules() if isinstance(m, BNConv)}
    assert len(layers) == 16 and all(name.endswith('bn3') for name in layers)
    report = conv.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys and all(name.endswith('bn3.conv.weight') for name in report.missing_keys)

    model = build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': None, 'frelu': True})
    reference.randomise(model)
    block = model.layer2[1]
    model.eval()
    assert len(model.layer1[0].relu) == 3 and isinstance(model.layer4[0].relu, nn.ReLU) and not bnet_names(model)
    first, second, third = block.relu
    x = torch.randn(2, block.conv1.in_channels, 6, 5)
    y = second(block.norm2(block.conv2(first(block.norm1(block.conv1(x))))))
    want = third(block.norm3(block.conv3(y)) + x)
    for _ in range(2):
        torch.testing.assert_close(block(x), want)
    twin = pickle.loads(pickle.dumps(block))
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(ValueError, match="bnet.type must be 'BNET' or 'BNConv', got 'GN'"):
        build(scope, {**cfg, 'type': 'WithBNET', 'base': 'ResNet', 'bnet': dict(type='GN')})


def test_insert_bn_conv_says_what_it_did_and_its_own_name():
    net = small_net()
    net.append(nn.GroupNorm(2, 4))
    report = insert_bn_conv(net, k=5, where='^4|^5')
    assert set(report.changed) == {'4.bn1', '4.bn2', '4.bn3'} and report.kept['5'] == 'no BatchNorm2d'
    assert '  4.bn3: BatchNorm2d(4) -> BNConv-5' in str(report) and report.kept['1'] == "not at where='^4|^5'"
    assert {name for name, m in net.named_modules() if isinstance(m, BNConv)} == set(report.changed)
    before = list(net.modules())
    for where, k, message in [
        ('head', 3, "insert_bn_conv: no norm to replace at where='head' in Sequential, whose norms are 1, 3.bn1"),
        ('5', 3, "insert_bn_conv: no norm to replace at where='5' in Sequential: no BatchNorm2d"),
        ('(', 3, "insert_bn_conv: where='(' is no regular expression"),
        (3, 3, 'insert_bn_conv: where must be letters'),
        ('C', 4, 'BNConv: k must be a positive odd integer, got 4'),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            insert_bn_conv(net, k, where)
    assert list(net.modules()) == before


# --- families of blocks


def build(scope, cfg):
    import_host_models(scope)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


STAGES = [f'layer{i}.{j}' for i, n in enumerate((2, 2, 2, 2), 1) for j in range(n)]
HOST_FAMILIES = [
    ('mmaction', dict(type='ResNet', depth=18, norm_eval=False), 'C', {f'{b}.conv2.bn' for b in STAGES}),
    ('mmaction', dict(type='ResNet', depth=18, norm_eval=False), 'A', {f'{b}.conv1.bn' for b in STAGES}),
    ('mmdet', dict(type='Darknet', depth=53), 'A', 23),
    ('mmdet', dict(type='MobileNetV2'), 'A', 16),
    ('mmdet', dict(type='MobileNetV2'), 'B', 17),
    ('mmseg', dict(type='MobileNetV2'), 'A', 16),
    ('mmpretrain', dict(type='MobileNetV2', widen_factor=0.25), 'A', 16),
    ('mmpretrain', dict(type='MobileNetV2', widen_factor=0.25), 'C', 17),
    ('mmaction', dict(type='MobileNetV2', widen_factor=0.25), 'BC', 34),
    ('mmpretrain', dict(type='MobileNetV3', arch='small_075'), 'A', 10),
    ('mmdet', dict(type='Res2Net', depth=50, scales=4, base_width=8, base_channels=16), 'B', 48),
    ('mmdet', dict(type='Res2Net', depth=50, scales=4, base_width=8, base_channels=16), 'C', 16),
    ('mmpretrain', dict(type='ResNeSt', depth=50), 'B', 16),
    ('mmdet', dict(type='RegNet', arch='regnetx_400mf'), 'C', 22),
    ('mmpretrain', dict(type='SEResNet', depth=50), 'C', 16),
    ('mmseg', dict(type='ResNetV1c', depth=18), 'C', {f'{b}.bn2' for b in STAGES}),
]  # fmt: skip


@pytest.mark.parametrize('scope, cfg, where, names', HOST_FAMILIES, ids=lambda v: v if isinstance(v, str) else None)
def test_host_families(scope, cfg, where, names):
    """Names, or numbers of blocks from the papers' architecture tables. MobileNetV2's first has no expansion."""
    model = build(scope, cfg)
    assert all(p.requires_grad for p in model.parameters())
    before = {name: m.num_features for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    report = bnet_mm.enhance(model, k=3, where=where)
    assert (set(report.changed) if isinstance(names, set) else len(report.changed)) == names
    assert not any('downsample' in name or 'stem' in name for name in report.changed)
    if 'MobileNet' in cfg['type']:  # the expansion is what is wider than the block's output
        for name in report.changed:
            assert where != 'A' or not name.startswith(('conv1', 'conv2')) and before[name] >= 16


def import_or_skip(name):
    """torchvision and timm are no dependencies, and a torchvision for another torch raises more than ImportError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'{name}: {error}')


@pytest.mark.parametrize('library, name, where, number', [
    ('torchvision', 'resnet18', 'C', 8), ('torchvision', 'resnext50_32x4d', 'B', 16),
    ('torchvision', 'mobilenet_v2', 'A', 16), ('timm', 'resnet26', 'C', 8), ('timm', 'resnet50d', 'A', 16),
])  # fmt: skip
def test_torchvision_and_timm(library, name, where, number):
    if library == 'torchvision':
        net = getattr(import_or_skip('torchvision.models'), name)()
    else:
        net = import_or_skip('timm').create_model(name)
    net = reference.randomise(net).double().eval()
    twin, x = copy.deepcopy(net), torch.randn(1, 3, 64, 70, dtype=torch.float64)
    report = bnet_mm.enhance(net, k=3, where=where)
    assert len(report.changed) == number
    torch.testing.assert_close(net(x), twin(x))
    reference.randomise_parameters(net)
    want = net(x)
    folded = bnet_mm.fold(net)
    assert set(folded.kept) <= {'bn1'}  # after a deep stem, whose last convolution is in a sequence of its own
    torch.testing.assert_close(net(x), want)


# --- restore


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), SN2d, nn.SyncBatchNorm, CBN])
def test_restore_is_the_inverse(norm):
    net = small_net(norm)
    twin = copy.deepcopy(net)
    bnet_mm.enhance(net, k=3, where='all')
    report = bnet_mm.restore(net)
    assert len(report.changed) == 7 and 'BNET-3 -> ' in str(report)
    assert [type(m) for m in net.modules()] == [type(m) for m in twin.modules()]
    for (name, got), (other, want) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert name == other and torch.equal(got, want)
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x))
    assert norm is not CBN or net[3].bn2._convolution[0] is net[3].conv2


def test_restore_with_k_1_after_training_and_refusal():
    net = small_net()
    bnet_mm.enhance(net, k=1, where='all')
    reference.randomise(net)
    x = torch.randn(2, 3, 7, 9)
    want = net.eval()(x)
    twin = bnet_mm.restore(net, inplace=False).model
    assert len(bnet_names(net)) == 7 and not bnet_names(twin)
    torch.testing.assert_close(twin(x), want)
    with pytest.raises(ValueError, match='Sequential has no BNET'):
        bnet_mm.restore(twin)
    bnet_mm.enhance(twin, k=3)
    with torch.no_grad():
        twin[4].bn3.bnconv.weight[2, 0, 0, 1] = 1e-7
    with pytest.raises(ValueError, match='1 BNET layers have taps off the centre, no norm has: 4.bn3'):
        bnet_mm.restore(twin)
    assert bnet_names(twin) == {'3.bn3', '4.bn3'}


# --- convert_config


RETINANET = """
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
custom_imports = dict(imports=['colorsys'], allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=3))
"""


def convert(*arguments, cwd=REPO):
    env = dict(os.environ, PYTHONPATH=REPO, PYTHONWARNINGS='ignore')
    command = [sys.executable, f'{REPO}/tools/convert_config.py', *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_convert_config_and_its_checkpoint(tmp_path):
    """The new config inherits by a relative path, and its checkpoint computes what the BN checkpoint does."""
    import_host_models('mmdet')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'old.py').write_text(RETINANET)
    cfg = Config.fromfile(tmp_path / 'old.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        old = reference.randomise(MODELS.build(cfg.model)).eval()
    torch.save(dict(meta=dict(epoch=3), state_dict=old.state_dict()), tmp_path / 'bn.pth')
    arguments = ['old.py', '-o', 'sub/new.py', '--k', 5, '--where', 'AC', '--from-checkpoint', 'bn.pth']
    done = convert(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'enhanced 16 of 20 norms of RetinaNet' in done.stdout and 'wrote sub/new.py and sub/new.pth' in done.stdout
    assert sorted(os.listdir(tmp_path / 'sub')) == ['new.pth', 'new.py']
    text = (tmp_path / 'sub/new.py').read_text()
    assert text.count('\n') == 4 and "_base_ = '../old.py'" in text
    cfg = Config.fromfile(tmp_path / 'sub/new.py')
    assert cfg.custom_imports['imports'] == ['colorsys', 'bnet_mm'] and cfg.model.bbox_head.num_classes == 3
    with DefaultScope.overwrite_default_scope('mmdet'):
        new = MODELS.build(cfg.model).eval()
    assert type(new) is type(old) and len(bnet_names(new)) == 16 and new.backbone.layer1[0].bn1.bnconv.k == 5
    checkpoint = torch.load(tmp_path / 'sub/new.pth', weights_only=True)
    new.load_state_dict(checkpoint['state_dict'], strict=True)
    assert checkpoint['meta'] == dict(epoch=3, converted_from='bn.pth')
    x = torch.randn(1, 3, 64, 96)
    for got, want in zip(new(x, mode='tensor'), old(x, mode='tensor')):
        for one, two in zip(got, want):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())

    again = convert(*arguments, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.endswith('error: nothing was written: sub/new.py exists already\n')
    torch.save({k: v for k, v in old.state_dict().items() if k != 'backbone.conv1.weight'}, tmp_path / 'less.pth')
    less = convert('old.py', '-o', 'sub/less.py', '--from-checkpoint', 'less.pth', cwd=tmp_path)
    assert less.returncode == 1 and 'lacks 1 tensors of this model: backbone.conv1.weight' in less.stderr
    assert sorted(os.listdir(tmp_path / 'sub')) == ['new.pth', 'new.py']


@pytest.mark.parametrize('arguments, message', [
    (['nix.py', '-o', 'new.py'], 'config nix.py does not exist'),
    (['old.py', '-o', 'new.yaml'], 'a config file ends in .py'),
    (['old.py', '-o', 'nix/new.py'], 'the folder of nix/new.py does not exist'),
    (['empty.py', '-o', 'new.py'], 'config empty.py has no model with a type'),
    (['bnet.py', '-o', 'new.py'], 'has BNET already'),
    (['old.py', '-o', 'new.py', '--k', '4'], 'k must be a positive odd integer, got 4'),
    (['old.py', '-o', 'new.py', '--where', 'nowhere'], "no norm to replace at where='nowhere' in RetinaNet"),
    (['old.py', '-o', 'new.py', '--from-checkpoint', 'nix.pth'], 'nix.pth'),
    (['mmdet::nix.py', '-o', 'new.py'], 'config mmdet::nix.py cannot be inherited from'),
], ids=lambda value: value if isinstance(value, str) else None)  # fmt: skip
def test_convert_config_refuses_before_writing(tmp_path, monkeypatch, arguments, message):
    """In one process: what a user sees is the same sentence."""
    import_host_models('mmdet')
    sys.path.insert(0, f'{REPO}/tools')
    try:
        import convert_config
    finally:
        sys.path.remove(f'{REPO}/tools')
    (tmp_path / 'old.py').write_text(RETINANET)
    (tmp_path / 'empty.py').write_text('a = 1\n')
    (tmp_path / 'bnet.py').write_text("model = dict(type='WithBNET', base='RetinaNet', bnet=dict(k=3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['convert_config.py', *arguments])
    with pytest.raises(convert_config.UserError, match=re.escape(message)):
        convert_config.main()
    assert sorted(os.listdir(tmp_path)) == ['bnet.py', 'empty.py', 'old.py']
