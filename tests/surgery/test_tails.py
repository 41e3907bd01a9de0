"""Tails of residual blocks in one pass: equal to the host's own code, and the host's own code wherever that matters."""

import copy
import importlib
import io
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnet_mm
from bnet_mm import BNET, FReLU
from bnet_mm.surgery.activations import use_frelu
from bnet_mm.surgery.blocks import Block
from bnet_mm.surgery.tails import FusedTail, fuse_tails
from helpers import reference
from helpers.kernels import compiled
from helpers.nets import BLOCKS_50, bnet_names, build, small_net

SCOPES = ['mmdet', 'mmseg', 'mmpretrain', 'mmaction', 'torchvision']
ONE_PASS = 'norm, sum and ReLU of residual blocks in one pass'
pytestmark = compiled


class Sums(TorchDispatchMode):
    """Counts the sums of maps that ran as operators of torch, and those that ran in a kernel of ours."""

    def __init__(self):
        super().__init__()
        self.torchs, self.ours = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split('.')[0]
        self.torchs += name in ('add', 'add_') and isinstance(args[1], torch.Tensor) and args[1].dim() == 4
        if function.namespace == 'bnet_mm' and 'backward' not in name:
            schema = [argument.name for argument in function._schema.arguments]
            self.ours += 'residual' in schema and args[schema.index('residual')] is not None
        return function(*args, **kwargs or {})


def host(scope, depth=50, **options):
    """A small ResNet of a library, as the library builds it."""
    if scope == 'torchvision':
        importlib.import_module('bnet_mm.host.compat')
        models = pytest.importorskip('torchvision.models.resnet')
        block, layers = {18: (models.BasicBlock, [2] * 4), 50: (models.Bottleneck, [3, 4, 6, 3])}[depth]
        return models.ResNet(block, layers, num_classes=3)
    if scope in ('mmdet', 'mmseg'):
        options = dict(base_channels=8, stem_channels=8, norm_eval=False) | options
    if scope == 'mmaction':
        options = dict(pretrained=None, norm_eval=False) | options
    return build(scope, dict(type='ResNet', depth=depth, **options))


def enhanced(model, **options):
    """With random weights: the host's own code, and the same model with fused tails."""
    plain = bnet_mm.enhance(model, fuse=False, **options).model
    reference.randomise(plain)
    return plain, with_tails(plain)


def with_tails(plain):
    fused = copy.deepcopy(plain)
    fuse_tails(fused)
    return fused


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedTail)]


def outputs(model, x):
    found = model(x)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def learn(model, x):
    """Outputs, gradients of the image and of all parameters, and what the model remembers."""
    x = x.clone().requires_grad_()
    with Sums() as sums:
        ys = outputs(model, x)
    sum((y * y.detach().flip(0).cos()).mean() for y in ys).backward()
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [*(y.detach() for y in ys), *gradients, *model.state_dict().values()], sums


