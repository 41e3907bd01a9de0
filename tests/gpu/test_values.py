"""Values of the layer on a GPU, against float64: every dtype, layout, k, width and mode.

Without a GPU the compiled kernels are executed on the CPU, the first of each kind by default, all under ``-m gpu``.
"""

import itertools

import pytest
import torch

from helpers.gpu import DEVICE, DTYPES, LAYOUTS, MODES, exact, needs_gpu, random_layer, random_map, run

KERNEL_SIZES = (1, 3, 5, 7)
WIDTHS = (1, 2, 3, 5, 7, 14, 25, 31, 42, 63, 64, 65, 83, 84, 127, 128, 129, 130, 167, 334)
ALL = [*itertools.product(DTYPES, LAYOUTS, KERNEL_SIZES, MODES)]
SHORT = [('float32', 'NCHW', 3, 'training'), ('float16', 'channels_last', 5, 'frozen')]


def cases(some, every):
    """``some`` by default, the others under the marker."""
    return [case if case in some else pytest.param(*case, marks=pytest.mark.gpu) for case in every]


def compare(shape, dtype='float32', layout='NCHW', k=3, mode='training', residual=False, relu=False, **scales):
    layer, form = random_layer(shape[1], k, mode == 'training'), (DTYPES[dtype], LAYOUTS[layout])
    x, grad = random_map(shape, *form, **(scales or dict(scale=2, shift=1))), random_map(shape, *form)
    other = random_map(shape, *form) if residual else None
    if relu:  # no gradient where rounding could take y over 0
        grad = grad * (exact(layer, x, grad, other).values['y'].abs() > 0.05).to(grad)
    truth = exact(layer, x, grad, other, relu)
    run(layer, x, grad, other, relu).assert_close(truth, DTYPES[dtype])


@pytest.mark.parametrize('dtype, layout, k, mode', cases(SHORT, ALL))
def test_layer(dtype, layout, k, mode):
    compare((2, 5, 9, 14), dtype, layout, k, mode)


@pytest.mark.parametrize('width, layout', cases([(7, 'NCHW')], [*itertools.product(WIDTHS, LAYOUTS)]))
def test_widths(width, layout):
    compare((2, 3, 5, width), 'float32' if width % 2 else 'float16', layout)


@pytest.mark.parametrize(
    'dtype, mode, layout', cases([('float16', 'training', 'NCHW')], [*itertools.product(DTYPES, MODES, LAYOUTS)])
)
def test_tail(dtype, mode, layout):
    """With the block's residual and ReLU in the same pass."""
    compare((2, 4, 6, 10), dtype, layout, mode=mode, residual=True, relu=True)


@pytest.mark.gpu
@pytest.mark.parametrize('shape', [(1, 1, 1, 2), (3, 70, 2, 2), (1, 200, 3, 1), (17, 2, 1, 3), (1, 3, 130, 1)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_shapes(shape, layout):
    """Single rows, columns and channels, more channels than a tile, odd batches; taps beyond the map."""
    compare(shape, layout=layout, k=7)


@pytest.mark.gpu
@pytest.mark.parametrize('layout', LAYOUTS)
def test_far_mean(layout):
    """A mean of 100 deviations: E[x^2] - mean^2 would lose four digits."""
    layer, x = random_layer(3, 3), random_map((2, 3, 12, 17), layout=LAYOUTS[layout], scale=1, shift=100)
    mean, rstd = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0).rsqrt()
    x_hat = (x.double() - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1)
    taps, bias = layer.bnconv.weight.double(), layer.bnconv.bias.double()
    truth = torch.nn.functional.conv2d(x_hat, taps, bias, padding=1, groups=3)
    assert (layer(x).double() - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('layout', cases([('NCHW',)], [(name,) for name in LAYOUTS]))
def test_equal_bits(layout, mode):
    """Two equal calls, among others in between, give equal bits."""
    x, grad = (random_map((3, 6, 9, 11), layout=LAYOUTS[layout[0]]) for _ in range(2))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(random_layer(6, 5, mode == 'training'), x, grad))
        compare((1, 4, 7, 5))
    results[0].assert_equal(results[1])


@pytest.mark.parametrize('dtype, offset', cases([('float32', 1)], [*itertools.product(DTYPES, (1, 2, 3))]))
def test_unaligned_after_aligned(dtype, offset):
    """A map that begins at any element, after one of the same shape at a multiple of 16 bytes."""
    shape, layer = (2, 4, 8, 16), random_layer(4, 3, False)
    aligned, grad = random_map(shape, DTYPES[dtype]), random_map(shape, DTYPES[dtype])
    truth, result = exact(layer, aligned, grad), run(layer, aligned, grad)
    result.assert_close(truth, DTYPES[dtype])
    memory = torch.empty(2, aligned.numel() + offset, dtype=aligned.dtype, device=DEVICE)
    x, other = (row[offset:].view(shape) for row in memory)
    assert x.data_ptr() % 16
    run(layer, x.copy_(aligned), other.copy_(grad)).assert_close(truth, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nan_and_inf_stay_in_their_window(value):
    layer, x = random_layer(3, 3, False), random_map((2, 3, 9, 11))
    clean = layer(x)
    x[0, 1, 4, 5] = value
    y = layer(x)
    window = torch.zeros_like(y, dtype=torch.bool)
    window[0, 1, 3:6, 4:7] = True
    assert torch.equal(y[~window], clean[~window]) and not y[window].isfinite().any()


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS)
def test_more_than_two_to_the_31_elements(layout):
    """In float16; compared at the end of the map, where offsets of 32 bits would be wrong."""
    channels, side = 64, 2048
    samples = 2**31 // (channels * side * side) + 1
    x = torch.zeros(samples, channels, side, side, dtype=torch.float16, device='cuda')
    x = x.contiguous(memory_format=LAYOUTS[layout])
    x[-1] = torch.randn(channels, side, side, dtype=torch.float16, device='cuda')
    layer = random_layer(channels, 3, False)
    with torch.no_grad():
        y = layer(x)[-1:, :, -64:].clone()
        truth = layer(x[-1:].clone(memory_format=LAYOUTS[layout]))[:, :, -64:]
    assert torch.equal(y, truth)
