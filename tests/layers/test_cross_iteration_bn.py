"""CBN against a reference that keeps past inputs and weights, finite differences, and the host's way of using it."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from bnet_mm import BNET, CBN
from bnet_mm.layers.cross_iteration_bn import PARTS
from helpers import reference
from helpers.hosts import import_host_models

DOUBLE = {'dtype': torch.float64}


def make(buffer_num=3, cin=3, cout=5, **options):
    """A convolution and a CBN after it, with an input that needs a gradient, as in a network."""
    net = nn.Sequential(nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False), CBN(cout, buffer_num=buffer_num))
    net[1].eps = options.pop('eps', 1e-5)
    return reference.randomise(net).double()


def iterations(cbn):
    """Length of the history."""
    return 0 if cbn._history is None else int(history(cbn)['valid'].sum())


def history(cbn):
    """Part -> (buffer_num, numbers), views of the history."""
    return cbn._unpack(cbn._history)


def step(net, size=1.0):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * size)


def batch(n=2, c=3, **options):
    return torch.randn(n, c, 8, 9, requires_grad=True, **DOUBLE, **options)


@pytest.mark.parametrize('buffer_num', [1, 3])
def test_equals_the_reference_over_iterations(buffer_num):
    """Outputs, gradients and running statistics over 20 steps of changing weights and batch sizes."""
    net = make(buffer_num)
    conv, cbn = net
    twin = reference.CrossIterationBN(stride=2, padding=1, buffer_num=buffer_num)
    mean, var = cbn.running_mean.clone(), cbn.running_var.clone()
    left_out = 0
    for i in range(20):
        x = batch(2 + i % 2) * (1 + 0.3 * i)
        got = net(x)
        x_hat, used = twin(x, conv.weight)
        want = x_hat * cbn.weight.reshape(1, -1, 1, 1) + cbn.bias.reshape(1, -1, 1, 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        weight = torch.randn_like(got)
        parameters = (conv.weight, cbn.weight, cbn.bias)
        for one, two in zip(*(torch.autograd.grad((y * weight).sum(), parameters) for y in (got, want))):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)
        y = conv(x).detach()
        mean = 0.9 * mean + 0.1 * y.mean((0, 2, 3))
        var = 0.9 * var + 0.1 * y.var((0, 2, 3))
        torch.testing.assert_close(cbn.running_mean, mean)
        torch.testing.assert_close(cbn.running_var, var)
        left_out += (~used).sum().item()
        step(net, size=8 if i == 12 else 1)  # once too far for the first order: compensated variances below zero
        assert iterations(cbn) == min(i + 1, buffer_num)
    assert left_out > 0


def test_slopes_are_the_finite_differences_of_the_statistics():
    net = make(buffer_num=2)
    conv, cbn = net
    x = batch()
    net(x)
    h = 1e-6
    for index in range(0, conv.weight.numel(), 7):
        values = []
        for sign in (1, -1):
            weight = conv.weight.detach().clone()
            weight.view(-1)[index] += sign * h
            y = nn.functional.conv2d(x.detach(), weight, stride=2, padding=1)
            values.append((y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)))
        row = index // conv.weight[0].numel()
        others = torch.arange(5) != row
        for k, name in enumerate(('mean_slope', 'var_slope')):
            difference = (values[0][k] - values[1][k]) / (2 * h)
            slope = history(cbn)[name][0, index]
            assert slope.item() == pytest.approx(difference[row].item(), rel=1e-6, abs=1e-9)
            assert difference[others].abs().max() < 1e-8  # other channels do not depend on this row


@pytest.mark.parametrize('kind', ['linear', 'conv'])
def test_compensated_mean_of_a_linear_layer_is_the_recomputed_mean(kind):
    """However far the weights move: the mean is linear in them, the mean square is not."""
    layer = nn.Linear(4, 5) if kind == 'linear' else nn.Conv2d(4, 5, 3, bias=False)
    net = reference.randomise(nn.Sequential(layer, CBN(5, buffer_num=4))).double()
    inputs = []
    for _ in range(4):
        shape = (6, 4) if kind == 'linear' else (2, 4, 6, 5)
        inputs.append(torch.randn(shape, requires_grad=True, **DOUBLE))
        net(inputs[-1])
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
    means, variances, _ = net[1]._join_past(torch.zeros(5, **DOUBLE), torch.zeros(5, **DOUBLE))
    squares = variances + means**2
    dims = 0 if kind == 'linear' else (0, 2, 3)
    recomputed = torch.stack([layer(x).mean(dims) for x in reversed(inputs)])
    recomputed_squares = torch.stack([layer(x).square().mean(dims) for x in reversed(inputs)])
    torch.testing.assert_close(means[1:], recomputed, rtol=1e-12, atol=1e-12)
    assert (squares[1:] - recomputed_squares).abs().max() > 0.1


def test_first_order_error_is_of_second_order():
    """The compensated mean square: a quarter of the error for half the step."""
    errors = []
    for size in (1e-2, 5e-3):
        torch.manual_seed(1)
        net, x = make(1), batch()
        net(x)
        with torch.no_grad():
            net[0].weight.add_(torch.randn_like(net[0].weight) * size)
        means, variances, _ = net[1]._join_past(torch.zeros(5, **DOUBLE), torch.zeros(5, **DOUBLE))
        errors.append((variances[1] + means[1] ** 2 - net[0](x).square().mean((0, 2, 3))).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-3)


def test_gradcheck():
    """With a filled history, through the input and all parameters; the history itself is a constant (paper, eq. 8)."""
    net = make(2, cin=2, cout=2)
    for _ in range(2):
        net(batch(c=2))
        step(net)
    names, parameters = zip(*net.named_parameters())
    assert names == ('0.weight', '1.weight', '1.bias')
    # A numerical step in the weight would also move the compensation of the past, which is not differentiated.
    history(net[1])['mean_slope'].zero_(), history(net[1])['var_slope'].zero_()
    x = torch.randn(2, 2, 4, 3, requires_grad=True, **DOUBLE)

    def function(x, *values):
        return torch.func.functional_call(copy.deepcopy(net), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_is_batch_norm_where_the_paper_says_so():
    """During burn-in, in evaluation, and for inputs that need no gradient; nothing is remembered there."""
    cbn, bn = CBN(4, burnin=2).double(), nn.BatchNorm2d(4).double()
    reference.randomise(bn)
    cbn.load_state_dict(bn.state_dict())  # a BN checkpoint has everything that is needed
    holder = nn.Sequential(nn.Conv2d(3, 4, 1).double(), cbn)

    def same(x):
        torch.testing.assert_close(cbn(x), bn(x))
        for name, value in bn.state_dict().items():
            torch.testing.assert_close(cbn.state_dict()[name], value)
        assert iterations(cbn) == 0

    for epoch in (0, 1.99):
        cbn.set_epoch(epoch)
        same(torch.randn(2, 4, 5, 5, requires_grad=True, **DOUBLE))
    cbn.set_epoch(2)
    same(torch.randn(2, 4, 5, 5, **DOUBLE))  # as from a frozen stage
    cbn.eval(), bn.eval()
    same(torch.randn(2, 4, 5, 5, requires_grad=True, **DOUBLE))
    with torch.no_grad():
        cbn.train(), bn.train()
        same(torch.randn(2, 4, 5, 5, requires_grad=True, **DOUBLE))
    holder(torch.randn(2, 3, 5, 5, **DOUBLE))
    assert iterations(cbn) == 1


def test_resumed_run_continues_identically(tmp_path):
    """State dict, pickle, deepcopy: the next steps are bit-equal; also into a layer that has another history."""
    net = make()
    for _ in range(5):
        net(batch())
        step(net)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    resumed = make()
    resumed(batch())
    resumed.load_state_dict(torch.load(tmp_path / 'net.pth', weights_only=True))
    twins = [resumed, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for _ in range(4):
        x = batch()
        want = net(x)
        seed = torch.random.get_rng_state()
        step(net)
        for twin in twins:
            assert torch.equal(twin(x), want)
            torch.random.set_rng_state(seed)
            step(twin)
            assert twin[1]._convolution[0] is twin[0]  # not the original's
    fresh = make()
    fresh(batch())
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith('_extra_state')})
    assert iterations(fresh[1]) == 0  # a BN checkpoint starts a new history


def test_gradient_accumulation():
    """Two half batches with the same weights: the second sees both, without compensation, and gradients add up."""
    net = make()
    first, second = batch(), batch()
    net(first).square().sum().backward()
    before = net[0].weight.grad.clone()
    got = net(second)
    assert torch.equal(net[0].weight.grad, before)  # the slopes are not left in the gradients
    y = [net[0](x) for x in (second, first)]
    mean = sum(v.mean((0, 2, 3)) for v in y) / 2
    var = sum(v.square().mean((0, 2, 3)) for v in y) / 2 - mean**2
    want = reference.bnet(y[0], net[1].weight.reshape(-1, 1, 1, 1), net[1].bias, mean, var)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    assert not torch.equal(net[0].weight.grad, before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Slopes in mixed precision stay near the float64 ones, on many values as well (float16 would underflow)."""
    if dtype == torch.float16 and torch.__version__ < '2.3':
        pytest.skip('this torch has no float16 convolution on CPU')
    net = make().float()
    exact = copy.deepcopy(net).double()
    x = torch.randn(4, 3, 160, 200)
    with torch.autocast('cpu', dtype=dtype):
        y = net(x.clone().requires_grad_())
        assert y.dtype == dtype
        y.float().square().sum().backward()
    exact(x.double().requires_grad_())
    for name in PARTS:
        got, want = history(net[1])[name], history(exact[1])[name]
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() <= 0.03 * want.norm(), name
    assert net[0].weight.grad.isfinite().all()