def assert_close(got, want, tolerance=1e-8):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1e-3, b.abs().max().item()))


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('depth', [18, 50])
def test_equals_the_hosts_code(scope, depth):
    """Outputs, every gradient, running statistics, in training, with frozen statistics, in evaluation; no sum left."""
    plain, fused = enhanced(host(scope, depth).double(), k=3)
    count = 8 if depth == 18 else 16
    assert len(blocks(fused)) == count and not blocks(plain)
    x = torch.randn(3, 3, 32, 40, dtype=torch.float64)
    for mode in ('training', 'norm_eval', 'evaluation'):
        for model in (plain, fused):
            model.train(mode != 'evaluation')
            if mode == 'norm_eval':
                [m.eval() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        (want, theirs), (got, ours) = learn(plain, x), learn(fused, x)
        assert_close(got, want)
        assert (theirs.torchs, theirs.ours, ours.torchs, ours.ours) == (count, 0, 0, count)


@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_rounding(k, channels_last, dtype):
    """No further from float64 than the host's code is; blocks that start a stage and that do not."""
    plain, _ = enhanced(host('torchvision', 50), k=k)
    for name in ('layer1.0', 'layer3.0', 'layer3.1'):
        block = plain.get_submodule(name)
        x = torch.randn(2, block.conv1.in_channels, 12, 14) + 0.5
        exact = copy.deepcopy(block).double()(x.double())
        x = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        block = block.to(dtype)
        fused = copy.deepcopy(block)
        fused.__class__ = type(with_tails(plain).get_submodule(name))
        with Sums() as sums:
            got = fused(x)
        assert sums.ours == 1
        theirs = block(x)
        assert got.dtype == theirs.dtype and got.stride() == theirs.stride()
        our, their = ((y.double() - exact).square().mean().sqrt() for y in (got, theirs))
        assert our <= 1.1 * their, (name, our, their)


@pytest.mark.parametrize('k', [1, 3])
def test_nothing_more_is_kept_for_the_backward_pass(k):
    """Storages that autograd keeps in a training step: at most the bytes of the model with BN."""
    model, x, kept = host('torchvision', 50), torch.randn(2, 3, 64, 64), []

    def keep(tensor):
        kept[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for enhance in (False, True):
        if enhance:
            bnet_mm.enhance(model, k=k)
        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model(x)
        kept[-1] = sum(kept[-1].values()) - sum(parameter.nbytes for parameter in model.parameters())
        del y
    plain, fused = kept
    assert 1e7 < fused <= 1.001 * plain


@pytest.mark.parametrize('where, k', [('C', 1), ('AC', 3), ('all', 1)])
def test_other_positions(where, k):
    plain, fused = enhanced(host('mmdet', 50).double(), where=where, k=k)
    x = torch.randn(3, 3, 32, 40).double()
    (want, _), (got, sums) = (learn(model, x) for model in (plain, fused))
    assert_close(got, want)
    assert sums.ours == 16


def test_nothing_that_hosts_and_tools_see_changes():
    model = host('mmdet', 50, frozen_stages=1)
    twin = copy.deepcopy(model)
    report = bnet_mm.enhance(model, k=3)
    bnet_mm.enhance(twin, k=3, fuse=False)
    assert list(report.tails) == BLOCKS_50 and not any(report.tails.values()) and f'{ONE_PASS} (16)' in str(report)
    assert repr(model) == repr(twin) and list(model.state_dict()) == list(twin.state_dict())
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in twin.modules()]
    for one, two in zip(model.modules(), twin.modules()):
        assert isinstance(one, type(two)) and one.training == two.training
    for one, two in zip(model.parameters(), twin.parameters()):
        assert one.requires_grad == two.requires_grad


def test_copies_and_pickles():
    _, model = enhanced(host('mmaction', 18), k=3)
    model.eval()
    x = torch.randn(1, 3, 48, 48)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (1, 2, pickle.HIGHEST_PROTOCOL)]
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), *pickled):
        assert len(blocks(twin)) == 8 and type(twin.layer1[0]) is type(model.layer1[0])
        with Sums() as sums:
            assert torch.equal(outputs(twin, x)[0], outputs(model, x)[0])
        assert sums.ours == 16 and not sums.torchs


@pytest.mark.parametrize('scope', ['mmdet', 'torchvision'])
def test_restore(scope):
    model = host(scope, 18)
    twin = copy.deepcopy(model)
    bnet_mm.enhance(model, k=3)
    bnet_mm.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert not any(isinstance(m, Block) for m in pickle.loads(pickle.dumps(model)).modules())


def run(block, x):
    with Sums() as sums:
        y = block(x)
    return y, sums


def changed_activation(block):
    block.relu = nn.LeakyReLU(0.3)


def hooked(name, kind='register_forward_hook'):
    def change(block):
        seen = []
        getattr(block.get_submodule(name), kind)(lambda module, *arguments: seen.append(arguments[-1]))
        block.seen = seen

    return change


def replaced_norm(block):
    block.bn2 = reference.randomise(nn.BatchNorm2d(block.bn2.num_features))


def own_forward(block):
    relu = block.relu
    relu.forward = lambda x: -torch.relu(x)


CHANGES = {
    'activation': changed_activation, 'norm': replaced_norm, 'forward of the activation': own_forward,
    'hook of the norm': hooked('bn2'), 'pre-hook of the norm': hooked('bn2', 'register_forward_pre_hook'),
    'hook of the activation': hooked('relu'),
}  # fmt: skip


