import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnet_mm import BNET
from helpers import reference

DOUBLE = {'dtype': torch.float64}


def make(c=3, training=True, **options):
    return reference.randomise(BNET(c, **{**DOUBLE, **options})).train(training)


def expected(layer, x):
    mean, var = layer.norm.running_mean, layer.norm.running_var
    if layer.training or mean is None:
        mean, var = reference.batch_statistics(x)
    dilation = layer.bnconv.dilation[0]
    return reference.bnet(x, layer.bnconv.weight, layer.bnconv.bias, mean, var, layer.norm.eps, dilation)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 1), (5, 1), (7, 1), (3, 2), (5, 3)])
def test_equals_the_formula(k, dilation, training):
    layer = make(5, k=k, dilation=dilation, training=training)
    x = torch.randn(2, 5, 7, 11, **DOUBLE) * 3 + 2
    want = expected(layer, x)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 9), w=st.integers(1, 9),
    k=st.sampled_from([1, 3, 5, 7]), dilation=st.integers(1, 2), channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape_and_layout(n, c, h, w, k, dilation, channels_last):
    """Batch 1, maps of height or width 1, kernels larger than the map, both layouts, sliced inputs."""
    layer = make(c, k=k, dilation=dilation, training=n * h * w > 1)
    x = (torch.randn(n + 1, c, h + 2, w + 3, **DOUBLE) * 2 + 1)[1:, :, 1:-1, 2:-1]
    assert x.shape == (n, c, h, w)
    want = expected(layer, x)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    if channels_last and min(c, h * w) > 1:
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_border_pixels_see_the_mean():
    """Zero padding is in normalised space: a map that is constant at the mean stays constant up to its border."""
    layer = make(4, k=5, training=False)
    x = layer.norm.running_mean.reshape(1, -1, 1, 1).expand(2, 4, 6, 6)
    torch.testing.assert_close(layer(x), layer.bias.reshape(1, -1, 1, 1).expand_as(x))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_gradcheck(k, dilation, training):
    layer = make(2, k=k, dilation=dilation, training=training, momentum=0.0)
    x = torch.randn(2, 2, 4, 3, requires_grad=True, **DOUBLE)

    def function(x, weight, bias):
        parameters = {'bnconv.weight': weight, 'bnconv.bias': bias}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.bnconv.weight, layer.bnconv.bias))


def test_fresh_layer_equals_fresh_batch_norm():
    layer, bn = BNET(6, k=5), nn.BatchNorm2d(6)
    x = torch.randn(3, 6, 9, 10) * 4 - 1
    torch.testing.assert_close(layer(x), bn(x))


@pytest.mark.parametrize('momentum', [0.1, 0.03, None])
@pytest.mark.parametrize('track', [True, False])
def test_statistics_are_batch_norms(momentum, track):
    """Twenty random steps of unequal batches: outputs, running buffers and the counter equal BatchNorm2d's."""
    options = dict(momentum=momentum, track_running_stats=track, eps=1e-3)
    layer, bn = BNET(4, k=1, **options), nn.BatchNorm2d(4, affine=False, **options)
    for step in range(20):
        x = torch.randn(1 + step % 3, 4, 3 + step % 4, 5) * (1 + step) + step
        torch.testing.assert_close(layer(x), bn(x))
    assert layer.norm.state_dict().keys() == bn.state_dict().keys()
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(layer.norm.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)
    layer.eval(), bn.eval()
    torch.testing.assert_close(layer(x), bn(x))


def test_statistics_mode_follows_the_inner_norm():
    """norm_eval=True switches only the inner BatchNorm to eval; the layer itself stays in training mode."""
    layer = make(3, k=3)
    layer.norm.eval()
    before = copy.deepcopy(layer.norm.state_dict())
    x = torch.randn(2, 3, 5, 5, **DOUBLE) + 3
    got = layer(x)
    layer.eval()
    assert torch.equal(got, layer(x))
    assert all(torch.equal(before[name], value) for name, value in layer.norm.state_dict().items())


def test_empty_batch_is_batch_norms():
    layer, bn = BNET(3, k=3), nn.BatchNorm2d(3)
    x = torch.randn(0, 3, 4, 5, requires_grad=True)
    for mode in (True, False):
        got, want = layer.train(mode)(x), bn.train(mode)(x)
        assert got.shape == want.shape == (0, 3, 4, 5)
        got.sum().backward()
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        torch.testing.assert_close(getattr(layer.norm, name), getattr(bn, name), equal_nan=True)


def cpu_convolves_half():
    try:
        nn.functional.conv2d(torch.ones(1, 1, 1, 1).half(), torch.ones(1, 1, 1, 1).half())
    except RuntimeError:
        return False
    return True


HALF = pytest.param(
    torch.float16, marks=pytest.mark.skipif(not cpu_convolves_half(), reason='this torch has no float16 conv on CPU')
)


