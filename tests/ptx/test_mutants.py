"""The package's kernels with one deliberate fault each: the tests above would find it, and say what and where."""

import gc
import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
from bnet_mm.ops.triton import kernels, launchers  # noqa: E402
from ptx.cases import NAMES, Case, run  # noqa: E402
from ptx.driver import machine  # noqa: E402
from ptx.faults import Fault  # noqa: E402
from ptx.test_large import CHANNELS, filled, last_programs  # noqa: E402

FOLDER = Path(kernels.__file__).parent


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Makes the package use kernels of whose sources one has ``new`` for ``old``; returns its file and changed line.

    Plans are forgotten, as they hold kernels.
    """
    names = 'lanes', 'forward', 'backward', 'sums', 'moments'

    def change(old: str, new: str) -> tuple[str, int]:
        sources = {name: (FOLDER / f'{name}.py').read_text() for name in names}
        (name,) = [name for name, text in sources.items() if old in text]
        assert sources[name].count(old) == 1 and old.count('\n') == new.count('\n')
        line = sources[name][: sources[name].index(old)].count('\n') + 1
        sources[name] = sources[name].replace(old, new)
        for module_name, text in sources.items():
            for other in names:
                text = text.replace(f'bnet_mm.ops.triton.kernels.{other} ', f'mutant_{other} ')
            (tmp_path / f'mutant_{module_name}.py').write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for module_name in names:
            module = importlib.import_module(f'mutant_{module_name}')
            for attribute in dir(module):
                if attribute.endswith('_kernel'):
                    monkeypatch.setattr(kernels, attribute, getattr(module, attribute))
        forget()
        return f'mutant_{name}.py', line

    yield change
    for name in names:
        sys.modules.pop(f'mutant_{name}', None)
    forget()
    gc.collect()  # within Triton's reading of a kernel it would disturb Python 3.11's ast


def forget():
    for function in vars(launchers).values():
        if hasattr(function, 'cache_clear'):
            function.cache_clear()


STORE = 'tl.store(y, value.to(y.dtype.element_ty), mask=mask)'
LOAD = 'value = tl.load(at, mask=mask, other=0.0)'


@pytest.mark.parametrize(
    'old, new, kinds, kernel',
    [
        (STORE, STORE.replace(', mask=mask', ''), (Fault.OUTSIDE, Fault.PROGRAMS, Fault.AMBIGUOUS), 'forward'),
        (LOAD, LOAD.replace(', mask=mask, other=0.0', ''), (Fault.OUTSIDE,), 'forward'),
        ('program % tiles * CHANNELS + tl', 'program % tiles % 1 + tl', (Fault.PROGRAMS,), 'backward'),
        ('values = values + (sums[e] * scale,)', 'values = values + (sums[e] * scale + 1,)', None, ''),
    ],
    ids=('mask of a store', 'mask of a load', 'place of the sums', 'value'),
)
def test_small_map(old, new, kinds, kernel, mutate):
    case = Case((2, 20, 9, 13), k=3, statistics='given', wanted=NAMES[:5])
    inputs = case.inputs()
    with machine():
        right = run(case, inputs)
        file, line = mutate(old, new)
        if kinds is None:
            wrong = run(case, inputs)
            assert [name for name in wrong if not torch.equal(wrong[name], right[name])] == ['x']
            return
        with pytest.raises(Fault) as found:
            run(case, inputs)
    assert found.value.kind in kinds and found.value.kernel == f'{kernel}_kernel'
    if 'tl.' in old:
        said_file, said_line = found.value.source.split(':')
        # Triton 3.8 gives a load that the optimiser has moved the line where its value is used.
        assert said_file == file and int(said_line) - line in (0, 1)


def test_product_within_a_sum_over_lanes(mutate):
    """As moments had it: nothing but the hardware's choice of the last bit."""
    x = torch.randn(3, 20, 5, 7)
    with machine():
        launchers.moments(x, True)
        mutate('terms = mean * count + 0.0', 'terms = mean * count')
        with pytest.raises(Fault, match=Fault.AMBIGUOUS) as found:
            launchers.moments(x, True)
    assert found.value.kernel == 'moments_kernel'


def test_offsets_of_32_bits_on_a_large_map(mutate):
    mutate('one = tl.full((), 1, tl.int64)  # maps', 'one = tl.full((), 1, tl.int32)  # maps')
    x = filled(torch.contiguous_format)
    mean, bias, weight = torch.randn(CHANNELS), torch.randn(CHANNELS), torch.randn(CHANNELS, 1, 3, 3)
    with machine(fresh_is_nan=False) as gpu:
        gpu.only = last_programs(torch.contiguous_format)
        with pytest.raises(Fault, match=Fault.OUTSIDE):
            launchers.forward(x, mean, mean, weight, bias, None, False)