def test_frozen_convolution_and_channels_last():
    """A frozen weight needs no slopes; the layout changes nothing."""
    net = make()
    net[0].weight.requires_grad_(False)
    twin = reference.CrossIterationBN(2, 1, 3)
    net[1].eps = twin.eps
    for _ in range(3):
        x = batch()
        x_hat, _ = twin(x, net[0].weight)
        want = x_hat * net[1].weight.reshape(1, -1, 1, 1) + net[1].bias.reshape(1, -1, 1, 1)
        torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), want)


def test_enhanced_cbn():
    """BNET over CBN follows the convolution before BNET."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), BNET(5, k=3, norm='CBN'))
    reference.randomise(net).double()
    twin = reference.CrossIterationBN(2, 1, 3)
    for _ in range(4):
        x = batch()
        x_hat, _ = twin(x, net[0].weight)
        torch.testing.assert_close(net(x), reference.depthwise(x_hat, net[1].bnconv.weight, net[1].bias))
        step(net)
    enhanced = BNET.from_norm(make()[1], k=3)
    assert nn.Sequential(net[0], enhanced) and enhanced.norm._convolution[0] is net[0]


def test_moving_averages_of_the_model():
    """Buffers of one model are copied into another's whatever their shapes; the history is no buffer."""
    for options in (dict(use_buffers=True), dict(use_buffers=False)):
        net = make()
        average = torch.optim.swa_utils.AveragedModel(net, **options)
        for _ in range(3):
            net(batch())
            average.update_parameters(net)
        assert iterations(net[1]) == 3 and iterations(average.module[1]) == 0
    assert net.half()[1]._history.dtype == torch.float16