@pytest.mark.parametrize('name', CHANGES)
def test_the_hosts_code_runs_where_something_is_changed_later(name):
    plain, fused = (model.layer1[1].eval() for model in enhanced(host('torchvision', 18), k=3))
    x = torch.randn(2, 64, 9, 8)
    assert run(fused, x)[1].ours == 1
    fused.load_state_dict(plain.state_dict())
    torch.manual_seed(1), CHANGES[name](plain)
    torch.manual_seed(1), CHANGES[name](fused)
    (want, _), (got, sums) = run(plain, x), run(fused, x)
    assert torch.equal(got, want) and (sums.torchs, sums.ours) == (1, 0)
    got.sum().backward(), want.sum().backward()
    seen = [getattr(block, 'seen', []) for block in (plain, fused)]
    assert len(seen[0]) == len(seen[1]) > 0 or 'hook' not in name
    flat = [[t for s in one for t in (s if isinstance(s, tuple) else (s,))] for one in seen]
    torch.testing.assert_close(flat[1], flat[0])


def test_global_hooks():
    _, fused = enhanced(host('torchvision', 18), k=3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    try:
        _, sums = run(fused.layer1[1], torch.randn(2, 64, 9, 8))
    finally:
        handle.remove()
    assert (sums.ours, seen.count(nn.ReLU), seen.count(BNET)) == (0, 2, 1)


@compiled
def test_hooks_of_what_the_norm_holds_and_of_the_rest():
    """Hooks of the block, its convolutions, the shortcut and the parts of BNET see what they see in the host's code."""
    plain, fused = (model.layer2[0].eval() for model in enhanced(host('torchvision', 50), k=3))
    x = torch.randn(2, 256, 9, 8)
    seen = []
    for block in (plain, fused):
        seen.append([])
        for name in ('', 'conv1', 'bn1', 'conv3', 'downsample', 'downsample.0', 'bn3.norm', 'bn3.bnconv'):
            block.get_submodule(name).register_forward_hook(lambda m, i, y, to=seen[-1]: to.append(y.clone()))
        block(x)
    assert len(seen[0]) == 8
    for one in seen[0]:
        assert any(one.shape == two.shape and torch.allclose(one, two, atol=1e-5) for two in seen[1])


def test_plugins_and_drop_path():
    def plugin(position):
        return [dict(cfg=dict(type='ContextBlock', ratio=1 / 4), stages=(True,) * 4, position=position)]

    for position, count in (('after_conv2', 1), ('after_conv3', 0)):
        plain, fused = enhanced(host('mmdet', 50, plugins=plugin(position)), k=3)
        x = torch.randn(2, 32, 9, 8)
        (want, _), (got, sums) = (run(model.layer1[1].eval(), x) for model in (plain, fused))
        torch.testing.assert_close(got, want)
        assert sums.ours == count
    report = bnet_mm.enhance(host('mmdet', 50, plugins=plugin('after_conv3')), k=3)
    assert set(report.tails.values()) == {'a plugin follows the last norm'}

    model = host('mmpretrain', 18, drop_path_rate=0.5)
    report = bnet_mm.enhance(model, k=3)
    assert {reason for reason in report.tails.values() if reason} == {'DropPath follows the last norm'}
    block, x = model.layer4[1], torch.randn(64, 512, 3, 2)
    y = block(x)
    dropped = (y - x.relu()).flatten(1).abs().amax(1) == 0
    assert 10 < dropped.sum() < 54
    _, sums = run(block.eval(), x)
    assert sums.ours == 1
    block.drop_path.register_forward_hook(lambda module, inputs, y: y + 1)
    assert run(block, x)[1].ours == 0


def test_conv_modules_that_do_more():
    """mmaction's blocks: only where the last ConvModule is convolution and norm."""
    plain, fused = (model.layer1[1].eval() for model in enhanced(host('mmaction', 50), k=3))
    x = torch.randn(2, 256, 9, 8)
    assert run(fused, x)[1].ours == 1
    calls = []
    handle = fused.conv3.register_forward_hook(lambda module, inputs, y: calls.append(y))
    (want, _), (got, sums) = run(plain, x), run(fused, x)
    assert torch.equal(got, want) and sums.ours == 0 and len(calls) == 1
    handle.remove()
    for block in (plain, fused):
        block.conv3.with_activation, block.conv3.activate = True, nn.Tanh()
    (want, _), (got, sums) = run(plain, x), run(fused, x)
    assert torch.equal(got, want) and sums.ours == 0


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain', 'mmaction'])
def test_activation_checkpointing(scope):
    """with_cp: what the host's code computes, in one pass both times."""
    plain = host(scope, 50, with_cp=True).double()
    plain, fused = enhanced(plain, k=3)
    x = torch.randn(2, 3, 32, 32).double()
    (want, _), (got, sums) = learn(plain, x), learn(fused, x)
    assert_close(got, want)
    assert sums.ours == 16 and not sums.torchs


def test_exceptions_and_calls_within_calls():
    _, model = enhanced(host('mmdet', 50), k=3)
    block = model.layer1[1].eval()
    x = torch.randn(2, 32, 6, 5)
    want = block(x)
    handle = block.conv2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block(x)
    handle.remove()
    assert torch.equal(block(x), want)
    with pytest.raises(ValueError, match='BNET: input must have num_features'):
        block.bn3(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), relu=True)
    seen = []

    def once_more(module, inputs):
        if not seen:
            seen.append(None)
            seen.append(block(x))

    block.conv3.register_forward_pre_hook(once_more)
    assert torch.equal(block(x), want) and torch.equal(seen[1], want)


