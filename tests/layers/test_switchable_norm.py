"""SN against the formula."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnet_mm import BNET, SN1d, SN2d, SN3d, SyncSN
from helpers import reference
from helpers.norms import DOUBLE, make

SN_CASES = [(SN2d, (3, 4, 5, 6)), (SN3d, (3, 4, 2, 3, 5)), (SyncSN, (2, 4, 5, 3))]


@pytest.mark.parametrize('using_bn', [True, False])
@pytest.mark.parametrize('kind, shape', SN_CASES)
def test_sn_equals_the_formula(kind, shape, using_bn):
    for training in (True, False):
        layer = make(kind(4, using_bn=using_bn, eps=1e-3), training)
        assert layer.mean_weight.shape == (3 if using_bn else 2,)
        x = torch.randn(shape, **DOUBLE) * 2 + 1
        running = None if training or not using_bn else (layer.bn.running_mean, layer.bn.running_var)
        x_hat, _ = reference.switchable_norm(x, layer.mean_weight, layer.var_weight, running, 1e-3)
        affine = [1, 4] + [1] * (x.dim() - 2)
        want = x_hat * layer.weight.reshape(affine) + layer.bias.reshape(affine)
        torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)


def test_sn_with_one_weight_is_the_norm_it_chooses():
    """The mixtures at their corners are torch's LN and BN, up to IN's unbiased variance."""
    x = torch.randn(4, 6, 8, 9, **DOUBLE)
    pixels = 8 * 9
    layer = SN2d(6, eps=0).double()
    for chosen, correction, want in [
        (0, (pixels - 1) / pixels, nn.InstanceNorm2d(6, eps=0)(x)),
        (1, None, None), (2, None, None),
    ]:  # fmt: skip
        for weight in (layer.mean_weight, layer.var_weight):
            nn.init.constant_(weight, -200)
            weight.data[chosen] = 200
        got = layer(x)
        if chosen == 0:
            torch.testing.assert_close(got / correction**0.5, want)
            continue
        dims = (1, 2, 3) if chosen == 1 else (0, 2, 3)
        mean = x.mean(dims, keepdim=True)
        # mean over instances and channels of unbiased variances, plus the variance of their means
        part = x.var((2, 3), correction=1).mean(1 if chosen == 1 else 0)
        part = part + x.mean((2, 3)).var(1 if chosen == 1 else 0, correction=0)
        torch.testing.assert_close(got, (x - mean) / part.reshape(mean.shape).sqrt())


@pytest.mark.parametrize('using_bn', [True, False])
def test_sn1d_equals_the_formula(using_bn):
    """Layer and batch statistics of (N, C), both unbiased."""
    for training in (True, False):
        layer = make(SN1d(5, using_bn=using_bn), training)
        x = torch.randn(7, 5, **DOUBLE) * 2 + 1
        share_mean, share_var = (torch.softmax(w, 0) for w in (layer.mean_weight, layer.var_weight))
        mean = share_mean[0] * (x.sum(1, keepdim=True) / 5)
        var = share_var[0] * ((x - x.sum(1, keepdim=True) / 5) ** 2).sum(1, keepdim=True) / 4
        if using_bn:
            batch_mean = x.sum(0) / 7 if training else layer.bn.running_mean
            batch_var = ((x - x.sum(0) / 7) ** 2).sum(0) / 6 if training else layer.bn.running_var
            mean, var = mean + share_mean[1] * batch_mean, var + share_var[1] * batch_var
        want = (x - mean) / (var + 1e-5) ** 0.5 * layer.weight + layer.bias
        torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind, shape', [(SN1d, (4, 3)), (SN2d, (2, 3, 3, 2)), (SN3d, (2, 2, 2, 2, 2))])
def test_sn_gradcheck(kind, shape, training):
    layer = make(kind(shape[1]), training)
    names, parameters = zip(*layer.named_parameters())
    assert set(names) == {'weight', 'bias', 'mean_weight', 'var_weight'}
    x = torch.randn(shape, requires_grad=True, **DOUBLE)

    def function(x, *values):
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize('moving', [True, False])
def test_sn_running_statistics(moving):
    """Twenty random steps. Our momentum 0.1 is the official 0.9; the batch average is the plain one at every step."""
    layer = make(SN2d(4, momentum=0.1, using_moving_average=moving))
    kept = 0.9
    mean, var, means, squares = layer.bn.running_mean.clone(), layer.bn.running_var.clone(), [], []
    for step in range(20):
        x = torch.randn(2 + step % 3, 4, 3, 5, **DOUBLE) * (1 + step) + step
        layer(x)
        _, (batch_mean, batch_var) = reference.switchable_norm(x, layer.mean_weight, layer.var_weight)
        means.append(batch_mean), squares.append(batch_var + batch_mean**2)
        mean, var = kept * mean + (1 - kept) * batch_mean, kept * var + (1 - kept) * batch_var
        if not moving:
            mean = sum(means) / len(means)
            var = sum(squares) / len(squares) - mean**2
        torch.testing.assert_close(layer.bn.running_mean, mean)
        torch.testing.assert_close(layer.bn.running_var, var)
    assert layer.bn.num_batches_tracked == 20
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_sn_warns_of_the_official_momentum():
    with pytest.warns(UserWarning, match='momentum=0.9 is the weight of the new batch.*0.1'):
        SN2d(4, momentum=0.9)


def test_sn_running_mean_follows_batch_norms_rule():
    """The sentence on momentum, pinned: the running mean is BatchNorm2d's with the same momentum."""
    layer, bn = SN2d(3, momentum=0.3), nn.BatchNorm2d(3, momentum=0.3)
    for step in range(5):
        x = torch.randn(4, 3, 6, 6) + step
        layer(x), bn(x)
        torch.testing.assert_close(layer.bn.running_mean, bn.running_mean)