def test_shorter_history_and_partial_loads():
    """A resumed run may use fewer iterations; a load that does not touch the layer leaves its history alone."""
    long, short = make(5), make(2)
    for _ in range(5):
        long(batch())
    short.load_state_dict(long.state_dict())
    short(batch())
    assert iterations(short[1]) == 2
    short.load_state_dict({'0.weight': long[0].weight.detach()}, strict=False)
    assert iterations(short[1]) == 2
    short[1].buffer_num = 1
    short(batch())


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing_is_refused(reentrant):
    net = make()
    net(batch())
    with pytest.raises(RuntimeError, match='activation checkpointing .* runs it twice'):
        torch.utils.checkpoint.checkpoint(net, batch(), use_reentrant=reentrant).sum().backward()


def test_empty_batch_is_batch_norms():
    net = make()
    net(batch())
    assert net(batch(n=0)).shape[0] == 0 and iterations(net[1]) == 1


def test_large_means_do_not_cancel():
    """float32 at |mean| / std = 1000: as far from float64 as BatchNorm2d is, to a small factor."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), CBN(4))
    exact, bn = copy.deepcopy(net).double(), nn.BatchNorm2d(4)
    for _ in range(4):
        x = torch.randn(4, 3, 9, 9) + 1000
        got, want = net(x.requires_grad_()), exact(x.detach().double().requires_grad_())
    y = net[0](x)
    theirs = (bn(y).double() - copy.deepcopy(bn).double()(y.double())).abs().max()
    assert (got.double() - want).abs().max() <= 10 * theirs + 1e-3


def test_clear_errors():
    with pytest.raises(ValueError, match='buffer_num must be a number of past iterations'):
        CBN(4, buffer_num=-1)
    with pytest.raises(ValueError, match='burnin must be a number of epochs'):
        CBN(4, burnin='8')
    with pytest.raises(ValueError, match='CBN: num_features must be'):
        CBN(0)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match='no convolution is known before this layer'):
        CBN(4)(x)
    with pytest.raises(RuntimeError, match="custom_hooks=.dict.type='CBNBurnIn'"):
        CBN(4, burnin=8)(x)
    with pytest.raises(ValueError, match=r'weight \(4, ...\).*ConvTranspose2d'):
        CBN(4).follow(nn.ConvTranspose2d(4, 4, 2))
    with pytest.raises(RuntimeError, match='no convolution is known'):
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2), CBN(4))(x)
    astray = CBN(4)
    astray.follow(nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError, match='does not come from the convolution'):
        astray(x)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), CBN(4))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        net(torch.randn(1, 4, 3, 3, requires_grad=True))
    assert iterations(net[1]) == 0
    assert 'buffer_num=3, burnin=8' in repr(CBN(4, burnin=8))


NORM = dict(type='CBN', buffer_num=2)


def host_module(kind):
    if kind == 'FPN':
        cfg = dict(type='mmdet.FPN', in_channels=[4, 8], out_channels=6, num_outs=2, norm_cfg=NORM)
        return cfg, lambda m: [*m.lateral_convs, *m.fpn_convs]
    if kind == 'ConvFCBBoxHead':
        cfg = dict(
            type='mmdet.Shared4Conv1FCBBoxHead', in_channels=4, conv_out_channels=4, fc_out_channels=8, roi_feat_size=3,
            num_classes=2, norm_cfg=NORM,
        )  # fmt: skip
        return cfg, lambda m: m.shared_convs
    cfg = dict(type='mmdet.FCNMaskHead', num_convs=2, in_channels=4, conv_out_channels=4, num_classes=2, norm_cfg=NORM)
    return cfg, lambda m: m.convs


@pytest.mark.parametrize('kind', ['FPN', 'ConvFCBBoxHead', 'FCNMaskHead'])
def test_under_norm_cfg_alone_in_mmdet(kind):
    """Every CBN of the module knows its own convolution and trains; its statistics are those of the reference."""
    import_host_models('mmdet')
    cfg, convs = host_module(kind)
    module = MODELS.build(cfg).train()
    layers = [m for m in module.modules() if isinstance(m, CBN)]
    assert len(layers) == len(convs(module)) == {'FPN': 4, 'ConvFCBBoxHead': 4, 'FCNMaskHead': 2}[kind]
    for conv_module in convs(module):
        assert conv_module.norm._convolution[0] is conv_module.conv
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for i in range(3):
        sizes = [(4, 8, 8), (8, 4, 4)] if kind == 'FPN' else [(4, 3, 3)]
        x = [torch.randn(3, *size, requires_grad=True) for size in sizes]
        out = module(x if kind == 'FPN' else x[0])
        sum(y.square().mean() for y in (out if isinstance(out, tuple) else [out])).backward()
        optimizer.step(), optimizer.zero_grad()
        assert all(iterations(layer) == min(i + 1, 2) for layer in layers)


def test_config_line_reaches_the_layer():
    cfg = Config(dict(model=dict(type='ConvModule', in_channels=3, out_channels=4, kernel_size=1,
                                 norm_cfg=dict(type='CBN', buffer_num=3, burnin=8))))  # fmt: skip
    pytest.importorskip('mmcv.cnn')
    layer = MODELS.build(cfg.model).norm
    assert (layer.buffer_num, layer.burnin) == (3, 8)


@pytest.mark.parametrize('value', [None, 'text', [1.0]])
def test_a_history_that_is_no_tensor(value):
    layer = CBN(4)
    with pytest.raises(RuntimeError, match=f'the history in the checkpoint is a {type(value).__name__}, not a tensor'):
        layer.load_state_dict({**layer.state_dict(), '_extra_state': value})


def test_without_history_it_is_batch_norm_and_statistics_can_be_stopped_by_hand():
    """buffer_num=0 trains as BN; with track_running_stats set to False later, the statistics stay, as in BN."""
    cbn, bn = CBN(4, buffer_num=0).double(), nn.BatchNorm2d(4).double()
    reference.randomise(bn)
    cbn.load_state_dict(bn.state_dict())
    nn.Sequential(nn.Conv2d(3, 4, 1), cbn)
    x = torch.randn(2, 4, 5, 5, requires_grad=True, **DOUBLE)
    torch.testing.assert_close(cbn(x), bn(x))
    torch.testing.assert_close(cbn.running_mean, bn.running_mean)

    net = make()
    before = net[1].running_mean.clone()
    net[1].track_running_stats = False
    net(torch.randn(2, 3, 8, 8, **DOUBLE))
    assert iterations(net[1]) == 1 and torch.equal(net[1].running_mean, before)
