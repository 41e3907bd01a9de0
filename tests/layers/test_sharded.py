"""Layers whose parameters FSDP has flattened and sharded: wrapped as they come, each module in a unit of its own."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from helpers.sharded import CASES, CBN_CASES, losses, worker, wrap_everything


@pytest.mark.parametrize('case', CASES)
def test_every_module_wrapped_in_one_process(case, process_group):
    """The losses of the plain network: the taps are not read past the wrapper around them."""
    assert losses(CASES[case], wrap_everything) == pytest.approx(losses(CASES[case], DistributedDataParallel), rel=1e-5)


@pytest.mark.hardening
def test_every_module_wrapped_in_two_processes(tmp_path):
    """Sharded: DDP's losses; CBN, which reads the convolution before it, says what it needs instead of crashing."""
    multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    results = torch.load(tmp_path / '0.pth', weights_only=True)
    for case in (*CASES, *CBN_CASES):
        sharded, copied = results[case]
        assert sharded == pytest.approx(copied, rel=1e-5), case
    for case in CBN_CASES:
        assert 'is sharded apart from this layer. Wrap both in one unit' in results[f'{case}, error']
