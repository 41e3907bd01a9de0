"""A kernel is tried before the backend is chosen: a user without a compiler gets torch's operators and a warning."""

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from bnet_mm.ops import dispatch, triton  # noqa: E402
from bnet_mm.ops.triton import launchers  # noqa: E402
from ptx.driver import machine  # noqa: E402


def test_a_kernel_that_works():
    state = torch.get_rng_state()
    with machine() as gpu, FakeTensorMode():
        triton.try_kernel('cpu')
    assert [done.kernel for done in gpu.launches] == ['forward_kernel']
    assert torch.equal(torch.get_rng_state(), state)


def no_compiler(*args):
    raise RuntimeError('Failed to find C compiler. Please specify via CC environment variable.')


def wrong(x, *args):
    return x + 1


@pytest.mark.parametrize('forward, reason', [(no_compiler, 'Failed to find C compiler'), (wrong, 'wrong')])
def test_one_that_does_not(forward, reason, monkeypatch):
    monkeypatch.setattr(launchers, 'forward', forward)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(triton, 'try_kernel', lambda device, original=triton.try_kernel: original('cpu'))
    triton.load.cache_clear()
    dispatch.forget()
    try:
        with pytest.warns(RuntimeWarning, match=f"{reason}.*torch's operators run instead") as caught:
            assert dispatch.choose('auto', 'cuda', torch.float32, 3, 1) == 'reference'
            assert dispatch.choose('auto', 'cuda', torch.float32, 5, 1) == 'reference'
        assert len(caught) == 1
        with pytest.raises(dispatch.BackendError, match=reason):
            dispatch.choose('triton', 'cuda', torch.float32, 3, 1)
        assert not torch._C._dispatch_has_kernel_for_dispatch_key('bnet_mm::forward', 'CUDA')
    finally:
        triton.load.cache_clear()
        dispatch.forget()


def test_not_within_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(launchers, 'forward', no_compiler)
    triton.try_kernel('cpu')


@pytest.fixture
def remembered(monkeypatch):
    """Triton's cache, as keys and names of files."""
    files = set()

    class Manager:
        def __init__(self, key):
            self.key = key

        def has_file(self, name):
            return (self.key, name) in files

        def put(self, data, name):
            files.add((self.key, name))

    monkeypatch.setattr(triton, 'get_cache_manager', Manager)
    return files


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = ((torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 5))
ALL = [
    pytest.param(dtype, k, marks=() if (dtype, k) in FEW else pytest.mark.ptx) for dtype in DTYPES for k in (1, 3, 5, 7)
]


@pytest.mark.parametrize('dtype, k', ALL)
def test_first_use_is_checked_once(dtype, k, remembered):
    with machine() as gpu, FakeTensorMode():
        triton.check(dtype, k, 'cpu')
        # moments, their join, forward; sums, their join, grad_x: in two layouts
        assert len(gpu.launches) == 12 and len(remembered) == 1
        triton.check(dtype, k, 'cpu')
        assert len(gpu.launches) == 12


@pytest.mark.parametrize('output', range(3))
def test_first_use_with_wrong_gradients(output, remembered, monkeypatch):
    original = launchers.norm_backward

    def slightly_wrong(*args):
        found = list(original(*args))
        found[output] = found[output] * 1.001
        return found

    monkeypatch.setattr(launchers, 'norm_backward', slightly_wrong)
    message = 'of torch.float32 and k=3 cannot run on cpu: their results are wrong'
    with machine(), pytest.warns(RuntimeWarning, match=message), pytest.raises(ImportError, match=message):
        triton.check(torch.float32, 3, 'cpu')
    assert not remembered


def test_check_is_left_out(remembered, monkeypatch):
    monkeypatch.setattr(launchers, 'norm', no_compiler)
    monkeypatch.setenv('BNET_MM_CHECK', '0')
    triton.check(torch.float32, 3, 'cpu')
    monkeypatch.delenv('BNET_MM_CHECK')
    monkeypatch.setattr(triton, '_capturing', lambda: True)
    triton.check(torch.float32, 3, 'cpu')
    assert not remembered


def test_a_dtype_that_is_wrong_runs_by_torch(monkeypatch):
    """Of the others the kernels run; where the backend is named, it is an error."""

    def check(dtype, k):
        if dtype == torch.float16 and k == 7:
            raise ImportError('their results are wrong')

    monkeypatch.setitem(dispatch.BACKENDS, 'triton', dispatch.BACKENDS['triton']._replace(
        device='cuda', load=lambda: '', check=check))  # fmt: skip
    dispatch.forget()
    try:
        assert dispatch.choose('auto', 'cuda', torch.float16, 7, 1) == 'reference'
        assert dispatch.choose('auto', 'cuda', torch.float16, 5, 1) == 'triton'
        with pytest.raises(dispatch.BackendError, match='their results are wrong'):
            dispatch.choose('triton', 'cuda', torch.float16, 7, 1)
    finally:
        dispatch.forget()
