"""The package's kernels as compiled, executed, against float64.

What runs by default is at least one of everything; ``-m ptx`` has the rest of the combinations, minutes of compilation
the first time.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm import BNET  # noqa: E402
from bnet_mm.ops.bnet import bnet, moments  # noqa: E402
from ptx.cases import DTYPES, EPS, LAYOUTS, NAMES, Case, check, error, run  # noqa: E402
from ptx.driver import machine  # noqa: E402

NCHW, NHWC = LAYOUTS
WHOLE = pytest.mark.ptx
CAPABILITIES = (75, 80, 90, 100, 120)
SMALL = (2, 5, 9, 13)


def named(cases):
    """Parameters for pytest: cases, or (case, mark)."""
    pairs = (case if isinstance(case, tuple) else (case, ()) for case in cases)
    return pytest.mark.parametrize('case', [pytest.param(case, marks=marks, id=str(case)) for case, marks in pairs])


@pytest.fixture
def gpu():
    with machine() as one:
        yield one


@named(Case(SMALL, dtype, k, layout) for k, dtype, layout in itertools.product((1, 3, 5, 7), DTYPES, LAYOUTS))
def test_training(case, gpu):
    check(case)
    names = {'forward', 'backward', 'moments', 'moments_backward', 'add_partials', 'join_moments'}
    assert {done.kernel.removesuffix('_kernel') for done in gpu.launches} == names


@pytest.mark.parametrize('capability', (75, 80, 100, 120))
@named(
    (Case(SMALL, dtype, k, layout), () if (k, layout == NHWC) in ((1, True), (3, False)) else WHOLE)
    for k, dtype, layout in itertools.product((1, 3, 5, 7), DTYPES, LAYOUTS)
    if k < 7 or (dtype, layout) == (torch.float32, NCHW)  # a minute of compilation each
)
def test_other_capabilities(case, capability):
    with machine(capability) as gpu:
        check(case)
        assert all(f'.target sm_{capability}' in done.compiled.asm['ptx'] for done in gpu.launches)


@named(
    (Case(SMALL, dtype, 3, layout, statistics, residual, relu),
     () if dtype == torch.float32 and layout == NCHW or (residual and relu) else WHOLE)
    for dtype, layout, statistics, residual, relu in itertools.product(
        (torch.float32, torch.float16), LAYOUTS, ('frozen', 'given samples'), (False, True), (False, True))
)  # fmt: skip
def test_residual_and_relu(case, gpu):
    wanted = ('x', 'weight', 'bias') + (('residual',) if case.residual else ())
    check(Case(**{**vars(case), 'wanted': wanted}))


@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'nhwc'))
def test_which_gradients_are_wanted(layout, gpu):
    """What is asked for has the same bits whatever else is; forward alone as well."""
    all_names = NAMES[:5]
    case = Case((3, 4, 7, 10), layout=layout, statistics='given samples', wanted=all_names)
    inputs = case.inputs()
    every = check(case, inputs)
    for wanted in ((), ('x',), ('weight',), ('bias',), ('mean',), ('rstd',), ('x', 'mean'), ('x', 'weight', 'rstd')):
        found = run(Case(**{**vars(case), 'wanted': wanted}), inputs)
        assert found.keys() == {'y', *wanted}
        assert all(torch.equal(value, every[name]) for name, value in found.items()), wanted


EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 257)


@named(
    (Case((1, 3, 5, width), dtype, k, layout, 'given', wanted=NAMES[:5]),
     () if k == 3 and (width, dtype) in ((1, DTYPES[0]), (33, DTYPES[0]), (64, DTYPES[1]), (129, DTYPES[1])) else WHOLE)
    for width, k, dtype, layout in itertools.product(EDGES, (1, 3), DTYPES[:2], LAYOUTS)
)  # fmt: skip
def test_widths(case, gpu):
    check(case)


SHAPES = (
    (1, 1, 1, 1), (3, 2, 1, 2), (2, 3, 1, 40), (2, 3, 17, 1), (5, 1, 6, 7), (3, 70, 5, 6), (1, 130, 4, 4),
    (2, 300, 3, 2), (7, 9, 2, 2), (1, 2, 67, 3), (2, 33, 14, 14), (1, 65, 7, 7),
)  # fmt: skip


@named(
    (Case(shape, dtype, k, layout, statistics), () if k == 3 and dtype == DTYPES[number % 3] else WHOLE)
    for (number, shape), k, layout, dtype in itertools.product(enumerate(SHAPES), (1, 3, 5), LAYOUTS, DTYPES)
    for statistics in (('batch',) if shape[0] * shape[2] * shape[3] > 4 else ('given',))
)
def test_shapes(case, gpu):
    check(case)


@named(
    (Case((3, 6, 9, 20), dtype, k, layout, statistics, wanted=wanted), () if k == 3 and dtype == DTYPES[0] else WHOLE)
    for (statistics, wanted), k, dtype, layout in itertools.product(
        (('samples', NAMES[:3]), ('given', NAMES[:5]), ('frozen', NAMES[:3]), ('batch', ())), (1, 3), DTYPES, LAYOUTS)
)  # fmt: skip
def test_statistics(case, gpu):
    check(case)


NORMS = dict(BN='BN', SyncBN='SyncBN', GN=dict(type='GN', num_groups=4), IN='IN', SN='SN', CBN='CBN')


@pytest.mark.parametrize('training', (True, False), ids=('training', 'eval'))
@pytest.mark.parametrize('k, dtype, layout', [
    (3, torch.float32, NCHW), pytest.param(1, torch.float32, NHWC, marks=WHOLE),
    pytest.param(3, torch.float16, NHWC, marks=WHOLE), pytest.param(5, torch.bfloat16, NCHW, marks=WHOLE),
])  # fmt: skip
@pytest.mark.parametrize('name', NORMS)
def test_layers(name, k, dtype, layout, training):
    """BNET over every norm, and its running statistics, against the same layer in float64."""
    conv, layer = nn.Conv2d(4, 8, 3, padding=1, bias=False), BNET(8, k=k, norm=NORMS[name])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, buffer in layer.named_buffers():
            if key.endswith(('running_mean', 'running_var')):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    net = nn.Sequential(conv, layer).train(training)
    exact_net = copy.deepcopy(net).double()
    images = [torch.randn(3, 4, 11, 20) for _ in range(3 if name == 'CBN' else 1)]  # CBN has a history
    with machine() as gpu:
        for image in images:
            x = conv(image)
            if (dtype, layout) != (torch.float32, NCHW):
                x = x.to(dtype).contiguous(memory_format=layout)
            y = layer(x)
        grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=layout)
        gradients = torch.autograd.grad(y, list(layer.parameters()), grad)
    assert {'forward_kernel', 'backward_kernel'} <= {done.kernel for done in gpu.launches}
    for image in images:  # the same rounded map, but CBN asks where it comes from
        exact_y = exact_net(image.double()) if name == 'CBN' else exact_net[1](x.detach().double())
    exact = torch.autograd.grad(exact_y, list(exact_net[1].parameters()), grad.double())
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for value, other in zip((y, *gradients), (exact_y, *exact)):
        assert error(value, other) < limit
    for (key, value), other in zip(layer.named_buffers(), exact_net[1].buffers()):
        assert error(value, other.double()) < limit, key


def test_joined_statistics(gpu):
    """What SyncBN does over processes: moments of each part, joined; gradients through both."""
    parts = [torch.randn(n, 4, 6, 7) * (n + 1) + n for n in (1, 2)]
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    grad = torch.randn(3, 4, 6, 7)

    def join(statistics, counts):
        total = sum(counts)
        mean = sum(count * mean for count, (mean, _) in zip(counts, statistics)) / total
        var = sum(count * (v + (m - mean) ** 2) for count, (m, v) in zip(counts, statistics)) / total
        return mean, (var + EPS).rsqrt()

    leaves = [part.clone().requires_grad_() for part in parts]
    own = [moments(leaf, True) for leaf in leaves]
    mean, rstd = join([one[1:] for one in own], [part.numel() / 4 for part in parts])
    y = torch.cat([bnet(one[0], mean, rstd, weight, bias) for one in own])
    found = torch.autograd.grad(y, leaves, grad)
    whole = torch.cat(parts).double().requires_grad_()
    x_hat = torch.nn.functional.batch_norm(whole, None, None, training=True, eps=EPS)
    exact = torch.nn.functional.conv2d(x_hat, weight.double(), bias.double(), padding=1, groups=4)
    exact_grad = torch.autograd.grad(exact, whole, grad.double())[0]
    assert error(y, exact) < 4e-6 and error(torch.cat(found), exact_grad) < 4e-6


@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'nhwc'))
@pytest.mark.parametrize('bad', (float('nan'), float('inf'), -float('inf')))
def test_nan_and_inf(bad, layout, gpu):
    """In the map, in the gradient: values are NaN and infinite where torch's are, also behind ReLU."""
    for place in ('x', 'grad'):
        for relu in (False, True) if place == 'x' else (False,):
            case = Case((2, 2, 8, 7), layout=layout, statistics='given', relu=relu, wanted=('x', 'bias'))
            inputs = case.inputs()
            inputs[place][0, 0, 4, 3] = inputs[place][1, 1, 0, 6] = bad
            got = run(case, inputs)
            exact = torch_values(case, inputs)
            for name in ('y', 'x') if not relu else ('y',):
                value, truth = got[name], exact[name]
                assert torch.equal(value.isnan(), truth.isnan()), (place, name)
                torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-4, equal_nan=True)
    mean, var = moments(inputs['x'].index_fill(3, torch.tensor([2]), bad), False)[1:]
    assert not mean.isfinite().any() and var.isnan().all()


