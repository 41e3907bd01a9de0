"""The operators of the whole norm as compiled, against torch's batch norm and convolution in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm.ops.triton import launchers  # noqa: E402
from ptx.cases import DTYPES, LAYOUTS, MAP_ERROR, SUM_ERROR, error  # noqa: E402
from ptx.driver import machine  # noqa: E402

EPS, MOMENTUM = 1e-3, 0.3
NCHW, NHWC = LAYOUTS
WHOLE = pytest.mark.ptx
TRAINING = ['moments', 'batch_statistics', 'forward', 'backward', 'add_partials', 'backward']
FROZEN = ['forward', 'backward', 'add_partials']


def inputs(shape, dtype, k, layout):
    channels = shape[1]
    maps = {name: torch.randn(shape) * scale + shift for name, scale, shift in
            (('x', 2, 1), ('residual', 1, 0), ('grad', 1, 0.5))}  # fmt: skip
    values = {name: value.to(dtype).contiguous(memory_format=layout) for name, value in maps.items()}
    values.update(weight=torch.randn(channels, 1, k, k) / k, bias=torch.randn(channels))
    return values | dict(running_mean=torch.randn(channels), running_var=torch.rand(channels) + 0.5)


def run(values, batch_statistics, residual, relu, running=True, needs_weight=True):
    """Results by name; the running statistics are moved."""
    moved = {name: values[name].clone() for name in ('running_mean', 'running_var')}
    buffers = tuple(moved.values()) if running else (None, None)
    other = values['residual'] if residual else None
    y, mean, rstd = launchers.norm(
        values['x'], other, values['weight'], values['bias'], *buffers, batch_statistics, MOMENTUM, EPS, relu
    )
    grad_x, grad_weight, grad_bias, grad_residual = launchers.norm_backward(
        values['grad'], values['x'], mean, rstd, values['weight'], y if relu else None, batch_statistics, needs_weight,
        residual,
    )  # fmt: skip
    found = dict(y=y, mean=mean, rstd=rstd, grad_x=grad_x, grad_bias=grad_bias, grad_residual=grad_residual)
    return found | dict(grad_weight=grad_weight) | (moved if running else {})


def exact(values, y, batch_statistics, residual, relu):
    wide = {name: value.double() for name, value in values.items()}
    leaves = [wide[name].requires_grad_() for name in ('x', 'weight', 'bias', 'residual')]
    x, weight, bias, other = leaves
    running = wide['running_mean'], wide['running_var']
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0) if batch_statistics else running[::-1]
    mean, rstd = mean.clone(), (var + EPS).rsqrt()
    x_hat = F.batch_norm(x, *running, training=batch_statistics, momentum=MOMENTUM, eps=EPS)
    out = F.conv2d(x_hat, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    out = out + other if residual else out + 0 * other
    out = torch.where(y > 0, out, out.clamp(max=0) * 0) if relu else out  # where rounding has left y
    grads = torch.autograd.grad(out, leaves, wide['grad'])
    names = ('grad_x', 'grad_weight', 'grad_bias', 'grad_residual')
    found = dict(zip(names, grads), y=out.detach(), mean=mean, rstd=rstd)
    return found | dict(running_mean=running[0], running_var=running[1])


def check(shape, dtype, k, layout, batch_statistics, residual, relu):
    values = inputs(shape, dtype, k, layout)
    found = run(values, batch_statistics, residual, relu)
    truth = exact(values, found['y'], batch_statistics, residual, relu)
    assert (found['grad_residual'] is not None) == residual
    for name, value in found.items():
        if value is None:
            continue
        is_map = value.dim() == 4 and name != 'grad_weight'
        limit = MAP_ERROR[dtype] if is_map else SUM_ERROR
        assert value.dtype == (dtype if is_map else torch.float32) and value.shape == truth[name].shape
        assert error(value, truth[name]) <= limit, (name, error(value, truth[name]))
        assert not is_map or value.is_contiguous(memory_format=layout)


CASES = [
    (case, () if case[0][1:] == (5, 9, 13) and case[2] == 3 or case[1:4] == (DTYPES[0], 1, NHWC) else WHOLE)
    for case in itertools.product(
        ((2, 5, 9, 13), (3, 9, 14, 14), (5, 3, 1, 8)), DTYPES, (1, 3, 5, 7), LAYOUTS, (True, False)
    )
]


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=marks, id='-'.join(map(str, case))) for case, marks in CASES]
)
def test_norm(case):
    *rest, batch_statistics = case
    residual = relu = rest[2] == 3  # flags change nothing in how taps are summed
    with machine() as gpu:
        check(*rest, batch_statistics, residual, relu)
    launched = [done.kernel.removesuffix('_kernel') for done in gpu.launches]
    assert launched == (TRAINING if batch_statistics else FROZEN)


@pytest.mark.parametrize('batch_statistics', (True, False), ids=('batch', 'running'))
@pytest.mark.parametrize('residual, relu', [(True, False), (False, True)])
def test_flags(residual, relu, batch_statistics):
    with machine():
        check((2, 5, 9, 13), torch.float32, 3, NCHW, batch_statistics, residual, relu)


def test_without_running_statistics_or_gradients_of_taps():
    """The other results keep their bits."""
    values = inputs((2, 5, 9, 13), torch.float32, 3, NCHW)
    with machine():
        every = run(values, True, True, True)
        found = run(values, True, True, True, running=False, needs_weight=False)
    assert not found.pop('grad_weight').any() and 'running_mean' not in found
    assert all(torch.equal(value, every[name]) for name, value in found.items())


def test_running_statistics_are_only_read_in_evaluation():
    values = inputs((2, 5, 9, 13), torch.float32, 3, NCHW)
    with machine():
        found = run(values, False, False, False)
    for name, kept in (('running_mean', 'mean'), ('running_var', 'rstd')):
        assert torch.equal(found[name], values[name])
        assert found[kept].data_ptr() != found[name].data_ptr()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_without_statistics(layout):
    """What folding leaves of a layer: the transform alone, forward in one launch; gradients of mean 0 and rstd 1."""
    values = inputs((2, 5, 9, 13), torch.float32, 5, layout)
    ones = {'running_mean': torch.zeros(5), 'running_var': torch.full((5,), 1 - EPS)}
    with machine() as gpu:
        found = run(values, False, True, True, running=False)
    assert [done.kernel.removesuffix('_kernel') for done in gpu.launches] == FROZEN
    truth = exact(values | ones, found['y'], False, True, True)
    for name, value in found.items():
        assert error(value, truth[name]) <= (MAP_ERROR[torch.float32] if value.dim() == 4 else SUM_ERROR), name
    assert not found['mean'].any() and (found['rstd'] == 1).all()


@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_nan_and_inf_of_the_output(bad):
    """Where y is NaN, the gradient passes the ReLU, as in torch."""
    values = inputs((2, 3, 8, 12), torch.float32, 3, NCHW)
    values['residual'][0, 0, 2, 2] = bad
    with machine():
        found = run(values, False, True, True)
    y = found['y']
    assert torch.equal(found['grad_residual'], values['grad'].masked_fill(y <= 0, 0))
    assert y[0, 0, 2, 2].isnan() if bad != bad else y[0, 0, 2, 2] == bad
    assert found['grad_residual'][0, 0, 2, 2] == values['grad'][0, 0, 2, 2]


def test_infinite_statistics():
    """Running statistics become what torch's become."""
    values = inputs((2, 3, 8, 12), torch.float32, 3, NCHW)
    values['x'][0, 1, 2, 2] = float('inf')
    moved = [values[name].clone() for name in ('running_mean', 'running_var')]
    F.batch_norm(values['x'], *moved, training=True, momentum=MOMENTUM)
    with machine():
        found = run(values, True, False, False)
    for name, wanted in zip(('running_mean', 'running_var'), moved):
        torch.testing.assert_close(found[name][[0, 2]], wanted[[0, 2]])
        assert not found[name][1].isfinite() and not wanted[1].isfinite()


def test_equal_bits_on_every_run():
    values = inputs((3, 40, 9, 14), torch.float16, 3, NHWC)
    with machine() as gpu:
        first = run(values, True, True, True)
        gpu.only = lambda name, programs: range(programs)[::-1]
        second = run(values, True, True, True)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_refusals_name_the_argument():
    values = inputs((2, 3, 5, 7), torch.float32, 3, NCHW)
    x, weight, bias = values['x'], values['weight'], values['bias']
    mean, var = values['running_mean'], values['running_var']
    with machine():
        for message, arguments in (
            ('running_mean must be', (x, None, weight, bias, mean[:2], var)),
            ('running_var must be', (x, None, weight, bias, mean, var.double())),
            ('residual must be', (x, x[:1], weight, bias, mean, var)),
            ('must be given', (x, None, weight, bias, mean, None)),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                launchers.norm(*arguments, False, MOMENTUM, EPS, False)
        with pytest.raises(ValueError, match='y must be'):
            launchers.norm_backward(x, x, mean, var, weight, x[:1], True, True, True)