def test_threads():
    _, model = enhanced(host('mmdet', 18), k=3)
    model.eval()
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        want = [model(x)[-1] for x in images]
    got = [[] for _ in images]

    def work(i):
        with torch.no_grad():
            got[i] += [model(images[i])[-1] for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(len(ys) == 10 and all(torch.equal(y, w) for y in ys) for ys, w in zip(got, want))


@pytest.mark.parametrize('scope', SCOPES)
def test_folded(scope):
    """The depthwise convolution that is left takes the tail; a report of fold is the same."""
    plain, fused = enhanced(host(scope, 50).double(), k=3)
    plain.eval(), fused.eval()
    x = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        want = outputs(plain, x)
        reports = [bnet_mm.fold(model) for model in (plain, fused)]
        with Sums() as sums:
            got = outputs(fused, x)
    assert reports[0].changed == reports[1].changed and not reports[1].kept
    assert_close(got, want)
    assert (sums.torchs, sums.ours) == (0, 16)
    _, fused = enhanced(host(scope, 18), k=1)
    fused.eval()
    assert {block.why_not_fused() for block in blocks(bnet_mm.fold(fused).model)} == {'the last norm is Identity'}


def test_graphs_are_the_hosts():
    """Traced, exported and symbolic graphs are those of the host's code."""
    plain, fused = (model.layer2[0].eval() for model in enhanced(host('torchvision', 50), k=3))
    x = torch.randn(1, 256, 8, 8)
    want = plain(x)
    one, two = (torch.fx.symbolic_trace(block).code for block in (fused, plain))
    assert one.replace('_Tensor_', 'torch.Tensor') == two
    assert [n.kind() for n in torch.jit.trace(fused, x).graph.nodes()] == [
        n.kind() for n in torch.jit.trace(plain, x).graph.nodes()
    ]
    one, two = (torch.export.export(block, (x,)).graph for block in (fused, plain))
    assert [str(node.target) for node in one.nodes] == [str(node.target) for node in two.nodes]
    torch.testing.assert_close(torch.jit.trace(fused, x)(x), want)
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), want)


@pytest.mark.parametrize('training', [False, True])
def test_torch_compile(training):
    plain, fused = (model.layer2[0].train(training) for model in enhanced(host('torchvision', 50), k=3))
    x = torch.randn(2, 256, 8, 8)
    graph = torch.compile(fused, backend='aot_eager', fullgraph=True)
    for size in (8, 10):
        x = torch.randn(2, 256, size, size)
        torch.testing.assert_close(graph(x), plain(x), rtol=1e-4, atol=1e-4)


TRIDENT = dict(strides=(1, 2, 2), dilations=(1, 1, 1), trident_dilations=(1, 2, 3), num_stages=3, out_indices=(2,))