@pytest.mark.parametrize('using_bn', [True, False])
def test_sn_loads_the_official_layout(using_bn):
    """weight, bias (1, C, 1, 1), running statistics (1, C, 1), no counter; alone, and into BNET over SN."""
    official = dict(
        weight=torch.randn(1, 6, 1, 1), bias=torch.randn(1, 6, 1, 1), mean_weight=torch.randn(2 + using_bn),
        var_weight=torch.randn(2 + using_bn),
    )  # fmt: skip
    if using_bn:
        official.update(running_mean=torch.randn(1, 6, 1), running_var=torch.rand(1, 6, 1) + 0.5)
    x = torch.randn(2, 6, 5, 4)
    running = (official['running_mean'].flatten(), official['running_var'].flatten()) if using_bn else None
    x_hat, _ = reference.switchable_norm(x, official['mean_weight'], official['var_weight'], running)
    want = x_hat * official['weight'] + official['bias']
    norm = dict(type='SN', using_bn=using_bn)
    for layer in (SN2d(6, using_bn=using_bn), BNET(6, k=3, norm=norm)):
        net = nn.ModuleDict(dict(sn1=layer))
        net.load_state_dict({f'sn1.{name}': value for name, value in official.items()}, strict=True)
        torch.testing.assert_close(layer.eval()(x), want, rtol=1e-4, atol=1e-5)


def test_sn_round_trips_and_repr():
    layer = make(SN2d(4, using_moving_average=False), training=False)
    x = torch.randn(2, 4, 5, 5, **DOUBLE)
    fresh = SN2d(4, using_moving_average=False).double().eval()
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin(x), layer(x))
    assert '4, eps=1e-05, momentum=0.1, mixes=IN+LN+BN, using_moving_average=False' in repr(layer)
    assert 'mixes=IN+LN, last_gamma=True' in repr(SyncSN(4, using_bn=False, last_gamma=True))
    assert SN2d(4, last_gamma=True).weight.abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 6), w=st.integers(1, 7), last=st.booleans())
def test_sn_any_shape(n, c, h, w, last):
    layer = make(SN2d(c), training=n > 1)
    x = (torch.randn(n, c, h + 1, w + 2, **DOUBLE) + 1)[:, :, 1:, 1:-1]
    if h * w == 1:  # the reference's unbiased variance does not exist; ours is 0
        assert layer(x).isfinite().all()
        return
    running = None if layer.training else (layer.bn.running_mean, layer.bn.running_var)
    x_hat, _ = reference.switchable_norm(x, layer.mean_weight, layer.var_weight, running)
    want = x_hat * layer.weight.reshape(1, -1, 1, 1) + layer.bias.reshape(1, -1, 1, 1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), want, rtol=1e-8, atol=1e-8)


def test_sn_low_precision():
    """bfloat16 activations: error at most 4 x that of torch's GroupNorm, in training and evaluation."""
    for training in (True, False):
        layer = make(SN2d(8), training)
        torch_norm = nn.GroupNorm(4, 8)
        torch_norm.load_state_dict(dict(weight=layer.weight, bias=layer.bias))
        low = (torch.randn(3, 8, 11, 13) * 2 + 1).bfloat16()
        want, their_want = copy.deepcopy(layer)(low.double()), copy.deepcopy(torch_norm).double()(low.double())
        got, theirs = layer.float()(low), torch_norm.bfloat16()(low)
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() <= 4 * (theirs.double() - their_want).abs().max()