@pytest.mark.parametrize('dtype', [torch.bfloat16, HALF])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('how', ['autocast', 'parameters too', 'input only'])
def test_low_precision_error_is_bounded_by_torchs_own(dtype, training, how):
    """Error against float64 at most 4 x that of BatchNorm2d followed by Conv2d in the same precision."""
    layer = make(8, k=3, training=training, dtype=torch.float32)
    pair = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)).train(training)
    pair[0].load_state_dict(layer.norm.state_dict())
    pair[1].load_state_dict(layer.bnconv.state_dict())
    x = (torch.randn(4, 8, 13, 17) * 2 + 1).to(dtype)
    want = expected(copy.deepcopy(layer).double(), x.double())
    if how == 'parameters too':
        layer, pair = layer.to(dtype), pair.to(dtype)
    with torch.autocast('cpu', dtype=dtype, enabled=how == 'autocast'):
        got = layer(x)
        theirs = pair[1](pair[0](x)) if how != 'input only' else pair.float()(x.float()).to(dtype)
    assert got.dtype == dtype
    error, their_error = ((y.double() - want).abs().max() for y in (got, theirs))
    assert error <= 4 * their_error + torch.finfo(dtype).eps * want.abs().max(), (error, their_error)


def test_half_precision_gradients_reach_float32_parameters():
    layer = make(4, k=3, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        layer(torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)).float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0


def test_deepcopy_pickle_state_dict_and_repr():
    layer = make(4, k=5, dilation=2, training=False)
    x = torch.randn(2, 4, 9, 9, **DOUBLE)
    fresh = BNET(4, k=5, dilation=2, **DOUBLE).eval()
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(twin(x), layer(x))
        assert twin.bnconv.weight.data_ptr() != layer.bnconv.weight.data_ptr()
    assert sorted(layer.state_dict()) == [
        'bnconv.bias', 'bnconv.weight', 'norm.num_batches_tracked', 'norm.running_mean', 'norm.running_var',
    ]  # fmt: skip
    text = repr(layer)
    assert text.startswith('BNET(') and 'kernel_size=5' in text and 'dilation=2' in text and '4' in text


def test_weight_and_bias_are_gamma_and_beta():
    """Host code that writes a norm's weight (zero_init_residual, ConvModule's init) must reach the centre tap."""
    layer = make(3, k=3, training=False)
    nn.init.constant_(layer.weight, 0.25)
    nn.init.constant_(layer.bias, -1)
    assert torch.equal(layer.bnconv.weight[:, 0, 1, 1], torch.full((3,), 0.25, **DOUBLE))
    assert layer.bnconv.weight.abs().sum() > 3 * 0.25  # the other taps are as they were
    assert torch.equal(layer.bnconv.bias, torch.full((3,), -1.0, **DOUBLE))
    assert layer.bnconv.weight.is_leaf and layer.bnconv.weight.requires_grad


@pytest.mark.parametrize('training', [True, False])
def test_compile(training):
    layer = make(4, k=3, training=training, dtype=torch.float32)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 4, 8, 9)
    torch.testing.assert_close(compiled(x), layer(x))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


@pytest.mark.skipif(not hasattr(torch.export, 'Dim'), reason='torch.export has no Dim before torch 2.2')
def test_export():
    layer = make(4, k=5, training=False, dtype=torch.float32)
    x = torch.randn(2, 4, 8, 9)
    batch = torch.export.Dim('batch', min=2, max=16)
    exported = torch.export.export(layer, (x,), dynamic_shapes={'x': {0: batch}})
    bigger = torch.randn(5, 4, 8, 9)
    torch.testing.assert_close(exported.module()(bigger), layer(bigger))


@pytest.mark.parametrize('name, value', [
    ('k', 2), ('k', 4), ('k', 0), ('k', -1), ('k', 3.0), ('k', True), ('k', (3, 3)), ('dilation', 0),
    ('num_features', 0), ('num_features', '8'),
])  # fmt: skip
def test_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=rf'BNET: {name} must be a positive (odd )?integer, got'):
        BNET(**{'num_features': 8, name: value})


def test_unknown_keyword_is_named():
    with pytest.raises(ValueError, match='BNET: unknown option kernel'):
        BNET(8, kernel=3)


@pytest.mark.parametrize('shape, message', [
    ((2, 3, 4), '4-D'), ((2, 3, 4, 4, 4), '4-D'), ((2, 4, 4, 4), 'num_features=3'), ((1, 3, 1, 1), 'more than one'),
])  # fmt: skip
def test_bad_input_is_refused_before_statistics_change(shape, message):
    layer = make(3, k=3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape, **DOUBLE))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_one_value_per_channel_is_allowed_in_eval():
    layer = make(3, k=3, training=False)
    x = torch.randn(1, 3, 1, 1, **DOUBLE)
    torch.testing.assert_close(layer(x), expected(layer, x))
