"""FReLU in residual blocks: which one runs depends on nothing but the place of the call."""

import copy
import importlib
import io
import pickle
import sys
import threading

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from bnet_mm import BNET, FReLU, enhance, fold
from bnet_mm.surgery.activations import use_frelu

SCOPES = ['mmdet', 'mmseg', 'mmpretrain']


def build(scope, depth=50, **options):
    pytest.importorskip(scope)
    importlib.import_module('bnet_mm.host.compat')
    importlib.import_module(f'{scope}.models')
    cfg = dict(type='WithBNET', base='ResNet', depth=depth, bnet=dict(k=3), frelu=True, **options)
    if scope != 'mmpretrain':
        cfg.update(base_channels=8, stem_channels=8)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
    torch.manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if 'var' in name else nn.init.normal_(value, std=0.3)
    model.eval()
    return model


def by_hand(block, x):
    """The block's output, written out."""
    *inner, last = block.relu
    out = x
    for i, activation in enumerate(inner, 1):
        out = activation(getattr(block, f'norm{i}')(getattr(block, f'conv{i}')(out)))
    i = len(inner) + 1
    out = getattr(block, f'norm{i}')(getattr(block, f'conv{i}')(out))
    return last(out + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('depth', [18, 50])
def test_each_activation_in_its_place(scope, depth):
    model = build(scope, depth)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            assert len(block.relu) == (2 if depth == 18 else 3)
            x = torch.randn(2, block.conv1.in_channels, 6, 5)
            torch.testing.assert_close(block(x), by_hand(block, x))
            twin, copied = pickle.loads(pickle.dumps(block)), copy.deepcopy(block)
            nn.init.zeros_(block.relu[0].conv.weight)
            changed = block(x)
            assert type(twin) is type(block) and isinstance(block, type(block).host_class)
            for other in (twin, copied):
                assert torch.equal(other(x), by_hand(other, x)) and not torch.equal(other(x), changed)
    assert all(isinstance(block.relu, nn.ReLU) for block in model.layer4)
    keys = [key for key in model.state_dict() if '.relu.' in key]
    assert 'layer1.0.relu.0.conv.weight' in keys and 'layer3.1.relu.1.bn.running_var' in keys


def test_threads():
    """Four threads, 80 calls: each output is that of its own input."""
    model = build('mmdet')
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        wanted = [model(x)[-1] for x in images]
    outputs = [[] for _ in images]
    start = threading.Barrier(len(images))

    def run(i):
        start.wait()
        with torch.no_grad():
            outputs[i] += [model(images[i])[-1] for _ in range(20)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(images))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    wrong = sum(not torch.allclose(y, want, atol=1e-4) for want, ys in zip(wanted, outputs) for y in ys)
    assert [len(ys) for ys in outputs] == [20] * 4 and not wrong, f'{wrong} of 80 outputs are wrong'


def test_an_exception_half_way_and_a_call_within_a_call():
    block = build('mmdet').layer1[1]
    x = torch.randn(2, block.conv1.in_channels, 6, 5)
    want = by_hand(block, x)
    handle = block.conv2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block(x)
    handle.remove()
    torch.testing.assert_close(block(x), want)
    seen = []

    def once_more(module, inputs):
        if not seen:
            seen.append(None)
            seen[0] = block(x)

    block.conv3.register_forward_pre_hook(once_more)
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize('scope', SCOPES)
def test_activation_checkpointing(scope):
    """with_cp runs most of a block a second time in the backward pass."""
    plain, model = build(scope), build(scope, with_cp=True)
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for network in (plain, model):
        x = images.clone().requires_grad_()
        network(x)[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        gradients[-1]['input'] = x.grad
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_torch_compile_and_export():
    block = build('mmdet').layer1[1]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    compiled = torch.compile(block, backend='eager', fullgraph=True)
    with torch.no_grad():
        want = block(x)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(torch.jit.trace(block, x)(x), want)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), want)


def test_plugins_and_drop_path():
    block_plugins = [dict(cfg=dict(type='ContextBlock', ratio=1.0 / 4), stages=(True,) * 4, position='after_conv2')]
    model = build('mmdet', plugins=block_plugins)
    block, x = model.layer1[1], torch.randn(2, 32, 6, 5)
    y = block.relu[0](block.norm1(block.conv1(x)))
    y = block.forward_plugin(block.relu[1](block.norm2(block.conv2(y))), block.after_conv2_plugin_names)
    torch.testing.assert_close(block(x), block.relu[2](block.norm3(block.conv3(y)) + x))
    dropped = build('mmpretrain', depth=18, drop_path_rate=0.9)
    block = dropped.layer3[1].train()
    block.drop_path.drop_prob = 1 - 1e-9  # never kept
    x = torch.randn(2, block.conv1.in_channels, 6, 5)
    torch.testing.assert_close(block(x), block.relu[1](x))


def test_with_enhance_fold_and_frozen_stages():
    model = build('mmdet', frozen_stages=1)
    assert isinstance(model.layer2[0].bn3, BNET)
    assert not any(p.requires_grad for p in model.layer1[0].relu.parameters())
    assert all(p.requires_grad for p in model.layer2[0].relu.parameters())
    enhance(model, k=3, where='B')
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        report = fold(model)
        for got, expected in zip(model(x), want):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not report.kept, str(report)
    buffer = io.BytesIO()
    torch.save(model, buffer)


@pytest.mark.parametrize('kind', ['Res2Net', 'ResNeSt', 'RegNet', 'ResNeXt'])
def test_other_networks_of_mmdet(kind):
    """What has ResNet's own blocks is taken; the others, whose blocks go another way, are refused as they were."""
    pytest.importorskip('mmdet')
    importlib.import_module('mmdet.models')
    options = dict(arch='regnetx_400mf') if kind == 'RegNet' else dict(depth=50)
    options |= dict(Res2Net=dict(scales=4), ResNeXt=dict(groups=2), ResNeSt=dict(radix=2)).get(kind, {})
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(dict(type=kind, **options))
    if kind in ('RegNet', 'ResNeXt'):
        use_frelu(model)
        assert len(model.layer1[0].relu) == 3
        model.eval()
        return model(torch.randn(1, 3, 32, 32))
    before = repr(model)
    with pytest.raises(ValueError, match=f'use_frelu: {kind} has blocks of mmdet.models.backbones.{kind.lower()}'):
        use_frelu(model)
    assert repr(model) == before


def test_refusals():
    pytest.importorskip('mmaction')
    importlib.import_module('bnet_mm.host.compat')
    importlib.import_module('mmaction.models')
    with DefaultScope.overwrite_default_scope('mmaction'):
        with pytest.raises(ValueError, match='use_frelu: ResNet has blocks of mmaction.models.backbones.resnet'):
            MODELS.build(dict(type='WithBNET', base='ResNet', depth=18, bnet=None, frelu=True))
    with pytest.raises(ValueError, match='use_frelu: Sequential has no stages layer1 to layer3'):
        use_frelu(nn.Sequential(FReLU(3)))
    model = build('mmdet', 18)
    with pytest.raises(ValueError, match='has blocks with FReLU in the place of ReLU'):
        use_frelu(model)


def test_torchvision():
    importlib.import_module('bnet_mm.host.compat')
    models = pytest.importorskip('torchvision.models')
    model = models.resnet18().eval()
    use_frelu(model)
    block, x = model.layer2[1], torch.randn(1, 128, 6, 5)
    want = block.relu[1](block.bn2(block.conv2(block.relu[0](block.bn1(block.conv1(x))))) + x)
    torch.testing.assert_close(block(x), want)