def test_sn_empty_batches_and_single_samples():
    for kind, shape in [(SN2d, (0, 4, 3, 3)), (SN1d, (0, 4)), (SN3d, (0, 4, 2, 2, 2)), (SyncSN, (0, 4, 3, 3))]:
        layer = kind(4)
        before = copy.deepcopy(layer.state_dict())
        assert layer(torch.randn(shape)).shape == shape
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    with pytest.raises(ValueError, match='SN1d: input must have more than one sample in training mode'):
        SN1d(4)(torch.randn(1, 4))
    layer = SN2d(4)
    layer(torch.randn(2, 4, 3, 3))
    layer.load_state_dict({'weight': torch.ones(4)}, strict=False)
    assert layer.bn.num_batches_tracked == 1


@pytest.mark.parametrize('options', [{}, dict(using_moving_average=False)])
def test_sn_does_not_wait_for_its_statistics(options):
    """On the meta device, where no value can be read: so nothing has to come back from a GPU."""
    for kind, shape in [(SN2d, (2, 4, 3, 3)), (SN1d, (2, 4)), (SN3d, (2, 4, 2, 2, 2)), (SyncSN, (2, 4, 3, 3))]:
        assert kind(4, device='meta', **options)(torch.empty(shape, device='meta')).shape == shape


def test_sn_an_empty_batch_later_changes_nothing():
    for options in ({}, dict(using_moving_average=False)):
        layer = SN2d(4, **options)
        for size in (2, 0, 3):
            before = copy.deepcopy(layer.state_dict())
            layer(torch.randn(size, 4, 3, 3) * 2 + 1)
            same = [torch.equal(before[name], layer.state_dict()[name]) for name in before if 'weight' not in name]
            assert same == [True, size == 0, size == 0, size == 0]  # bias, mean, variance, counter
        assert layer.bn.num_batches_tracked == 2 and all(
            value.isfinite().all() for value in layer.state_dict().values()
        )


def test_sn_large_means_do_not_cancel():
    """float32 at |mean| / std = 1000: as near to float64 as BatchNorm2d is, to a small factor."""
    layer, bn = SN2d(4), nn.BatchNorm2d(4)
    x = torch.randn(4, 4, 16, 16) + 1000
    error = (layer(x).double() - copy.deepcopy(layer).double()(x.double())).abs().max()
    theirs = (bn(x).double() - copy.deepcopy(bn).double()(x.double())).abs().max()
    assert error <= 10 * theirs


@pytest.mark.parametrize('kind, options, message', [
    (SN2d, dict(num_features=0), 'SN2d: num_features must be a positive integer, got 0'),
    (SN2d, dict(momentum=0), r'momentum must be the weight of the new batch, in \(0, 1\], got 0'),
    (SN3d, dict(momentum=None), 'using_moving_average=False'),
    (SN1d, dict(momentum=1.5), 'momentum'),
])  # fmt: skip
def test_sn_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{'num_features': 4, **options})


@pytest.mark.parametrize(
    'kind, shape', [(SN2d, (2, 3, 4, 4)), (SN2d, (2, 4, 4)), (SN1d, (2, 4, 4)), (SN3d, (2, 4, 4, 4))]
)
def test_sn_bad_input_changes_nothing(kind, shape):
    layer = kind(4)
    with pytest.raises(ValueError, match=rf'{kind.__name__}: input must be {kind.input_dim}-D with num_features=4'):
        layer(torch.randn(shape))
    assert layer.bn.num_batches_tracked == 0 and layer.bn.running_mean.abs().max() == 0


def test_only_the_statistics_are_kept_from_conversions():
    """torch's and mmengine's conversion of batch norms put theirs at ``bn`` by add_module; other modules may come."""
    layer, extra = SN2d(4), torch.nn.Identity()
    own = layer.bn
    layer.add_module('bn', torch.nn.SyncBatchNorm(4))
    layer.add_module('extra', extra)
    assert layer.bn is own and layer.extra is extra


@pytest.mark.parametrize('kind, shape', [(SN2d, (3, 4, 5, 6)), (SN3d, (2, 4, 3, 4, 5))])
def test_affine_by_torchs_operators(kind, shape, monkeypatch):
    """Where no kernel runs."""
    monkeypatch.setenv('BNET_MM_BACKEND', 'reference')
    torch.manual_seed(0)
    layer, x = reference.randomise(kind(4)), torch.randn(shape) * 2 + 1
    mixture = layer.mean_weight.detach().double(), layer.var_weight.detach().double()
    expected, _ = reference.switchable_norm(x.double(), *mixture)
    weight, bias = (value.detach().double().view(-1, *[1] * (x.dim() - 2)) for value in (layer.weight, layer.bias))
    torch.testing.assert_close(layer(x).double(), expected * weight + bias, rtol=1e-5, atol=1e-5)