def test_distributed_wrappers():
    """DDP, FSDP of a block, and FSDP of its last norm, whose class is then another; one process of each."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('fully_shard: since torch 2.6')

    def sharded(name):
        def wrap(model):
            fsdp.fully_shard(model.get_submodule(name), mesh=dist.device_mesh.init_device_mesh('cpu', (1,)))
            assert isinstance(model.layer1[0], FusedTail)
            return model

        return wrap

    plain, fused = enhanced(host('torchvision', 18), k=3)
    x = torch.randn(2, 3, 32, 32)
    want, _ = learn(plain, x)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrappers = [(nn.parallel.DistributedDataParallel, 8), (sharded('layer1.0'), 8), (sharded('layer1.0.bn2'), 7)]
        for wrap, count in wrappers:
            got, sums = learn(wrap(copy.deepcopy(fused)), x)
            assert sums.ours == count
            torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()


UNKNOWN = [
    ('mmdet', dict(type='Res2Net', depth=50, scales=4)),
    ('mmpretrain', dict(type='SEResNet', depth=50)),
    ('mmdet', dict(type='ResNeSt', depth=50)),
    ('mmdet', dict(type='TridentResNet', depth=50, num_branch=3, test_branch_idx=1, **TRIDENT)),
]
KNOWN = [
    ('mmdet', dict(type='ResNeXt', depth=50, groups=2), 16), ('mmdet', dict(type='RegNet', arch='regnetx_400mf'), 22),
    ('mmseg', dict(type='ResNeXt', depth=50, groups=2), 16), ('mmpretrain', dict(type='ResNeXt', depth=50), 16),
    ('mmseg', dict(type='ResNetV1c', depth=18), 8), ('mmaction', dict(type='ResNetTSM', depth=50), 16),
    ('mmpretrain', dict(type='ResNet_CIFAR', depth=18), 8),
]  # fmt: skip


@pytest.mark.parametrize('scope, cfg', UNKNOWN)
def test_blocks_with_another_forward_keep_it(scope, cfg):
    model = build(scope, cfg)
    kinds = {name: type(block) for name, block in model.named_modules()}
    report = bnet_mm.enhance(model, k=3)
    last = [name for name in report.tails if name.startswith(model.res_layers[-1])]
    assert last and 'one after the other' in str(report)
    for name in last:
        assert type(model.get_submodule(name)) is kinds[name]
        assert report.tails[name] == f'the forward of {kinds[name].__name__} is none of those that are known'


@pytest.mark.parametrize(
    'scope, cfg, count', KNOWN, ids=lambda value: value['type'] if isinstance(value, dict) else str(value)
)
def test_networks_of_the_known_blocks(scope, cfg, count):
    model = build(scope, cfg)
    report = bnet_mm.enhance(model, k=3)
    assert sum(not why for why in report.tails.values()) >= count - 1 and len(blocks(model)) >= count


def test_with_bnet_and_frelu():
    cfg = dict(type='WithBNET', base='ResNet', depth=50)
    assert len(blocks(build('mmdet', cfg | dict(bnet=dict(k=3))))) == 16
    assert not blocks(build('mmdet', cfg | dict(bnet=dict(k=3, fuse=False))))
    with pytest.raises(ValueError, match="fuse must be True or False, got 'no'"):
        build('mmdet', cfg | dict(bnet=dict(k=3, fuse='no')))
    model = build('mmdet', cfg | dict(bnet=dict(k=3), frelu=True))
    assert [type(block.relu[0]) for block in model.layer1] == [FReLU] * 3
    assert len(blocks(model)) == 3  # stage 4, which has no FReLU
    later = build('mmdet', cfg | dict(bnet=dict(k=3)))
    use_frelu(later)
    later.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    later.eval(), model.eval()
    torch.testing.assert_close(later(x), model(x))


def test_unknown_models_and_copies():
    net = small_net()
    report = bnet_mm.enhance(net, k=3, inplace=False)
    assert set(report.tails) == {'3', '4'} and not blocks(report.model)
    assert not bnet_names(net)
    assert not bnet_mm.enhance(small_net(), k=3, where='B').tails