def torch_values(case, inputs):
    x = inputs['x'].double().requires_grad_()
    per_map = (1, -1, 1, 1)
    x_hat = (x - inputs['mean'].double().view(per_map)) * inputs['rstd'].double().view(per_map)
    c = x.shape[1]
    y = torch.nn.functional.conv2d(x_hat, inputs['weight'].double(), inputs['bias'].double(), padding=1, groups=c)
    y = y.relu() if case.relu else y
    return {'y': y.detach(), 'x': torch.autograd.grad(y, x, inputs['grad'].double())[0]}


def test_other_strides(gpu):
    """Maps and gradients of any strides are copied: equal bits."""
    case = Case((2, 3, 7, 9), statistics='given', residual=True, wanted=NAMES)
    inputs = case.inputs()
    same = run(case, inputs)
    wide = {name: torch.zeros(2, 6, 7, 20, dtype=case.dtype) for name in ('x', 'grad', 'residual')}
    for name, big in wide.items():
        big[:, ::2, :, 1:19:2] = inputs[name]
    strided = {name: big[:, ::2, :, 1:19:2] for name, big in wide.items()}
    for names in (('x',), ('grad',), ('residual',), ('x', 'grad', 'residual')):
        mixed = {**inputs, **{name: strided[name] for name in names}}
        assert all(torch.equal(value, same[name]) for name, value in run(case, mixed).items()), names
    expanded = {**inputs, 'grad': torch.ones(1).expand(case.shape)}
    dense = {**inputs, 'grad': torch.ones(case.shape)}
    assert all(torch.equal(value, run(case, dense)[name]) for name, value in run(case, expanded).items())
    transposed = {**inputs, 'grad': inputs['grad'].transpose(2, 3).contiguous().transpose(2, 3)}
    assert all(torch.equal(value, same[name]) for name, value in run(case, transposed).items())


