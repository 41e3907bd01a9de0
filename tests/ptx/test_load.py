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
