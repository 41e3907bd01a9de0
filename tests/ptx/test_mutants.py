"""The package's kernels with one deliberate fault each: the tests above would find it, and say what and where."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm.ops.triton import kernels, launchers  # noqa: E402
from ptx.cases import NAMES, Case, run  # noqa: E402
from ptx.driver import machine  # noqa: E402
from ptx.faults import Fault  # noqa: E402
from ptx.test_large import CHANNELS, filled, last_programs  # noqa: E402

SOURCE = Path(kernels.__file__).read_text()


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Makes the package use kernels whose source has ``new`` for ``old``; returns the number of the changed line."""

    def change(old: str, new: str) -> int:
        assert SOURCE.count(old) == 1 and old.count('\n') == new.count('\n')
        file = tmp_path / 'mutant.py'
        file.write_text(SOURCE.replace(old, new))
        spec = importlib.util.spec_from_file_location('mutant', file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name in dir(module):
            if name.endswith('_kernel'):
                monkeypatch.setattr(launchers, name, getattr(module, name))
        return SOURCE[: SOURCE.index(old)].count('\n') + 1

    return change


STORE = 'tl.store(y + at + e * step_w, out.to(y.dtype.element_ty), mask=valid)'
LOAD = 'mask=columns[s] < width, other=0.0).to(tl.float32)\n        if CENTRED'


@pytest.mark.parametrize(
    'old, new, kinds, kernel',
    [
        (STORE, STORE.replace(', mask=valid', ''), (Fault.OUTSIDE, Fault.PROGRAMS, Fault.AMBIGUOUS), 'forward'),
        (LOAD, LOAD.replace('mask=columns[s] < width, other=0.0', ''), (Fault.OUTSIDE,), 'forward'),
        ('(group * strips + strip) * column_tiles +', 'group * column_tiles +', (Fault.PROGRAMS,), 'backward'),
        ('out = (sums[o * COLUMNS + e] * scale).to(', 'out = (sums[o * COLUMNS + e] * scale + strip).to(', None, ''),
    ],
    ids=('mask of a store', 'mask of a load', 'place of the sums', 'value'),
)
def test_small_map(old, new, kinds, kernel, mutate):
    case = Case((2, 20, 9, 13), k=1, statistics='given', wanted=NAMES[:5])
    inputs = case.inputs()
    with machine():
        right = run(case, inputs)
        line = mutate(old, new)
        if kinds is None:
            wrong = run(case, inputs)
            assert [name for name in wrong if not torch.equal(wrong[name], right[name])] == ['x']
            return
        with pytest.raises(Fault) as found:
            run(case, inputs)
    assert found.value.kind in kinds and found.value.kernel == f'{kernel}_kernel'
    if 'tl.' in old:
        assert f'mutant.py:{line}' in found.value.source


def test_product_within_a_sum_over_lanes(mutate):
    """As moments had it: nothing but the hardware's choice of the last bit."""
    x = torch.randn(3, 300, 3, 2)
    with machine():
        launchers.moments(x, True)
        mutate('terms = mean * count + 0.0', 'terms = mean * count')
        with pytest.raises(Fault, match=Fault.AMBIGUOUS) as found:
            launchers.moments(x, True)
    assert found.value.kernel == 'moments_kernel'


def test_offsets_of_32_bits_on_a_large_map(mutate):
    mutate('one = tl.full((), 1, tl.int64)', 'one = tl.full((), 1, tl.int32)')
    x = filled(torch.contiguous_format)
    mean, bias, weight = torch.randn(CHANNELS), torch.randn(CHANNELS), torch.randn(CHANNELS, 1, 3, 3)
    with machine(fresh_is_nan=False) as gpu:
        gpu.only = last_programs(torch.contiguous_format)
        with pytest.raises(Fault, match=Fault.OUTSIDE):
            launchers.forward(x, mean, mean, weight, bias, None, False)