def moved(tensor, elements):
    """The same values and strides, ``elements`` behind an aligned address."""
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    assert storage.data_ptr() % 16 == 0
    return storage.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor)


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'nhwc'))
def test_pointers_aligned_to_their_element_only(layout, dtype, gpu):
    """After aligned ones of the same shape: what was compiled, or cached, for those would fault.

    Not the same bits: sums of vectors of four are taken in another order.
    """
    case = Case((2, 4, 8, 16), dtype, layout=layout, residual=True, wanted=(*NAMES[:3], 'residual'))
    inputs = case.inputs()
    check(case, inputs)
    for names in (('x',), ('grad', 'weight', 'bias'), tuple(inputs)):
        check(case, {name: moved(value, 1) if name in names else value for name, value in inputs.items()})


@named(Case(shape, dtype, 3, layout) for shape in ((2, 3, 9, 6), (3, 40, 8, 70)) for dtype, layout in
       ((DTYPES[0], NCHW), (DTYPES[0], NHWC), (DTYPES[1], NCHW)))  # fmt: skip
def test_equal_bits_on_every_run(case, gpu):
    """No store's value is the hardware's choice, which every launch checks; nor does the order of programs matter."""
    inputs = case.inputs()
    first = run(case, inputs)
    gpu.only = lambda name, programs: range(programs)[::-1]
    for name, value in run(case, inputs).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize('capability', [pytest.param(c, marks=() if c == 90 else WHOLE) for c in CAPABILITIES])
@pytest.mark.parametrize('layout', LAYOUTS, ids=('nchw', 'nhwc'))
def test_sums_over_lanes_have_no_products(layout, capability):
    """Three samples: mean times count is rounded. Contracted into the sum, it left other bits in each lane of a warp,
    of which one was stored; see test_faults.py::test_a_product_contracted_into_a_sum."""
    x = (torch.randn(3, 300, 3, 2) + 1).contiguous(memory_format=layout)
    with machine(capability):
        mean, var = moments(x, True)[1:]
        check(Case((2, 40, 9, 13), k=1, layout=layout, statistics='given', wanted=NAMES[:5]))  # rstd times sums
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert error(mean, exact_mean) < 1e-6 and error(var, exact_var) < 1e-6


shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 40))


def drawn(examples):
    """Shapes are always the same ones, so that what is compiled for them is found again."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@drawn(12)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from((1, 3)), st.sampled_from(LAYOUTS), st.booleans())
def test_drawn_shapes(shape, dtype, k, layout, relu):
    with machine():
        check(Case(shape, dtype, k, layout, 'given', relu=relu, wanted=NAMES[:5]))


@WHOLE
@drawn(100)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from((1, 3, 5)), st.sampled_from(LAYOUTS), st.booleans(),
       st.booleans(), st.sampled_from(('given', 'given samples', 'frozen')), st.sampled_from(CAPABILITIES))  # fmt: skip
def test_many_drawn_shapes(shape, dtype, k, layout, residual, relu, statistics, capability):
    wanted = NAMES[:3] if statistics == 'frozen' else NAMES[:5]
    with machine(capability):
        check(Case(shape, dtype, k, layout, statistics, residual, relu, wanted))
